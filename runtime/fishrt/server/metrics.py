"""Counts and times for Prometheus, in a registry of their own: several servers in one process do not mix."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 20, 60)
_RTF = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.85, 1, 1.5, 2, 4)


class Metrics:
    """The metrics of a server."""

    def __init__(self, queue: Callable[[], dict[str, int]]) -> None:
        """Make them. queue: returns `waiting` and `active`."""
        self._registry = registry = CollectorRegistry()
        self.requests = Counter("fishrt_requests", "Requests that ended.", ["route", "status"], registry=registry)
        self.cancelled = Counter("fishrt_cancelled", "Requests whose client went away.", registry=registry)
        self.refused = Counter("fishrt_refused", "Requests that a full queue refused.", registry=registry)
        self.frames = Counter("fishrt_frames", "Frames that were spoken.", registry=registry)
        self.audio = Counter("fishrt_audio_seconds", "Seconds of speech.", registry=registry)
        self.first_audio = Histogram(
            "fishrt_first_audio_seconds", "From a request to its first audio.", buckets=_SECONDS, registry=registry
        )
        self.queued = Histogram("fishrt_queue_seconds", "From a request to its turn.", buckets=_SECONDS, registry=registry)
        self.rtf = Histogram(
            "fishrt_rtf", "Seconds from the turn of a request to its end ÷ seconds of audio.", buckets=_RTF, registry=registry
        )
        for name, what in (("waiting", "Requests that wait."), ("active", "Requests that speak.")):
            gauge = Gauge(f"fishrt_{name}", what, registry=registry)
            gauge.set_function(_counted(queue, name))

    def text(self) -> bytes:
        """Return the metrics as Prometheus reads them."""
        return generate_latest(self._registry)


def _counted(queue: Callable[[], dict[str, int]], name: str) -> Callable[[], float]:
    return lambda: queue()[name]
