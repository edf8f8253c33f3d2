"""Every measure of speed, and one of sound, defined once. Times are in seconds unless a name says _ms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


def rtf(compute_s: float, audio_s: float) -> float:
    """Return the real-time factor: compute seconds ÷ audio seconds. Below 1 is faster than real time."""
    return compute_s / audio_s


def per_second(count: float, seconds: float) -> float:
    """Return a rate, such as frames, tokens or bytes per second."""
    return count / seconds


def speed_up(ours_s: float, peer_s: float) -> float:
    """Return how many times faster than a peer we are: its time ÷ ours."""
    return peer_s / ours_s


def frame_bytes(slow: int, fast: int, fast_steps: float) -> float:
    """Return the bytes of weights that one frame reads: the slow AR's once, the fast AR's in each of its steps."""
    return slow + fast * fast_steps


def bandwidth_share(bytes_read: float, seconds: float, limit: float) -> float:
    """Return achieved bandwidth ÷ the machine's, both in bytes a second: 1 is the limit; above it, weights came from a cache."""
    return bytes_read / seconds / limit


@dataclass(frozen=True, slots=True)
class Summary:
    """Repeated measurements of one time, in milliseconds."""

    median_ms: float
    p95_ms: float
    count: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Summary:
        """Summarise at least one time. Raises ValueError for none."""
        if not seconds:
            raise ValueError("nothing was measured")
        median, p95 = np.percentile(np.array(seconds) * 1e3, [50, 95])
        return cls(round(float(median), 4), round(float(p95), 4), len(seconds))

    @property
    def median_s(self) -> float:
        """The median in seconds."""
        return self.median_ms / 1e3


def signal_over_error(sound: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> float:
    """Return the power of `sound` over that of its difference from `other`, of the same shape, in dB."""
    power, error = (np.square(a).sum(dtype=np.float64) for a in (sound, sound - other))
    return float(10 * np.log10(power / max(error, np.finfo(np.float32).tiny)))
