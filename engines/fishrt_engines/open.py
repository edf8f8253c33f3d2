"""The one door: a graph file, its description and a provider give an engine."""

from __future__ import annotations

from pathlib import Path

from .engine import Engine, GraphSpec
from .errors import FishrtError, GraphError, ProviderError
from .machine import usable_threads
from .ort.engine import OrtEngine
from .ort.session import Opened, differences, inconsistencies, is_memory_error, open_session, out_of_memory
from .providers import resolve_provider


def open_engine(path: Path, spec: GraphSpec, *, provider: str = "auto", threads: int | None = None) -> Engine:
    """Open the graph file `path` and check that it is the one that `spec` describes.

    provider: "auto" or one of the names in `providers.PROVIDERS`. threads: None means the physical cores; see `usable_threads`.
    Raises ProviderError for a provider that is unknown or cannot be used, GraphError for a missing, damaged or different file,
    FishrtError if memory does not suffice.
    """
    name = resolve_provider(provider)
    count = usable_threads(threads)
    if name == "tensorrt":
        from .trt.engine import open_plan

        return open_plan(path, spec)
    if not path.is_file():
        raise GraphError(f"there is no graph file {path}")
    try:
        opened = _open(name, path, spec, count)
    except FishrtError:
        raise
    except Exception as error:  # ONNX Runtime's exceptions have no common base
        if is_memory_error(error):
            raise out_of_memory(f"the weights of {path.name}", name) from None
        raise GraphError(f"{path} cannot be loaded: {error}", hint="copy or export the bundle again") from None
    if found := [*inconsistencies(spec), *differences(spec, opened.session)]:
        raise GraphError(f"{path} differs from its description: " + "; ".join(found), hint="export it again")
    return OrtEngine(opened, spec, name)


def _open(provider: str, path: Path, spec: GraphSpec, threads: int) -> Opened:
    if provider == "cpu":
        return open_session(path, spec, threads=threads)
    if provider == "cuda":
        from .ort.cuda import open_cuda

        return open_cuda(path, spec, threads=threads)
    if provider == "coreml":
        from .ort.coreml import open_coreml

        return open_coreml(path, spec, threads=threads)
    raise ProviderError(f"provider {provider!r} does not run {path.name} by ONNX Runtime")
