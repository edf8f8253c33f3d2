"""Measures of speech quality: words that a recogniser understands, and voices; those of speed are in `fishrt.metrics`.

Speech is recognised by pocketsphinx, with the acoustic and language models of its package.
"""

from __future__ import annotations

import re

import numpy as np
import soxr
from pocketsphinx import Decoder

SAMPLE_RATE = 16_000
"""Hz of what pocketsphinx hears."""


def words(text: str) -> list[str]:
    """Return lower-case words. A hyphen separates words; other punctuation except the apostrophe is removed."""
    return re.sub(r"[^a-z' ]", " ", text.lower().replace("-", " ")).split()


def word_errors(reference: str, heard: str) -> int:
    """Return the number of substitutions, insertions and deletions between two texts (Levenshtein distance over words)."""
    wanted, got = words(reference), words(heard)
    row = list(range(len(got) + 1))
    for i, want in enumerate(wanted, start=1):
        previous, row[0] = row[:], i
        for j, have in enumerate(got, start=1):
            row[j] = min(previous[j] + 1, row[j - 1] + 1, previous[j - 1] + (want != have))
    return row[-1]


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


def mfcc_summary(pcm: np.ndarray, sample_rate: int) -> np.ndarray:
    """Return mean and deviation over time of 19 MFCCs of the louder frames: float64 [38]. pcm: float [samples]."""
    size, hop, bands = 512, 160, 32
    frames = np.lib.stride_tricks.sliding_window_view(pcm.astype(np.float64), size)[::hop] * np.hanning(size)
    power = np.abs(np.fft.rfft(frames)) ** 2
    hertz = np.linspace(0, sample_rate / 2, size // 2 + 1)
    edges = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + sample_rate / 2 / 700), bands + 2) / 2595) - 1)
    rising = (hertz[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - hertz[:, None]) / (edges[2:] - edges[1:-1])
    mel = np.log(power @ np.clip(np.minimum(rising, falling), 0, None) + 1e-6)
    loud = power.sum(axis=1) > 0.01 * power.sum(axis=1).max()
    cosine = np.cos(np.pi / bands * (np.arange(bands)[:, None] + 0.5) * np.arange(1, 20))
    cepstra = mel[loud] @ cosine
    return np.concatenate((cepstra.mean(axis=0), cepstra.std(axis=0)))


class VoiceClassifier:
    """A classifier of known voices: nearest class mean under the pooled covariance of MFCC summaries."""

    def __init__(self, examples: dict[str, list[np.ndarray]]) -> None:
        """examples: MFCC summaries by voice."""
        self.names = list(examples)
        self.means = np.stack([np.mean(e, axis=0) for e in examples.values()])
        spread = np.concatenate([np.stack(e) - m for e, m in zip(examples.values(), self.means, strict=True)])
        covariance = spread.T @ spread / len(spread)
        self.precision = np.linalg.inv(covariance + 0.05 * np.diag(np.diag(covariance)))

    def __call__(self, summary: np.ndarray) -> str:
        """Return the name of the voice of an MFCC summary."""
        off = summary - self.means
        return self.names[int(np.argmin(np.einsum("vi,ij,vj->v", off, self.precision, off)))]
