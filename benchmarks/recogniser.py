"""Speech recognition by pocketsphinx, with the acoustic and language models of its package."""

from __future__ import annotations

import numpy as np
import soxr
from pocketsphinx import Decoder

SAMPLE_RATE = 16_000


class Recogniser:
    """A recogniser of single utterances."""

    def __init__(self) -> None:
        self._decoder = Decoder(loglevel="FATAL", samprate=SAMPLE_RATE)

    def __call__(self, pcm: np.ndarray, sample_rate: int) -> str:
        """Return lower-case words. pcm: float32 [samples], −1..1, mono. sample_rate: Hz."""
        heard = soxr.resample(pcm, sample_rate, SAMPLE_RATE)
        self._decoder.start_utt()
        self._decoder.process_raw((np.clip(heard, -1, 1) * 32767).astype(np.int16).tobytes(), full_utt=True)
        self._decoder.end_utt()
        hypothesis = self._decoder.hyp()
        return hypothesis.hypstr if hypothesis else ""
