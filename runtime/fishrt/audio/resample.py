"""Another sample rate of a sound, whole or while it comes."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from ..arrays import Floats, Pcm
from ..errors import AudioError

_PRODUCTS = 1 << 20
"""Products of a sample and a kernel that are computed at once, and most values of kernels that are kept."""


class Resampler:
    """Sound that is pushed in parts of any size and comes back at another rate: all parts together are the result for the whole.

    The kernel is a sinc with 6 zero crossings on each side under a Hann window, cut off at 0.99 of the lower rate, as in the
    originals: the codes of a recording depend on it.
    """

    def __init__(self, rate: int, target: int) -> None:
        """Prepare to resample from `rate` to `target` Hz. Raises AudioError for rates below 1 Hz."""
        if rate < 1 or target < 1:
            raise AudioError(f"cannot resample from {rate} Hz to {target} Hz")
        common = math.gcd(rate, target)
        self._old, self._new = rate // common, target // common
        self._scale = 0.99 * min(self._old, self._new) / self._old
        self._reach = math.ceil(6 / self._scale)
        self._taps = np.arange(-self._reach, self._reach + 2)
        # Sample j is at position j · old / new; its offset from the old samples, and so its kernel, repeats after `new` samples.
        few = self._new * len(self._taps) <= _PRODUCTS
        self._repeated = self._kernels(np.arange(self._new)) if few else None
        self._pushed = self._given = 0
        self._begin = -self._reach
        """Position among the old samples of the first one that is kept. There is silence before the sound."""
        self._kept = np.zeros(self._reach, np.float32)

    def push(self, pcm: Pcm) -> Pcm:
        """Take pcm float32 [samples] at the old rate; return the samples that are ready at the new one, possibly none."""
        if self._old == self._new:
            return pcm
        self._kept = np.concatenate([self._kept, pcm])
        self._pushed += len(pcm)
        return self._resampled(-(-(self._pushed - self._reach - 1) * self._new // self._old))

    def finish(self) -> Pcm:
        """Return the rest, float32 [samples]: in all ⌈samples · target / rate⌉. Nothing can be pushed after it."""
        if self._old == self._new:
            return np.empty(0, np.float32)
        self._kept = np.pad(self._kept, (0, self._reach + 1))
        return self._resampled(-(-self._pushed * self._new // self._old))

    def _resampled(self, end: int) -> Pcm:
        """Return the samples from the first that was not given to `end`, and forget the old samples that only they need."""
        resampled = np.empty(max(0, end - self._given), np.float32)
        most = max(1, _PRODUCTS // len(self._taps))
        for start in range(0, len(resampled), most):
            j = self._given + np.arange(start, min(start + most, len(resampled)))
            kernels = self._kernels(j % self._new) if self._repeated is None else self._repeated[j % self._new]
            around = sliding_window_view(self._kept, len(self._taps))[j * self._old // self._new - self._reach - self._begin]
            resampled[start : start + most] = np.einsum("jk,jk->j", around, kernels)
        self._given += len(resampled)
        begin = self._given * self._old // self._new - self._reach
        self._kept, self._begin = self._kept[begin - self._begin :], begin
        return resampled

    def _kernels(self, phases: npt.NDArray[np.int64]) -> Floats:
        """Return the kernels of samples j with these j mod `new`, float32 [phases, taps]."""
        t = np.clip((self._taps - (phases * self._old % self._new / self._new)[:, None]) * self._scale, -6, 6)
        kernels: Floats = (np.sinc(t) * np.cos(np.pi * t / 12) ** 2 * self._scale).astype(np.float32)
        return kernels


def resample(pcm: Pcm, rate: int, target: int) -> Pcm:
    """Resample pcm float32 [samples] at `rate` Hz to float32 [⌈samples · target / rate⌉], as `Resampler` does."""
    resampler = Resampler(rate, target)
    return pcm if rate == target else np.concatenate([resampler.push(pcm), resampler.finish()])
