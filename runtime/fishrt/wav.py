"""Wav files that grow: what is written can be played at once, before anybody knows how long it will be."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from .audio import Pcm, pcm16
from .errors import AudioError
from .files import check_place, growing

UNKNOWN = 0xFFFFFFFF
"""In place of a size in bytes: players read on until the end. It is also the most that a wav file can tell."""
_HEADER_BYTES = 44


class WavWriter:
    """16-bit mono wav, to a file that is open for writing."""

    def __init__(self, file: BinaryIO, rate: int) -> None:
        """rate: Hz. Writes the header, with an unknown length."""
        self._file, self._rate, self._bytes = file, rate, 0
        self._write_header(UNKNOWN)

    def write(self, pcm: Pcm) -> None:
        """pcm float32 [samples], −1..1; what lies outside is clipped. It reaches the reader at once."""
        data = pcm16(pcm).astype("<i2", copy=False).tobytes()
        self._bytes += len(data)
        self._file.write(data)
        self._file.flush()

    def finish(self) -> None:
        """Writes the length into the header of a file that can be changed."""
        self._file.seek(0)
        self._write_header(self._bytes)

    def _write_header(self, size: int) -> None:
        whole = min(size + _HEADER_BYTES - 8, UNKNOWN)
        riff = struct.pack("<4sI4s", b"RIFF", whole, b"WAVE")
        form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, self._rate, 2 * self._rate, 2, 16)
        self._file.write(riff + form + struct.pack("<4sI", b"data", min(size, UNKNOWN)))
        self._file.flush()


@contextmanager
def growing_wav(path: str | Path, rate: int) -> Iterator[WavWriter]:
    """A wav file that appears when the block ends without an error; or standard output for "-", a pipe or a device, where the
    header tells no length. Raises OutputError and BrokenPipeError as `growing` does."""
    with growing(path) as (file, changeable):
        writer = WavWriter(file, rate)
        yield writer
        if changeable:
            writer.finish()


def check_growing_wav(path: Path) -> None:
    """To be called before long work. Raises AudioError for a suffix of another format, OutputError as `check_place` does."""
    if path.suffix.lower() != ".wav":
        raise AudioError(f"cannot write {path} bit by bit: only wav can grow", hint="name a file that ends in .wav, or -")
    check_place(path)
