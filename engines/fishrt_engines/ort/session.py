"""ONNX Runtime sessions on a CPU: their options, and the steps from a graph file to a session.

file ─► ONNX Runtime's optimiser and packing ─► session
                        └─► cache ─► the next start maps it
"""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import cache
from ..engine import GraphSpec, TensorSpec
from ..errors import FishrtError
from ..folders import cache_folder, cache_limit
from ..machine import cpu_identity
from ..providers import import_onnxruntime
from . import packed
from .tensors import HostMemory, Memory

log = logging.getLogger(__name__)

WORTH_KEEPING = 32_000_000
"""Bytes of weights from which an optimised graph is cached on disk. Smaller graphs are optimised quickly."""
_KEPT = "graph.onnx"
"""The name of a graph in the cache."""
SPIN_US = "20"
"""Microseconds that an idle thread spins before it sleeps: the next product of the same step may come sooner than a sleeping
thread wakes. Spinning makes an idle machine faster and a busy one slower; with ONNX Runtime's longer default, idle threads also
slow down the loop's other session."""
_DTYPES = {"float": "float32", "double": "float64"}
"""Element types whose name in ONNX Runtime is not numpy's."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A session, the memory of its tensors, and how it is run."""

    session: Any
    memory: Memory = field(default_factory=HostMemory)
    run_options: Callable[[int], Any] | None = None
    """Return the options of a run that is captured as a CUDA graph of this id, or not captured for -1. None: nothing is captured.

    The first run of a capture may repeat the graph, so the graph must be idempotent. It is without state, and also if it writes
    its columns at positions that it is fed."""


def open_session(path: Path, spec: GraphSpec, *, threads: int) -> Opened:
    """Open a session of the graph file `path` on the CPU. ONNX Runtime's errors, which have no common base, go through."""
    ort = import_onnxruntime()
    folder = cache_folder()
    if folder is not None and spec.identity:
        key = [spec.identity, _accuracy(spec), ort.__version__, cpu_identity()]
        kept = cache.find(folder, key)  # first: a start from the cache does not parse the graph
        if kept is None and (most := cache_limit()) and weight_bytes(path) >= WORTH_KEEPING:
            kept = _keep(ort, path, spec, folder, key, most)
        if kept is not None and (session := _from_cache(ort, kept, session_options(ort, threads))) is not None:
            log.debug("%s as it is kept in %s", path.name, kept.folder)
            return Opened(session)
    return Opened(_from_file(ort, path, spec, session_options(ort, threads)))


def session_options(ort: Any, threads: int) -> Any:
    """Return the options common to all sessions."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    options.add_session_config_entry("session.intra_op.spin_duration_us", SPIN_US)
    return options


def graph_source(path: Path, options: Any) -> str | bytes:
    """Return the argument of a session for a graph file, and name the folder of its weights in the session's options.

    The argument is the path. ONNX Runtime refuses weights behind a link out of the folder, as in the cache of a model hub: for
    those it is the bytes of the graph with resolved names. Raises GraphError for weights that the graph places outside of its
    folder.
    """
    parsed, folder = packed.parse_model(path), path.parent.resolve()
    places = packed.external_places(parsed)
    files = {name: (folder / name).resolve() for name in {entry.value for entry in places}}
    linked = any(folder / name != file for name, file in files.items())
    if linked:
        folder = Path(os.path.commonpath([file.parent for file in files.values()]))
        for entry in places:
            entry.value = files[entry.value].relative_to(folder).as_posix()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    return bytes(parsed.SerializeToString()) if linked else str(path)


def weight_bytes(path: Path) -> int:
    """Return the bytes of the files of weights that a graph file names."""
    names = {entry.value for entry in packed.external_places(packed.parse_model(path))}
    return sum(file.stat().st_size for name in names if (file := path.parent / name).is_file())


def is_memory_error(error: Exception) -> bool:
    """Return whether an error reports too little memory, which ONNX Runtime does by exceptions with one of these texts."""
    text = str(error).lower()
    texts = ("bad_alloc", "failed to allocate", "bad allocation", "out of memory", "smaller than requested", "alloc_failed")
    return isinstance(error, MemoryError) or any(words in text for words in texts)


def out_of_memory(what: str, provider: str) -> FishrtError:
    """Return the error for users."""
    where, larger = ("", "a machine") if provider == "cpu" else (" of the device", "a device")
    return FishrtError(f"not enough memory{where} for {what}", hint=f"use smaller inputs, or {larger} with more memory")


def element_type(node: Any) -> str:
    """Return numpy's name of the element type of a session's input or output."""
    name = str(node.type).removeprefix("tensor(").removesuffix(")")
    return _DTYPES.get(name, name)


def inconsistencies(spec: GraphSpec) -> list[str]:
    """Return the faults of the description itself."""
    inputs, outputs = ({t.name: t for t in tensors} for tensors in (spec.inputs, spec.outputs))
    wrong = []
    for pair in spec.states:
        before, after = inputs.get(pair.input), outputs.get(pair.output)
        if before is None or after is None:
            wrong.append(f"the state {pair.input} → {pair.output} names a tensor that is not listed")
        elif (before.dtype, before.shape) != (after.dtype, after.shape):
            wrong.append(f"the state {pair.input} → {pair.output} changes its dtype or shape")
    if not wrong and (columns := spec.columns) is not None:
        feeds, states = ({t.name: len(t.shape) for t in tensors} for tensors in (spec.feeds, spec.state_tensors))
        named = ((columns.write_index, feeds, 1), (columns.position_ids, feeds, 2), (columns.cache, states, 4))
        wrong += [f"{name} cannot place columns" for name, ranks, rank in named if name is not None and ranks.get(name) != rank]
        if (columns.rows is None) != (columns.cache is None):
            wrong.append("filled rows and their cache are named together, or not at all")
    return wrong


def differences(spec: GraphSpec, session: Any) -> list[str]:
    """Return the differences between a session's tensors and the described ones.

    Fixed sizes are compared, and the names of the inputs' symbolic dimensions; ONNX Runtime renames those that it computes.
    """
    added = spec.columns.rows if spec.columns else None
    found = []
    for kind, described, nodes in (
        ("input", spec.inputs, session.get_inputs()),
        ("output", spec.outputs, session.get_outputs()),
    ):
        in_file = {node.name: node for node in nodes if node.name != added}
        by_name = {t.name: t for t in described}
        found += [f"{kind} {name} is missing" for name in by_name if name not in in_file]
        found += [f"{kind} {name} is not described" for name in in_file if name not in by_name]
        for name in by_name.keys() & in_file.keys():
            found += _tensor_differences(f"{kind} {name}", by_name[name], element_type(in_file[name]), in_file[name].shape)
    if added and added not in {node.name for node in session.get_inputs()}:
        found.append(f"input {added} is missing")
    return sorted(found)


def _tensor_differences(what: str, described: TensorSpec, dtype: str, shape: Sequence[int | str | None]) -> list[str]:
    if dtype != described.dtype:
        return [f"{what} is {dtype} instead of {described.dtype}"]
    named = what.startswith("input")
    same = len(shape) == len(described.shape) and all(
        in_file == wanted or not isinstance(in_file, (int, str) if named and isinstance(wanted, str) else int)
        for in_file, wanted in zip(shape, described.shape, strict=True)
    )
    return [] if same else [f"{what} has shape {list(shape)} instead of {list(described.shape)}"]


def _accuracy(spec: GraphSpec) -> str:
    """Return ONNX Runtime's accuracy level of products with quantised weights: 4 rounds activations to 8 bits, 0 does not."""
    return "4" if spec.rounds_activations else "0"


def _from_cache(ort: Any, kept: cache.Entry, options: Any) -> Any | None:
    """Open a graph of the cache, which stays there while the session lives; return None if it is gone or cannot be loaded."""
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        held = kept.hold()
    except OSError:  # another process has just removed it
        return None
    try:
        session = _session(ort, str(kept.folder / _KEPT), options)
    except Exception as error:  # ONNX Runtime's exceptions have no common base
        held.close()
        cache.discard(kept.folder, f"cannot be loaded ({error})")
        return None
    weakref.finalize(session, held.close)
    return session


def _keep(ort: Any, path: Path, spec: GraphSpec, folder: Path, key: list[str], most: int) -> cache.Entry | None:
    """Optimise a graph and keep it; return None, with a warning, if it cannot be written or the disk is full.

    most: bytes that all kept graphs may take.
    """

    def write(aside: Path) -> None:
        log.info("optimising %s for this machine, once; the result is cached in %s", path.name, folder)
        saved, weights = aside / "saved.onnx", aside / "saved.data"
        options = session_options(ort, 1)
        options.optimized_model_filepath = str(saved)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", weights.name)
        options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
        options.add_session_config_entry("session.save_external_prepacked_constant_initializers", "1")
        try:
            _from_file(ort, path, spec, options)
        except Exception as error:  # ONNX Runtime's exceptions have no common base; a full disk is one of them
            raise OSError(str(error)) from None
        packed.align(saved, weights, aside / _KEPT)
        saved.unlink()
        weights.unlink()

    try:
        made = cache.keep(folder, key, write)
        cache.trim(folder, most)
        return made
    except OSError as error:
        why = error.strerror or error  # without the path: the same text for all graphs of a bundle is shown once
        log.warning("optimised graphs cannot be written to %s, and are made again at every start: %s", folder, why)
        return None


def _from_file(ort: Any, path: Path, spec: GraphSpec, options: Any) -> Any:
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", _accuracy(spec))
    return _session(ort, graph_source(path, options), options)


def _session(ort: Any, model: str | bytes, options: Any) -> Any:
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
