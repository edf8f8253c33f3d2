"""Writing of audio files: whole ones in several formats, and growing ones, wav or bare samples. Samples are float32, mono, −1..1.

Players can read a growing file before its length is known.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import soundfile

from ..arrays import Pcm
from ..errors import AudioError
from .output import check_place, growing, write_whole
from .resample import resample

_BLOCK = 1 << 16
"""Samples encoded at once. libsndfile puts a whole write of Vorbis on the stack, which a long one overflows."""
UNKNOWN = 0xFFFFFFFF
"""An unknown size in bytes: players read until the end. It is also the largest size that a wav header can state."""
_HEADER_BYTES = 44


@dataclass(frozen=True, slots=True)
class Format:
    """A kind of audio file."""

    suffixes: tuple[str, ...]
    container: str
    """libsndfile's name of the file format."""
    encoding: str
    """libsndfile's name of the sample encoding."""
    rates: tuple[int, ...] = ()
    """Sample rates in Hz that the format can hold, ascending; empty: any."""


FORMATS = {
    "wav": Format((".wav",), "WAV", "PCM_16"),
    "flac": Format((".flac",), "FLAC", "PCM_16"),
    "ogg": Format((".ogg",), "OGG", "VORBIS"),
    "opus": Format((".opus",), "OGG", "OPUS", (8000, 12000, 16000, 24000, 48000)),
    "mp3": Format((".mp3",), "MP3", "MPEG_LAYER_III", (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)),
    "pcm": Format((".pcm", ".raw"), "RAW", "PCM_16"),
}
"""Name → format. pcm is 16-bit little-endian samples without a header."""

_BY_SUFFIX = {suffix: name for name, kind in FORMATS.items() for suffix in kind.suffixes}


def audio_format(path: str | Path, format: str | None = None) -> str:
    """Return the name of the format for a file: `format`, else that of the file's ending; wav for standard output, "-".

    Raises AudioError for an unknown name or ending, and for two that disagree.
    """
    if format is not None and format not in FORMATS:
        raise AudioError(f"unknown format {format!r}", hint=f"known are {', '.join(FORMATS)}")
    if str(path) == "-":
        return format or "wav"
    ending = Path(path).suffix
    of_ending = _BY_SUFFIX.get(ending.lower())
    if format is None and of_ending is None:
        why = f"unknown format {ending!r}" if ending else "its name has no ending, which would name the format"
        raise AudioError(f"cannot write {path}: {why}", hint=f"end the name in {', '.join(_BY_SUFFIX)}, or give the format")
    if format is not None and of_ending not in (format, None):
        raise AudioError(
            f"cannot write {path}: its ending says {of_ending}, and {format} is asked for", hint="change one of them"
        )
    return format or of_ending or "wav"


def check_writable(path: str | Path, format: str | None = None) -> None:
    """Check before long work that audio can be written. Raises AudioError as `audio_format`, OutputError as `check_place`."""
    audio_format(path, format)
    check_place(path)


def write_audio(path: str | Path, pcm: Pcm, rate: int, format: str | None = None) -> None:
    """Write pcm float32 [samples], `rate` in Hz, to a file, or to standard output for "-"; for the format see `audio_format`.

    A file appears complete or not at all. Raises AudioError as `audio_format` and `encode_audio`, OutputError as `write_whole`.
    """
    check_writable(path, format)
    write_whole(path, encode_audio(pcm, rate, audio_format(path, format)))


def encode_audio(pcm: Pcm, rate: int, format: str) -> bytes:
    """Return pcm float32 [samples] at `rate` Hz as the bytes of a file in one of FORMATS.

    A format that cannot hold the rate gets the next higher rate that it can hold, or its highest. Raises AudioError for a rate
    that no encoder takes.
    """
    kind = FORMATS[format]
    if kind.rates and rate not in kind.rates:
        target = next((r for r in kind.rates if r > rate), kind.rates[-1])
        pcm, rate = resample(pcm, rate, target), target
    samples = pcm16(pcm) if kind.encoding == "PCM_16" else np.clip(pcm, -1, 1)
    buffer = io.BytesIO()
    endian = "LITTLE" if kind.container == "RAW" else "FILE"
    try:
        with soundfile.SoundFile(buffer, "w", rate, 1, kind.encoding, endian, kind.container) as file:
            for start in range(0, len(samples), _BLOCK):
                file.write(samples[start : start + _BLOCK])
    except (soundfile.SoundFileError, ValueError) as error:
        raise AudioError(f"cannot write {format} at {rate} Hz: {error}", hint="choose another format") from None
    return buffer.getvalue()


def pcm16(pcm: Pcm) -> npt.NDArray[np.int16]:
    """Return samples float32 −1..1 as int16, rounded; a sample outside that range is clipped."""
    scaled: Pcm = np.rint(pcm * np.float32(32768))
    return scaled.clip(-32768, 32767).astype(np.int16)


class WavWriter:
    """A writer of 16-bit mono wav, or of the samples alone, to a file that is open for writing."""

    def __init__(self, file: BinaryIO, rate: int, *, header: bool = True) -> None:
        """Write the header, with an unknown length. rate: Hz. header: whether there is a header."""
        self._file, self._rate, self._header, self._bytes = file, rate, header, 0
        self._write_header(UNKNOWN)

    def write(self, pcm: Pcm) -> None:
        """Write pcm float32 [samples], −1..1, and flush it; a sample outside is clipped."""
        data = pcm16(pcm).astype("<i2", copy=False).tobytes()
        self._bytes += len(data)
        self._file.write(data)
        self._file.flush()

    def finish(self) -> None:
        """Write the length into the header, in a seekable file."""
        self._file.seek(0)
        self._write_header(self._bytes)

    def _write_header(self, size: int) -> None:
        if not self._header:
            return
        whole = min(size + _HEADER_BYTES - 8, UNKNOWN)
        riff = struct.pack("<4sI4s", b"RIFF", whole, b"WAVE")
        form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, self._rate, 2 * self._rate, 2, 16)
        self._file.write(riff + form + struct.pack("<4sI", b"data", min(size, UNKNOWN)))
        self._file.flush()


@contextmanager
def growing_wav(path: str | Path, rate: int, format: str | None = None) -> Iterator[WavWriter]:
    """Open a file of format wav or pcm that appears when the block ends without an error.

    Standard output, "-", a pipe and a device get the samples at once; the length in their wav header is unknown. Raises
    OutputError and BrokenPipeError as `growing` does.
    """
    with growing(path) as (file, changeable):
        writer = WavWriter(file, rate, header=audio_format(path, format) == "wav")
        yield writer
        if changeable:
            writer.finish()


def check_growing_wav(path: str | Path, format: str | None = None) -> None:
    """Check a place before long work. Raises AudioError for a format that cannot grow, OutputError as `check_place` does."""
    if (name := audio_format(path, format)) not in ("wav", "pcm"):
        raise AudioError(f"cannot write {path} bit by bit: {name} cannot grow", hint="use wav or pcm")
    check_place(path)
