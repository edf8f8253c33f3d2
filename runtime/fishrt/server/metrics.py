"""Counts and times for Prometheus, in a registry of their own: several servers in one process do not mix."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..speaking.stats import Stats

_SECONDS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 20, 60)
_RTF = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.85, 1, 1.5, 2, 4)


class Metrics:
    """The metrics of a server."""

    def __init__(self, stats: Callable[[], Stats]) -> None:
        """Make them. stats: returns the counts of the scheduler."""
        self._registry = registry = CollectorRegistry()
        self.requests = Counter("fishrt_requests", "Requests that ended.", ["route", "status"], registry=registry)
        self.cancelled = Counter("fishrt_cancelled", "Requests whose client went away.", registry=registry)
        self.frames = Counter("fishrt_frames", "Frames that were spoken.", registry=registry)
        self.audio = Counter("fishrt_audio_seconds", "Seconds of speech.", registry=registry)
        self.first_audio = Histogram(
            "fishrt_first_audio_seconds", "From a request to its first audio.", buckets=_SECONDS, registry=registry
        )
        self.queued = Histogram("fishrt_queue_seconds", "From a request to its turn.", buckets=_SECONDS, registry=registry)
        self.rtf = Histogram(
            "fishrt_rtf", "Seconds from the turn of a request to its end ÷ seconds of audio.", buckets=_RTF, registry=registry
        )
        registry.register(_OfScheduler(stats))

    def text(self) -> bytes:
        """Return the metrics as Prometheus reads them."""
        return generate_latest(self._registry)


class _OfScheduler(Collector):
    """The counts of the scheduler, read when they are asked for."""

    def __init__(self, stats: Callable[[], Stats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        """Yield the counts."""
        stats = self._stats()
        yield GaugeMetricFamily("fishrt_waiting", "Requests that wait.", value=stats.waiting)
        yield GaugeMetricFamily("fishrt_active", "Requests that speak.", value=stats.active)
        yield CounterMetricFamily("fishrt_refused", "Requests that the full queue refused.", value=stats.refused)
        yield CounterMetricFamily("fishrt_failed", "Requests that ended by an error.", value=stats.failed)
        yield CounterMetricFamily("fishrt_steps", "Steps of the batch.", value=stats.steps)
        yield CounterMetricFamily("fishrt_rows", "Frames of steps; rows ÷ steps is the mean batch.", value=stats.rows)
        yield CounterMetricFamily("fishrt_busy_seconds", "Seconds in turns.", value=stats.busy_s)
