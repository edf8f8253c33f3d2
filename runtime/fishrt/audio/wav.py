"""Audio files that grow, wav or bare samples: players can read them before their length is known."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ..arrays import Pcm
from ..errors import AudioError
from .encode import audio_format, pcm16
from .output import check_place, growing

UNKNOWN = 0xFFFFFFFF
"""An unknown size in bytes: players read until the end. It is also the largest size that a wav header can state."""
_HEADER_BYTES = 44


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
