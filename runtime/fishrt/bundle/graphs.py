"""The graphs of a bundle as engines: the first form that fits provider and machine, else the portable graph."""

from __future__ import annotations

import logging
import shlex
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace

from fishrt_engines import Engine, GraphSpec, ProviderError, open_engine
from fishrt_engines.machine import features

from ..errors import FishrtError
from .features import LanguageModel
from .folder import Bundle
from .manifest import Form

log = logging.getLogger(__name__)

SMALL_BYTES = 64_000_000
"""Bytes of a bundle that is read in a part of a second."""
_SPEECH_ROOM = 2048
"""Positions that a prompt leaves for speech, at most half of all."""


class BundleGraphs(Mapping[str, Engine]):
    """The graphs of a bundle by role, each opened when it is first accessed: decoding needs no language model."""

    def __init__(self, bundle: Bundle, provider: str, threads: int | None) -> None:
        """Open no graph yet. Raises ProviderError for provider coreml and a bundle without graphs for it."""
        self._bundle, self.provider, self._threads = bundle, provider, threads
        self._features = features(provider)
        made_for = {"cpu", *(form.provider for graph in bundle.manifest.graphs.values() for form in graph.forms)}
        if provider == "coreml":
            _check_coreml(bundle)
        elif provider not in made_for:
            hint = f"`fishrt retarget BUNDLE --target {provider}` adds them"
            name = bundle.manifest.name
            log.warning("%s has no graphs for %s: the portable ones run, which is slower; %s", name, provider, hint)
        self._open: dict[str, Engine] = {}
        self._locks = {role: threading.Lock() for role in bundle.manifest.graphs}

    def begin(self, role: str) -> None:
        """Open a graph of a small bundle in a thread; large ones at once would take more memory. Who needs it waits for it."""

        def open_it() -> None:
            with suppress(FishrtError):  # the one who needs it is told
                _ = self[role]

        if role not in self._open and self._bundle.manifest.total_bytes <= SMALL_BYTES:
            threading.Thread(target=open_it, name=f"open {role}").start()

    def __getitem__(self, role: str) -> Engine:
        with self._locks[role]:
            if role not in self._open:
                begun = time.perf_counter()
                self._open[role] = engine = self._opened(role)
                log.info("opened %s on %s in %.0f ms", engine.spec.file, engine.provider, 1000 * (time.perf_counter() - begun))
            return self._open[role]

    def _opened(self, role: str) -> Engine:
        manifest, provider = self._bundle.manifest, self.provider
        graph = manifest.graphs[role]
        form = graph.form(provider, self._features)
        if form is None and provider == "coreml":
            provider = "cpu"
            form = graph.form(provider, self._features)
        for other in graph.forms[: graph.forms.index(form) if form else None]:
            if other.provider == provider:
                lacking = ", ".join(sorted(set(other.needs) - self._features))
                log.info("%s is not used: this machine has no %s", other.spec.file, lacking)
        if form is not None and form.parts:
            return self._in_parts(form)
        return self._engine(graph.spec if form is None else form.spec, provider)

    def _engine(self, spec: GraphSpec, provider: str) -> Engine:
        with _hints(self._bundle, provider):
            return open_engine(self._bundle.file(spec.file), spec, provider=provider, threads=self._threads)

    def _in_parts(self, form: Form) -> Engine:
        """Return an engine whose graph of a length is opened when the first call of this length comes."""
        from fishrt_engines.ort.coreml import Part, StaticEngine

        by_frames = {part.frames: part for part in form.parts}

        def open_part(frames: int) -> Part:
            part = by_frames[frames]
            return Part(self._engine(part.front, "cpu"), self._engine(part.back, form.provider))

        return StaticEngine(form.spec, "frames", by_frames, open_part)

    def __iter__(self) -> Iterator[str]:
        return iter(self._bundle.manifest.graphs)

    def __len__(self) -> int:
        return len(self._bundle.manifest.graphs)


@contextmanager
def _hints(bundle: Bundle, provider: str) -> Iterator[None]:
    """Add the command that helps to an error of a provider without a hint: engines know no commands."""
    try:
        yield
    except ProviderError as error:
        builds = f"fishrt build-trt {shlex.quote(str(bundle.path))}"
        error.hint = error.hint or (builds if provider == "tensorrt" else "`fishrt doctor` shows what can run here")
        raise


def _check_coreml(bundle: Bundle) -> None:
    """Check that a bundle has graphs for CoreML, which takes fixed sizes only. Raises ProviderError."""
    manifest = bundle.manifest
    roles = [role for role, graph in manifest.graphs.items() if graph.form("coreml", ())]
    if not roles:
        raise ProviderError(
            f"{manifest.name} has no static graphs, which provider 'coreml' needs",
            hint='`fishrt retarget BUNDLE --target coreml` adds them; or use provider "cpu"',
        )
    log.info("provider coreml: %s on CoreML, all other graphs on the CPU", ", ".join(roles))


def within_plans(bundle: Bundle) -> Bundle:
    """Return the bundle with its model limited to the positions of its plan. Raises ProviderError if this machine has no plan."""
    from fishrt_engines.trt.engine import find_built

    manifest = bundle.manifest
    if not isinstance(manifest.model, LanguageModel):
        raise ProviderError(
            f"{manifest.name} is a diffusion model, for which there are no plans of TensorRT yet",
            hint='use provider "cuda" or "cpu"',
        )
    spec = manifest.specs["slow_ar"]
    with _hints(bundle, "tensorrt"):
        built = find_built(bundle.file(spec.file), spec).key.lowering.max_len
    assert built is not None  # the slow AR's caches have a length
    return replace(bundle, manifest=replace(manifest, model=with_positions(manifest.language_model, built)))


def with_positions(lm: LanguageModel, positions: int) -> LanguageModel:
    """Return the model with at most so many positions."""
    prompt = positions - min(_SPEECH_ROOM, positions // 2)
    return replace(lm, max_seq_len=min(lm.max_seq_len, positions), max_prompt=min(lm.max_prompt, prompt))
