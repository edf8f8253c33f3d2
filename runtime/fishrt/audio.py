"""Audio files in and out, and resampling. Samples are float32, mono, −1..1."""

from __future__ import annotations

import io
import os
import secrets
import sys
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import soundfile
import soxr

from .errors import AudioError

Pcm = npt.NDArray[np.float32]

FORMATS = {
    ".wav": ("WAV", "PCM_16"),
    ".flac": ("FLAC", "PCM_16"),
    ".ogg": ("OGG", "VORBIS"),
    ".mp3": ("MP3", "MPEG_LAYER_III"),
}
"""Suffix → libsndfile's names of format and encoding."""

_BLOCK = 1 << 16
"""Samples given to an encoder at once. libsndfile keeps a whole write of Vorbis on the stack, and a long one overflows it."""


def read_audio(source: str | Path | BinaryIO) -> tuple[Pcm, int]:
    """An audio file, or an open one, as (pcm float32 [samples], rate in Hz); the channels are averaged.

    Reads what libsndfile reads: wav, flac, ogg, mp3, aiff, …
    Raises AudioError if it cannot be read, has no samples, or has samples that are not numbers.
    """
    name = "the audio" if not isinstance(source, (str, Path)) else str(source)
    try:
        if isinstance(source, (str, Path)):
            with Path(source).open("rb") as file:
                samples, rate = soundfile.read(file, dtype="float32", always_2d=True)
        else:
            samples, rate = soundfile.read(source, dtype="float32", always_2d=True)
    except OSError as error:
        raise AudioError(f"{name} cannot be read: {error.strerror or error}") from None
    except (soundfile.SoundFileError, ValueError, TypeError) as error:
        raise AudioError(f"{name} is not audio that can be read: {error}", hint="convert it to wav, flac, ogg or mp3") from None
    if samples.size == 0:
        raise AudioError(f"{name} has no samples")
    if not np.isfinite(samples).all():
        raise AudioError(f"{name} has samples that are not numbers", hint="record or convert it again")
    return samples.mean(axis=1, dtype=np.float32), int(rate)


def resample(pcm: Pcm, rate: int, target: int) -> Pcm:
    """pcm float32 [samples] from `rate` to `target` Hz. Raises AudioError for rates below 1 Hz, or when no sample is left."""
    if rate < 1 or target < 1:
        raise AudioError(f"cannot resample from {rate} Hz to {target} Hz")
    if rate == target:
        return pcm
    resampled: Pcm = soxr.resample(pcm, rate, target).astype(np.float32, copy=False)
    if len(resampled) == 0:
        raise AudioError(f"the audio is too short: {len(pcm)} samples at {rate} Hz")
    return resampled


def pcm16(pcm: Pcm) -> npt.NDArray[np.int16]:
    """Samples float32 −1..1 as int16, rounded; what lies outside is clipped to the nearest that fits."""
    scaled: Pcm = np.rint(pcm * np.float32(32768))
    return scaled.clip(-32768, 32767).astype(np.int16)


def write_audio(path: str | Path, pcm: Pcm, rate: int) -> None:
    """Writes pcm float32 [samples], `rate` in Hz, in the format that the suffix names; "-" is wav on standard output.

    A file appears complete or not at all. Raises AudioError for an unknown suffix or a place that cannot be written.
    """
    if str(path) == "-":
        sys.stdout.buffer.write(_encoded(pcm, rate, ".wav"))
        sys.stdout.buffer.flush()
        return
    target = Path(path)
    check_writable(target)
    data = _encoded(pcm, rate, target.suffix.lower())
    target = target.resolve()  # a link stays a link
    try:
        if target.exists() and not target.is_file():  # a device or a pipe cannot be replaced
            target.write_bytes(data)
            return
        aside = target.with_name(f".{secrets.token_hex(8)}.part")
        try:
            aside.write_bytes(data)
            aside.replace(target)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as error:
        raise AudioError(f"cannot write {path}: {error.strerror or error}") from None


def check_writable(path: Path) -> None:
    """To be called before long work. Raises AudioError for an unknown suffix, or a folder that is missing or not writable."""
    if path.suffix.lower() not in FORMATS:
        raise AudioError(f"cannot write {path}: unknown format {path.suffix!r}", hint=f"known are {', '.join(FORMATS)}")
    if path.is_dir():
        raise AudioError(f"cannot write {path}: it is a folder")
    folder = path.resolve().parent
    if not folder.is_dir():
        raise AudioError(f"cannot write {path}: there is no folder {folder}", hint="create the folder first")
    if not os.access(folder, os.W_OK):
        raise AudioError(f"cannot write {path}: the folder {folder} cannot be written")


def _encoded(pcm: Pcm, rate: int, suffix: str) -> bytes:
    format_, encoding = FORMATS[suffix]
    samples = pcm16(pcm) if encoding == "PCM_16" else np.clip(pcm, -1, 1)
    buffer = io.BytesIO()
    try:
        with soundfile.SoundFile(buffer, "w", rate, 1, encoding, format=format_) as file:
            for start in range(0, len(samples), _BLOCK):
                file.write(samples[start : start + _BLOCK])
    except (soundfile.SoundFileError, ValueError) as error:
        raise AudioError(f"cannot write {suffix[1:]} at {rate} Hz: {error}", hint="choose another format") from None
    return buffer.getvalue()
