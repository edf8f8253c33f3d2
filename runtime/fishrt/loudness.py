"""Loudness of speech, and the gain that gives all voices the same.

By ITU-R BS.1770-5 for one channel: the signal is K-weighted, and the mean square of 400 ms blocks is gated, first at −70 LUFS,
then 10 LU below the mean of what is left. The recommendation lists its two filters for 48 kHz. The analogue parameters behind
them, from which they follow for any rate by the bilinear transform, are those of De Man, "Evaluation of Implementations of the
EBU R128 Loudness Measurement" (AES 145, 2018).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from .codec import CodecDecoder
from .features import Codec

Pcm = npt.NDArray[np.float32]
_Response = npt.NDArray[np.complex128]

TARGET_LUFS = -20.0
"""Of speech in any voice of one speaker."""
MOST_GAIN = 4.0
"""A quieter voice than 12 dB below the target stays quieter: what is raised further is mostly noise."""
MOST_PEAK = 0.7
"""What the loudest sample of a voice may be raised to: its speech may have louder ones."""
SECONDS = 5.0
"""Of a voice, decoded, in which its loudness is measured."""

_BLOCK_S, _STEP_S = 0.4, 0.1
_SILENT_LUFS, _RELATIVE_LU = -70.0, -10.0
_SHELF_HZ, _SHELF_DB, _SHELF_Q = 1681.9744509555319, 3.99984385397, 0.7071752369554193
_HIGH_PASS_HZ, _HIGH_PASS_Q = 38.13547087613982, 0.5003270373253953
_RING_S = 0.5
"""After so long the filters' response is below −120 dB."""


@dataclass(frozen=True, slots=True)
class Loudness:
    """How loud a voice is."""

    lufs: float
    """Integrated loudness."""
    peak: float
    """The largest sample, above 0."""

    @property
    def gain(self) -> float:
        """Return the factor for speech in this voice: to TARGET_LUFS, as far as MOST_GAIN and MOST_PEAK allow."""
        wanted = 10 ** ((TARGET_LUFS - self.lufs) / 20)
        return min(wanted, MOST_GAIN, max(1.0, MOST_PEAK / self.peak))


def voice_loudness(decoder: CodecDecoder, codes: npt.NDArray[np.int64], codec: Codec) -> Loudness | None:
    """Return the loudness of a voice as the codec speaks it, in its first seconds; None for silence.

    codes: int64 [num_codebooks or fewer, frames]. Speech in a voice is as loud as this within 1 dB, measured on minnow's.
    """
    frames = max(1, round(SECONDS * codec.frame_rate))
    return measure(decoder.decode(codes[:, :frames]), codec.sample_rate)


def measure(pcm: Pcm, rate: int) -> Loudness | None:
    """Return the loudness of pcm float32 [samples] at `rate` Hz; None for silence, and for less than 400 ms."""
    block, step = round(_BLOCK_S * rate), round(_STEP_S * rate)
    if len(pcm) < block:
        return None
    squares = np.square(_k_weighted(pcm, rate))
    power = sliding_window_view(squares, block)[::step].mean(axis=1)
    loud = power[_lufs(power) > _SILENT_LUFS]
    if not loud.size:
        return None
    kept = loud[_lufs(loud) > _lufs(loud.mean()) + _RELATIVE_LU]
    return Loudness(float(_lufs(kept.mean())), float(np.abs(pcm).max()))


def _lufs(power: npt.NDArray[np.float64] | np.float64) -> npt.NDArray[np.float64]:
    return -0.691 + 10 * np.log10(np.maximum(power, 1e-12))


def _k_weighted(pcm: Pcm, rate: int) -> npt.NDArray[np.float64]:
    """Filter by multiplying spectra, with room for the filters to ring: as exact as recursion, and fast without a library."""
    room = len(pcm) + math.ceil(_RING_S * rate)
    z = np.exp(-2j * np.pi * np.fft.rfftfreq(room))
    response = _shelf(z, rate) * _high_pass(z, rate)
    filtered: npt.NDArray[np.float64] = np.fft.irfft(np.fft.rfft(pcm.astype(np.float64), room) * response, room)
    return filtered[: len(pcm)]


def _shelf(z: _Response, rate: int) -> _Response:
    """Stage 1, the effect of the head; z is the unit delay."""
    k, high = math.tan(math.pi * _SHELF_HZ / rate), 10 ** (_SHELF_DB / 20)
    middle = high**0.4996667741545416
    slope = middle * k / _SHELF_Q
    above: _Response = (high + slope + k * k) + 2 * (k * k - high) * z + (high - slope + k * k) * z * z
    return above / _denominator(z, k, _SHELF_Q)


def _high_pass(z: _Response, rate: int) -> _Response:
    """Stage 2, the revised low-frequency B curve; its numerator is 1, −2, 1 at any rate."""
    k = math.tan(math.pi * _HIGH_PASS_HZ / rate)
    return (1 - z) ** 2 / _denominator(z, k, _HIGH_PASS_Q) * (1 + k / _HIGH_PASS_Q + k * k)


def _denominator(z: _Response, k: float, q: float) -> _Response:
    return (1 + k / q + k * k) + 2 * (k * k - 1) * z + (1 - k / q + k * k) * z * z
