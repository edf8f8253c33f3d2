"""The end of speech in a window of latents: no token ends it, and the model fills the rest with latents near zero.

The original code looks for the first flat stretch, so that a pause of nearly a second in the middle ends the speech, too. Its
streaming server looks back from the last frame, for silence that is flatter. Latents are float32 [frames, channels].

    blocks   │ speech  speech  quiet │ quiet  speech │ speech  silence  silence │
    given    │ speech  speech        │ quiet  quiet  speech │ speech              a quiet end may be that of the speech, and waits
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..arrays import Floats
from .denoising import Denoising

_WINDOW, _MOST_STD, _MOST_MEAN = 20, 0.05, 0.1
"""Frames that are flat together, and limits of their standard deviation and their mean."""
_MOST_SIZE, _MOST_PEAK = 0.02, 0.05
"""Streaming variant: limits of the mean and the largest absolute value."""
_STREAM_WINDOW, _STREAM_STD = 32, 0.02
"""The window and its limit with which the server looks back in a stream."""
_LOUD = 0.5
"""Part of the standard deviation of the speech before a pause from which there is speech after it."""


def first_flat(latents: Floats, *, ended: bool) -> int:
    """Return the first frame from which a stretch is flat; the number of frames if none is. ended: zeros follow the latents."""
    if ended:
        latents = np.concatenate([latents, np.zeros((_WINDOW, latents.shape[1]), np.float32)])[: len(latents) + _WINDOW - 1]
    deviation, mean = _windows(latents, _WINDOW)
    flat = np.flatnonzero((deviation < _MOST_STD) & (np.abs(mean) < _MOST_MEAN))
    frames = len(latents) - (_WINDOW - 1 if ended else 0)
    return int(flat[0]) if len(flat) else frames


def last_flat(latents: Floats, window: int = _WINDOW, most_std: float = _MOST_STD) -> int:
    """Return the first frame of the last flat stretch, of at least one frame more than `window`; as `first_flat` if none is."""
    deviation, _ = _windows(latents, window)
    size, peak = np.abs(latents).astype(np.float64), np.abs(latents).max(axis=1, initial=0)
    found, run = len(latents), 0
    for start in reversed(range(len(deviation))):
        part = slice(start, start + window)
        if deviation[start] < most_std and size[part].mean() < _MOST_SIZE and peak[part].max() < _MOST_PEAK:
            run += 1
            found = start if run > 1 else found
        elif run:
            break
    return found


def ends_quiet(latents: Floats, frames: int, most: float) -> bool:
    """Return whether there are so many frames, and no value of the last ones is larger than `most`."""
    return len(latents) >= frames and bool(np.abs(latents[-frames:]).max() <= most)


def _windows(latents: Floats, window: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return standard deviation and mean of all values of each window, float64 [windows]."""
    exact = latents.astype(np.float64)
    count = window * latents.shape[1]
    sums, squares = (_moving(part.sum(axis=1), window) for part in (exact, exact * exact))
    mean = sums / count
    return np.sqrt(np.maximum(squares - sums * mean, 0) / (count - 1)), mean


def _moving(values: npt.NDArray[np.float64], window: int) -> npt.NDArray[np.float64]:
    """Return the sum of each window of values."""
    if len(values) < window:
        return np.empty(0)
    sums: npt.NDArray[np.float64] = np.lib.stride_tricks.sliding_window_view(values, window).sum(axis=1)
    return sums


def _surely_spoken(latents: Floats) -> int:
    """Return the number of frames that come before the end whatever follows, if no stretch of the latents is flat.

    The values of a window that are there already may differ so much that no others can make it flat.
    """
    frames, most = len(latents), _MOST_STD**2 * (_WINDOW * latents.shape[1] - 1)
    for start in range(max(0, frames - _WINDOW + 1), frames):
        known = latents[start:].astype(np.float64)
        if ((known - known.mean()) ** 2).sum() < most:
            return start
    return frames


class Ending:
    """Gives out the latents of blocks up to the end of speech."""

    def __init__(self, denoising: Denoising) -> None:
        """denoising: resolved."""
        self._settings, self._streaming = denoising, denoising.variant == "streaming"
        self._latents: Floats | None = None
        self.given = 0
        """Frames given out."""
        self.end: int | None = None
        """The frame at which speech ends; None: not known yet. The number of all frames: there was no end."""
        self.stopped = False
        """Whether no more blocks are wanted."""

    @property
    def resumes(self) -> bool:
        """Whether there is speech after the pause that was taken for the end."""
        if self._latents is None or not self.end or self._streaming:
            return False
        after, _ = _windows(self._latents[self.end :], _WINDOW)
        return bool((after > _LOUD * self._latents[: self.end].std()).any())

    def push(self, block: Floats, *, last: bool) -> Floats:
        """Take the latents of the next block, at least one frame. Return those that are surely speech, after the ones given out.

        last: no block follows.
        """
        settings = self._settings
        assert settings.zero_eps is not None
        assert settings.zero_tail_frames is not None
        latents = self._latents = block if self._latents is None else np.concatenate([self._latents, block])
        # The server looks at the last block alone, however short.
        tail = min(settings.zero_tail_frames, len(block)) if self._streaming else settings.zero_tail_frames
        quiet = ends_quiet(latents, tail, settings.zero_eps)
        self.stopped = last or (settings.early_stop is True and quiet)
        upto = self._streaming_end(latents) if self._streaming else self._official_end(latents)
        given = latents[self.given : upto]
        self.given = upto
        return given

    def _official_end(self, latents: Floats) -> int:
        if self.end is None:
            end = first_flat(latents, ended=False)
            if end < len(latents):
                self.end = end
                self.stopped = self.stopped or self._settings.early_stop is True
            elif self.stopped:
                self.end = first_flat(latents, ended=True)
        return _surely_spoken(latents) if self.end is None else self.end

    def _streaming_end(self, latents: Floats) -> int:
        if not self.stopped:
            return len(latents)
        self.end = max(self.given, last_flat(latents, _STREAM_WINDOW, _STREAM_STD))
        return self.end
