"""Audio files in, and resampling; `encode.py` writes them. Samples are float32, mono, −1..1."""

from __future__ import annotations

import math
from numbers import Integral
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import soundfile
from numpy.lib.stride_tricks import sliding_window_view

from .errors import AudioError

Pcm = npt.NDArray[np.float32]

MAX_SECONDS = 3600.0
"""Longest file that is read where the caller knows no limit of its own. An hour is 0.7 GB at 48 kHz; no codec takes as much."""

_BLOCK = 1 << 16
"""Samples resampled at once."""


def read_audio(source: str | Path | BinaryIO, *, max_seconds: float = MAX_SECONDS) -> tuple[Pcm, int]:
    """An audio file, or an open one, as (pcm float32 [samples], rate in Hz); the channels are averaged.

    Reads what libsndfile reads: wav, flac, ogg, mp3, aiff, …
    Raises AudioError if it cannot be read, has no samples, is longer than `max_seconds` or than memory allows, or has samples
    that are not numbers. The length is checked before anything is decoded.
    """
    name = "the audio" if not isinstance(source, (str, Path)) else str(source)
    try:
        if isinstance(source, (str, Path)):
            with Path(source).open("rb") as file:
                samples, rate = _decoded(file, max_seconds, name)
        else:
            samples, rate = _decoded(source, max_seconds, name)
        pcm: Pcm = samples.mean(axis=1, dtype=np.float32)
    except MemoryError:
        raise AudioError(f"{name} is too long for the memory of this machine", hint="cut it into shorter parts") from None
    except OSError as error:
        raise AudioError(f"{name} cannot be read: {error.strerror or error}") from None
    except (soundfile.SoundFileError, ValueError, TypeError) as error:
        raise AudioError(f"{name} is not audio that can be read: {error}", hint="convert it to wav, flac, ogg or mp3") from None
    if samples.size == 0:
        raise AudioError(f"{name} has no samples")
    if not np.isfinite(pcm).all():
        raise AudioError(f"{name} has samples that are not numbers", hint="record or convert it again")
    return pcm, rate


def _decoded(file: BinaryIO, max_seconds: float, name: str) -> tuple[Pcm, int]:
    """All samples, float32 [samples, channels], and the rate."""
    with soundfile.SoundFile(file) as sound:
        if (seconds := sound.frames / sound.samplerate) > max_seconds:
            raise AudioError(
                f"{name} is too long: {seconds:,.1f} s; at most {max_seconds:,.1f} s can be used",
                hint="cut it into shorter parts",
            )
        return sound.read(dtype="float32", always_2d=True), int(sound.samplerate)


def check_pcm(pcm: Pcm, rate: int) -> None:
    """Raises AudioError unless this is audio: an array of floats [samples], and a whole number of Hz."""
    if not isinstance(pcm, np.ndarray) or pcm.ndim != 1 or not np.issubdtype(pcm.dtype, np.floating):
        found = f"{pcm.dtype} {list(pcm.shape)}" if isinstance(pcm, np.ndarray) else f"a {type(pcm).__name__}"
        raise AudioError(f"audio is {found}; an array of floats [samples], mono, is expected")
    if not isinstance(rate, Integral) or rate < 1:
        raise AudioError(f"the rate is {rate!r}; a whole number of Hz above 0 is expected")


def resample(pcm: Pcm, rate: int, target: int) -> Pcm:
    """pcm float32 [samples] at `rate` Hz → float32 [⌈samples · target / rate⌉]. Raises AudioError for rates below 1 Hz.

    By a sinc with 6 zero crossings on each side under a Hann window, cut off at 0.99 of the lower rate. So do the originals, and
    the codes of a recording depend on it.
    """
    if rate < 1 or target < 1:
        raise AudioError(f"cannot resample from {rate} Hz to {target} Hz")
    if rate == target:
        return pcm
    common = math.gcd(rate, target)
    old, new = rate // common, target // common
    scale = 0.99 * min(old, new) / old
    reach = math.ceil(6 / scale)
    count = -(-len(pcm) * new // old)
    # Sample j stands at j · old / new; where between two old samples that is repeats after `new` samples.
    phases = np.arange(min(new, count)) * old % new / new
    t = np.clip((np.arange(-reach, reach + 2) - phases[:, None]) * scale, -6, 6)
    kernels = (np.sinc(t) * np.cos(np.pi * t / 12) ** 2 * scale).astype(np.float32)
    around = sliding_window_view(np.pad(pcm, (reach, reach + 2)), kernels.shape[1])
    resampled = np.empty(count, np.float32)
    for start in range(0, count, _BLOCK):
        j = np.arange(start, min(start + _BLOCK, count))
        resampled[j] = np.einsum("jk,jk->j", around[j * old // new], kernels[j % new])
    return resampled
