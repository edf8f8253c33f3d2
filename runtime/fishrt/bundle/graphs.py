"""The graphs of a bundle as engines."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace

from fishrt_engines import Engine, open_engine

from ..language_model.frame import frame_graph
from .folder import Bundle
from .int8_codec import int8_decode
from .static import open_codec_decode, static_graphs

log = logging.getLogger(__name__)

FUSED = ("cuda", "tensorrt")
"""Providers that run the fast AR as the frame graph: a launch costs more there than a draw."""


class BundleGraphs(Mapping[str, Engine]):
    """The graphs of a bundle by role, each opened when it is first accessed: decoding needs no language model."""

    def __init__(self, bundle: Bundle, provider: str, threads: int | None) -> None:
        """Open no graph yet. Raises ProviderError for provider coreml and a bundle without static graphs."""
        self._bundle, self.provider, self._threads = bundle, provider, threads
        self._static = static_graphs(bundle) if provider == "coreml" else None
        self._open: dict[str, Engine] = {}
        self._lock = threading.Lock()

    def __getitem__(self, role: str) -> Engine:
        with self._lock:
            if role not in self._open:
                begun = time.perf_counter()
                self._open[role] = engine = self._opened(role)
                log.info("opened %s on %s in %.0f ms", engine.spec.file, engine.provider, 1000 * (time.perf_counter() - begun))
            return self._open[role]

    def _opened(self, role: str) -> Engine:
        if self._static is not None and role == "codec_decode":
            return open_codec_decode(self._bundle, self._static, self._threads)
        manifest = self._bundle.manifest
        spec, build, identity = manifest.graphs[role], None, manifest.identity(role)
        path = self._bundle.file(spec.file)
        if self.provider in FUSED and role == "fast_ar":
            spec, build = frame_graph(manifest.graphs, manifest.language_model)
        elif self.provider == "cpu" and role == "codec_decode" and (file := int8_decode(self._bundle)):
            spec, path = replace(spec, file=file), self._bundle.file(file)
            identity = manifest.identity(role, file, f"{file}.data")
        return open_engine(
            path,
            spec,
            provider=self.provider if self._static is None else "cpu",
            threads=self._threads,
            specialise=True,
            identity=identity,
            build=build,
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._bundle.manifest.graphs)

    def __len__(self) -> int:
        return len(self._bundle.manifest.graphs)
