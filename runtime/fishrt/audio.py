"""Audio files in and out, and resampling. Samples are float32, mono, −1..1."""

from __future__ import annotations

import io
import math
from numbers import Integral
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import soundfile
from numpy.lib.stride_tricks import sliding_window_view

from .errors import AudioError
from .files import check_place, write_whole

Pcm = npt.NDArray[np.float32]

FORMATS = {
    "wav": ("WAV", "PCM_16"),
    "flac": ("FLAC", "PCM_16"),
    "ogg": ("OGG", "VORBIS"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
}
"""Format, which is also the ending of its files → libsndfile's names of format and encoding."""

MAX_SECONDS = 3600.0
"""Longest file that is read where the caller knows no limit of its own. An hour is 0.7 GB at 48 kHz; no codec takes as much."""

_BLOCK = 1 << 16
"""Samples resampled or encoded at once. libsndfile keeps a whole write of Vorbis on the stack, and a long one overflows it."""


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


def pcm16(pcm: Pcm) -> npt.NDArray[np.int16]:
    """Samples float32 −1..1 as int16, rounded; what lies outside is clipped to the nearest that fits."""
    scaled: Pcm = np.rint(pcm * np.float32(32768))
    return scaled.clip(-32768, 32767).astype(np.int16)


def write_audio(path: str | Path, pcm: Pcm, rate: int, format: str | None = None) -> None:
    """Write pcm float32 [samples], `rate` in Hz, to a file, or to standard output for "-".

    format: one of FORMATS; None means the one that the ending of the path names, and wav for "-".
    A file appears complete or not at all. Raises AudioError as `audio_format` does, and for a rate that the format does not
    have; OutputError as `write_whole` does.
    """
    chosen = audio_format(path, format)
    if str(path) != "-":
        check_place(Path(path))
    write_whole(path, encode_audio(pcm, rate, chosen))


def audio_format(path: str | Path, format: str | None = None) -> str:
    """Return the format in which `path` is written: one of FORMATS. Raises AudioError for a format or an ending of no format."""
    if format is not None:
        if format not in FORMATS:
            raise AudioError(f"unknown format {format!r}", hint=f"known are {', '.join(FORMATS)}")
        return format
    if str(path) == "-":
        return "wav"
    ending = Path(path).suffix
    if ending.lower().removeprefix(".") not in FORMATS:
        why = f"unknown format {ending!r}" if ending else "its name has no ending, which would name the format"
        raise AudioError(f"cannot write {path}: {why}", hint=f"known are {', '.join(f'.{name}' for name in FORMATS)}")
    return ending.lower().removeprefix(".")


def check_writable(path: Path, format: str | None = None) -> None:
    """Check a place for audio before long work. Raises AudioError as `audio_format` does, OutputError as `check_place` does."""
    audio_format(path, format)
    check_place(path)


def encode_audio(pcm: Pcm, rate: int, format: str) -> bytes:
    """Return the bytes of an audio file. Raises AudioError for a rate that the format does not have."""
    container, encoding = FORMATS[format]
    samples = pcm16(pcm) if encoding == "PCM_16" else np.clip(pcm, -1, 1)
    buffer = io.BytesIO()
    try:
        with soundfile.SoundFile(buffer, "w", rate, 1, encoding, format=container) as file:
            for start in range(0, len(samples), _BLOCK):
                file.write(samples[start : start + _BLOCK])
    except (soundfile.SoundFileError, ValueError) as error:
        raise AudioError(f"cannot write {format} at {rate} Hz: {error}", hint="choose another format") from None
    return buffer.getvalue()
