"""The graphs of a bundle as engines."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping

from fishrt_engines import Engine, open_engine

from .bundle import Bundle


class BundleGraphs(Mapping[str, Engine]):
    """The graphs of a bundle by role, each opened when it is first asked for: decoding needs no language model."""

    def __init__(self, bundle: Bundle, provider: str, threads: int | None) -> None:
        self._bundle, self._provider, self._threads = bundle, provider, threads
        self._open: dict[str, Engine] = {}
        self._lock = threading.Lock()

    def __getitem__(self, role: str) -> Engine:
        with self._lock:
            if role not in self._open:
                spec = self._bundle.manifest.graphs[role]
                path = self._bundle.file(spec.file)
                self._open[role] = open_engine(
                    path,
                    spec,
                    provider=self._provider,
                    threads=self._threads,
                    specialise=True,
                    identity=self._bundle.manifest.identity(role),
                )
            return self._open[role]

    def __iter__(self) -> Iterator[str]:
        return iter(self._bundle.manifest.graphs)

    def __len__(self) -> int:
        return len(self._bundle.manifest.graphs)
