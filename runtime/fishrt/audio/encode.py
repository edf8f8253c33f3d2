"""Writing of audio files: whole ones, and growing ones, which can be played before their end. Samples: float32, mono, −1..1."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile

from ..arrays import Pcm
from ..errors import AudioError
from .encoders import Encoder, open_encoder, pcm16
from .formats import FORMATS, audio_format, next_rate
from .output import check_place, growing, write_whole
from .resample import resample

_BLOCK = 1 << 16
"""Samples encoded at once. libsndfile puts a whole write of Vorbis on the stack, which a long one overflows."""


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


def encode_audio(pcm: Pcm, rate: int, format: str, comment: str = "") -> bytes:
    """Return pcm float32 [samples] at `rate` Hz as the bytes of a file in one of FORMATS. comment: its tag, if it can have one.

    A format that cannot hold the rate gets the next higher rate that it can hold, or its highest. Raises AudioError for a rate
    that no encoder takes, and for aac without PyAV.
    """
    kind = FORMATS[format]
    if not kind.container:
        encoder = open_encoder(format, rate)
        return encoder.push(pcm) + encoder.finish()
    target = next_rate(kind.rates, rate)
    pcm, rate = resample(pcm, rate, target), target
    samples = pcm16(pcm) if kind.encoding == "PCM_16" else np.clip(pcm, -1, 1)
    buffer = io.BytesIO()
    endian = "LITTLE" if kind.container == "RAW" else "FILE"
    try:
        with soundfile.SoundFile(buffer, "w", rate, 1, kind.encoding, endian, kind.container) as file:
            if comment:
                file.comment = comment
            for start in range(0, len(samples), _BLOCK):
                file.write(samples[start : start + _BLOCK])
    except (soundfile.SoundFileError, ValueError) as error:
        raise AudioError(f"cannot write {format} at {rate} Hz: {error}", hint="choose another format") from None
    return buffer.getvalue()


class GrowingFile:
    """A writer of an audio file that is open for writing, bit by bit."""

    def __init__(self, file: BinaryIO, encoder: Encoder) -> None:
        """Write the beginning that needs no samples, such as a wav header with an unknown length."""
        self._file, self._encoder = file, encoder
        self._write(encoder.push(np.empty(0, np.float32)))

    def write(self, pcm: Pcm) -> None:
        """Write pcm float32 [samples], −1..1, and flush it; a sample outside is clipped."""
        self._write(self._encoder.push(pcm))

    def finish(self, *, changeable: bool) -> None:
        """Write the rest. changeable: whether the header can still be changed, and so gets the length."""
        self._write(self._encoder.finish())
        if changeable and (header := self._encoder.header):
            self._file.seek(0)
            self._write(header)

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._file.flush()


@contextmanager
def growing_audio(path: str | Path, rate: int, format: str | None = None) -> Iterator[GrowingFile]:
    """Open a file that appears when the block ends without an error, for sound of `rate` Hz that is encoded as it comes.

    Standard output, "-", a pipe and a device get the bytes at once; the length in their header is unknown. Raises AudioError as
    `open_encoder`, OutputError and BrokenPipeError as `growing`.
    """
    with growing(path) as (file, changeable):
        writer = GrowingFile(file, open_encoder(audio_format(path, format), rate))
        yield writer
        writer.finish(changeable=changeable)


def check_growing(path: str | Path, format: str | None = None) -> None:
    """Check a place before long work. Raises AudioError as `audio_format` and `open_encoder`, OutputError as `check_place`."""
    open_encoder(audio_format(path, format), 48000)
    check_place(path)
