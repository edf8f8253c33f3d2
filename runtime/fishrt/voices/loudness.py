"""Loudness of speech, and the gain that brings all voices to the same loudness.

It follows ITU-R BS.1770-5 for one channel: the signal is K-weighted, and the mean square of 400 ms blocks is gated, first at −70
LUFS, then 10 LU below the mean of the rest. The recommendation lists its two filters for 48 kHz only. Here the bilinear transform
gives them for any rate, from the analogue parameters in De Man, "Evaluation of Implementations of the EBU R128 Loudness
Measurement" (AES 145, 2018).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from ..arrays import Pcm, Sound
from ..bundle.features import Codec
from ..codec import CodecDecoder, part

_Response = npt.NDArray[np.complex128]

TARGET_LUFS = -20.0
"""Loudness of all speech of one voice."""
MOST_GAIN = 4.0
"""Largest gain, 12 dB: more would mostly raise noise, so that a quieter voice stays quieter."""
MOST_PEAK = 0.7
"""Largest sample that a gain above 1 may give a voice: its speech may have louder samples."""
SECONDS = 5.0
"""Seconds of a decoded voice in which its loudness is measured."""

_MOST_LUFS = 200.0
_BLOCK_S, _STEP_S = 0.4, 0.1
_SILENT_LUFS, _RELATIVE_LU = -70.0, -10.0
_SHELF_HZ, _SHELF_DB, _SHELF_Q = 1681.9744509555319, 3.99984385397, 0.7071752369554193
_HIGH_PASS_HZ, _HIGH_PASS_Q = 38.13547087613982, 0.5003270373253953
_RING_S = 0.5
"""Seconds after which the filters' impulse response is below −120 dB."""


@dataclass(frozen=True, slots=True)
class Loudness:
    """The loudness of a voice."""

    lufs: float
    """Integrated loudness."""
    peak: float
    """The largest sample, above 0."""

    @property
    def possible(self) -> bool:
        """Return whether `measure` can have given this."""
        return abs(self.lufs) < _MOST_LUFS and self.peak > 0

    @property
    def gain(self) -> float:
        """Factor on speech in this voice: brings it to TARGET_LUFS, as far as MOST_GAIN and MOST_PEAK allow."""
        wanted = 10 ** ((TARGET_LUFS - self.lufs) / 20)
        return min(wanted, MOST_GAIN, max(1.0, MOST_PEAK / self.peak))


def voice_loudness(decoder: CodecDecoder, sound: Sound, codec: Codec) -> Loudness | None:
    """Return the loudness of a voice as the codec speaks it, in its first seconds; None for silence.

    sound: codes int64 [num_codebooks or fewer, frames], or latents. Speech in minnow's voices had this loudness within 1 dB.
    """
    frames = max(1, round(SECONDS * codec.frame_rate))
    return measure(decoder.decode(part(sound, 0, frames)), codec.sample_rate)


def measure(pcm: Pcm, rate: int) -> Loudness | None:
    """Return the loudness of pcm float32 [samples] at `rate` Hz; None for silence, for less than 400 ms, and below 6 Hz."""
    block, step = round(_BLOCK_S * rate), round(_STEP_S * rate)
    if len(pcm) < block or not step:
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
    """Return the K-weighted samples, by a product of spectra with room for the filters to ring: exact as recursion, and fast."""
    room = len(pcm) + math.ceil(_RING_S * rate)
    z = np.exp(-2j * np.pi * np.fft.rfftfreq(room))
    response = _shelf(z, rate) * _high_pass(z, rate)
    filtered: npt.NDArray[np.float64] = np.fft.irfft(np.fft.rfft(pcm.astype(np.float64), room) * response, room)
    return filtered[: len(pcm)]


def _shelf(z: _Response, rate: int) -> _Response:
    """Return the response of stage 1, the effect of the head. z: the unit delay."""
    k, high = math.tan(math.pi * _SHELF_HZ / rate), 10 ** (_SHELF_DB / 20)
    middle = high**0.4996667741545416
    slope = middle * k / _SHELF_Q
    above: _Response = (high + slope + k * k) + 2 * (k * k - high) * z + (high - slope + k * k) * z * z
    return above / _denominator(z, k, _SHELF_Q)


def _high_pass(z: _Response, rate: int) -> _Response:
    """Return the response of stage 2, the revised low-frequency B curve; its numerator is 1, −2, 1 at any rate."""
    k = math.tan(math.pi * _HIGH_PASS_HZ / rate)
    return (1 - z) ** 2 / _denominator(z, k, _HIGH_PASS_Q) * (1 + k / _HIGH_PASS_Q + k * k)


def _denominator(z: _Response, k: float, q: float) -> _Response:
    return (1 + k / q + k * k) + 2 * (k * k - 1) * z + (1 - k / q + k * k) * z * z
