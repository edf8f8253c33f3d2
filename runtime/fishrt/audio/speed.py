"""Another speed of speech without another pitch, while it comes: ffmpeg's filter atempo, through PyAV."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..arrays import Pcm
from ..errors import AudioError
from .pyav import pyav

SLOWEST, FASTEST = 0.25, 4.0
"""Limits of the speed: a factor; 2 takes half the time."""
_BLOCK = 512
"""Samples that the filter gets at once. Its result depends on that, so it is always the same number."""
_LEAST = 0.5
"""Least speed of one atempo filter."""


class Stretcher:
    """Sound that is pushed in parts of any size and comes back at another speed, with the same pitch.

    All parts together are the result for the whole sound, ⌊samples / speed + ½⌋ samples. The result comes about 0.1 s of sound
    later than it is pushed. Speed 1 changes nothing and delays nothing.
    """

    def __init__(self, rate: int, speed: float) -> None:
        """Prepare for sound of `rate` Hz. Raises AudioError for a speed outside the limits, or if PyAV is not installed."""
        if not SLOWEST <= speed <= FASTEST:
            raise AudioError(f"the speed is {speed:g}; {SLOWEST:g} to {FASTEST:g} is possible")
        self._rate, self._speed = rate, speed
        self._waiting = np.empty(0, np.float32)
        self._pushed = self._given = 0
        self._graph: Any = None
        if speed != 1:
            self._av = pyav("another speed")
            self._graph = self._filters()

    def push(self, pcm: Pcm) -> Pcm:
        """Take pcm float32 [samples]; return the samples that are ready, float32, possibly none."""
        if self._graph is None:
            return pcm
        self._pushed += len(pcm)
        self._waiting = np.concatenate([self._waiting, pcm])
        whole = len(self._waiting) // _BLOCK * _BLOCK
        ready, self._waiting = self._waiting[:whole], self._waiting[whole:]
        return self._limited([self._filtered(ready[at : at + _BLOCK]) for at in range(0, whole, _BLOCK)])

    def finish(self) -> Pcm:
        """Return the rest, float32 [samples]. Nothing can be pushed after it."""
        if self._graph is None:
            return np.empty(0, np.float32)
        # The filter drops what fills no window at the end, so silence follows the sound until all of it is out.
        blocks = [np.pad(self._waiting, (0, _BLOCK - len(self._waiting)))]
        parts: list[Pcm] = []
        while self._given + sum(map(len, parts)) < self._length:
            parts.append(self._filtered(blocks.pop() if blocks else np.zeros(_BLOCK, np.float32)))
        return self._limited(parts)

    @property
    def _length(self) -> int:
        """Samples of the result for what has been pushed."""
        return int(self._pushed / self._speed + 0.5)

    def _limited(self, parts: list[Pcm]) -> Pcm:
        pcm: Pcm = np.concatenate([np.empty(0, np.float32), *parts])[: self._length - self._given]
        self._given += len(pcm)
        return pcm

    def _filters(self) -> Any:
        from fractions import Fraction  # takes 2 ms with its own imports, and speech of speed 1 needs no filter

        graph = self._av.filter.Graph()
        graph.threads = 1
        last = graph.add_abuffer(sample_rate=self._rate, format="flt", layout="mono", time_base=Fraction(1, self._rate))
        for factor in (self._speed,) if self._speed >= _LEAST else (_LEAST, self._speed / _LEAST):
            filter_ = graph.add("atempo", repr(factor))
            last.link_to(filter_)
            last = filter_
        last.link_to(graph.add("abuffersink"))
        graph.configure()
        return graph

    def _filtered(self, block: Pcm) -> Pcm:
        """Push a block [_BLOCK] through the filters and return what they have ready."""
        frame = self._av.AudioFrame.from_ndarray(block[None], format="flt", layout="mono")
        frame.sample_rate = self._rate
        self._graph.push(frame)
        parts = [np.empty(0, np.float32)]
        while True:
            try:
                parts.append(self._graph.pull().to_ndarray().ravel())
            except self._av.error.BlockingIOError:
                return np.concatenate(parts)
