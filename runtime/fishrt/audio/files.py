"""Reading of audio files; `encode.py` writes them. Samples are float32, mono, −1..1."""

from __future__ import annotations

import io
import logging
import mmap
import stat
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import replace
from numbers import Integral
from os import fstat
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile

from ..arrays import Pcm
from ..errors import AudioError
from .containers import Stated, after_id3, forget_length, split_joined, stated_length, take_mp3_count
from .unpack import demuxer_of, unpacked

log = logging.getLogger(__name__)

MAX_SECONDS = 3600.0
"""Longest file that is read if the caller gives no limit. An hour is 0.7 GB at 48 kHz; no codec takes as much."""
MAX_RATE = 768_000
"""Highest rate in Hz that is read: it bounds the samples of a second, and no recording has a higher one."""
MAX_PIPED_BYTES = 1 << 30
"""Most that is read from a pipe, which may never end."""
MOST_SAMPLE = 8.0
"""Samples beyond this have another scale: float files with loud peaks stay below, integers stored as floats do not."""

_LOST_S = 0.1
"""Seconds at the end that a file may lack: no word is as short."""
_BLOCK = 1 << 16
"""Samples of all channels decoded at once."""
_MP3_BLOCK = 576
"""Fewest samples of an MP3 frame: a damaged frame does not take the frames before it with it."""
_MP3_DELAY = 1105
"""Samples by which most encoders (576) and all decoders (529) shift the sound."""
_MP3_QUIET = 0.03
"""Fraction of the loudest sample below which the first _MP3_DELAY samples are the encoder's delay, and not speech."""
_MP3_STRETCH = 64
"""Factor on the size that is reported to libsndfile. It guesses the length from the first frame's bit rate, and a frame of the
highest bit rate, 320 kbit/s, is 40 times as large as one of the lowest."""


def read_audio(source: str | Path | BinaryIO, *, max_seconds: float = MAX_SECONDS) -> tuple[Pcm, int]:
    """Return an audio file, or an open one, as (pcm float32 [samples], rate in Hz); the channels are averaged.

    The formats are those of libsndfile: wav, flac, ogg, mp3, aiff, …, and with PyAV m4a, webm, aac, wma, …; "-" is standard
    input. Files are read to their end, whatever length their headers state, and joined files are read one after the other. What a
    file unpacks to is bounded by `max_seconds`.
    Raises AudioError if it cannot be read, has no samples, is longer than `max_seconds` or than memory allows, has samples that
    are not numbers or are far outside −1..1, states an impossible rate, or joins files of different rates.
    """
    name = str(source) if isinstance(source, (str, Path)) else "the audio"
    if name == "-":
        name = "standard input"
    try:
        data = _bytes(source, name)
        if bytes(data[:6]) == b"\x93NUMPY":
            raise AudioError(f"{name} is an .npy array, not audio", hint="`fishrt codec decode` makes audio of codes")
        blocks, rates, samples = [], set(), 0
        for part in split_joined(data):
            with closing(_decoded(part, max_seconds, name)) as decoded:
                for block, rate in decoded:
                    if rate > MAX_RATE:
                        raise AudioError(f"{name} states a rate of {rate:,} Hz; at most {MAX_RATE:,} is possible")
                    blocks.append(block)
                    rates.add(rate)
                    if (samples := samples + len(block)) > max_seconds * rate:
                        raise AudioError(
                            f"{name} is too long: at most {max_seconds:,.1f} s can be used", hint="cut it into shorter parts"
                        )
        pcm: Pcm = np.concatenate(blocks) if blocks else np.empty(0, np.float32)
    except MemoryError:
        raise AudioError(f"{name} is too long for the memory of this machine", hint="cut it into shorter parts") from None
    except (OSError, ValueError) as error:
        raise AudioError(f"{name} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except soundfile.SoundFileError as error:
        raise AudioError(
            f"{name} is not audio that can be read: {_reason(error)}", hint="convert it to wav, flac, ogg or mp3"
        ) from None
    if not samples:
        raise AudioError(f"{name} has no samples")
    if len(rates) > 1:
        raise AudioError(
            f"{name} joins recordings of {' and '.join(f'{rate:,} Hz' for rate in sorted(rates))}",
            hint="convert them to one rate",
        )
    check_samples(pcm, name)
    return pcm, rates.pop()


def _bytes(source: str | Path | BinaryIO, name: str) -> memoryview:
    """Return a private copy of all bytes, memory-mapped if the source is a file. Raises AudioError, OSError."""
    if isinstance(source, (str, Path)):
        if str(source) != "-":
            with Path(source).open("rb") as file:
                status = fstat(file.fileno())
                if stat.S_ISREG(status.st_mode) and status.st_size:
                    return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
                return _bytes(file, name)
        if sys.stdin is None:
            raise AudioError("standard input is closed", hint="give a file")
        source = sys.stdin.buffer
    data = bytearray(source.read(MAX_PIPED_BYTES + 1))
    if len(data) > MAX_PIPED_BYTES:
        raise AudioError(f"{name} does not end: more than {MAX_PIPED_BYTES:,} bytes came", hint="give a shorter recording")
    if not data:
        raise AudioError(f"{name} is empty", hint="check that the right file was given")
    return memoryview(data)


class _File(io.RawIOBase):
    """A file of bytes for decoders, which may claim to be longer than it is."""

    def __init__(self, data: memoryview, size: int) -> None:
        self._data, self._size, self.position = data, size, 0

    def readable(self) -> bool:
        """See io.IOBase."""
        return True

    def seekable(self) -> bool:
        """See io.IOBase."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """See io.IOBase."""
        self.position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self._size}[whence]
        return self.position

    def tell(self) -> int:
        """See io.IOBase."""
        return self.position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """See io.RawIOBase. Reads zeros from the data to the claimed end, where libsndfile looks for a tag."""
        part = bytes(self._data[self.position : self.position + len(buffer)])
        if len(self._data) < self.position < self._size:
            part = bytes(len(buffer))
        buffer[: len(part)] = part
        self.position += len(part)
        return len(part)

    def ended(self) -> bool:
        """Return whether only zeros are left to read."""
        return not bytes(self._data[self.position :]).strip(b"\0")


class _Forward(soundfile.SoundFile):  # type: ignore[misc]
    """A SoundFile that never seeks: soundfile seeks after every read, which some encodings cannot do, or do wrongly."""

    def seekable(self) -> bool:
        """Return False."""
        return False


def _decoded(data: memoryview, max_seconds: float, name: str) -> Generator[tuple[Pcm, int], None, None]:
    """Yield blocks of one file, float32 [samples], channels averaged, each with the rate in Hz. May stop after `max_seconds`."""
    stated, samples = stated_length(data), 0
    data = forget_length(data)
    try:
        opened = _Forward(_File(data, len(data)))
    except soundfile.LibsndfileError:
        demuxer = demuxer_of(bytes(data[after_id3(data) :][:12]))
        if demuxer is None:
            raise
        yield from _unpacked(data, demuxer, stated, name)
        return
    with opened as sound:
        if sound.format != "MP3":
            for block in _blocks(sound, max(1, _BLOCK // sound.channels), name):
                samples += len(block)
                yield block, sound.samplerate
            _check_whole(samples, stated, sound.samplerate, name)
            return
    yield _mp3(data, max_seconds, name)


def _unpacked(data: memoryview, demuxer: str, stated: Stated, name: str) -> Iterator[tuple[Pcm, int]]:
    """Yield blocks of a file that libsndfile cannot read, as `_decoded` does."""
    samples = 0
    for block, rate, stated_s in unpacked(data, demuxer, name):
        samples += len(block)
        whole = replace(stated, samples=round(stated_s * rate))
        yield block, rate
    if samples:
        _check_whole(samples, whole, rate, name)


def _check_whole(samples: int, stated: Stated, rate: int, name: str) -> None:
    """Check that a file does not break off after so many samples. Raises AudioError; warns if that cannot be known."""
    seconds = samples / rate
    whole = stated.samples / rate or seconds / (stated.share or 1.0)
    if whole - seconds > _LOST_S or stated.cut:
        of = "" if stated.cut else f" of {whole:.1f}"
        raise AudioError(
            f"{name} breaks off after {seconds:.1f}{of} s", hint="copy or record it again; if it is whole, convert it to flac"
        )
    if not stated.ended:  # recorders that are stopped, and some that are not
        log.warning("%s has no mark of its end: it may break off after %.1f s", name, seconds)


def _blocks(sound: _Forward, size: int, name: str, ended: Callable[[], bool] = lambda: False) -> Iterator[Pcm]:
    """Yield blocks of at most `size` samples until the end. ended: whether an error only means that the file is cut off."""
    seconds = 0.0
    try:
        while len(block := sound.read(size, dtype="float32", always_2d=True)):
            seconds += len(block) / sound.samplerate
            yield block.mean(axis=1, dtype=np.float32)
    except soundfile.LibsndfileError as error:
        if not ended():
            raise AudioError(
                f"{name} is damaged {seconds:.1f} s from its start: {_reason(error)}", hint="record or convert it again"
            ) from None


def _mp3(data: memoryview, max_seconds: float, name: str) -> tuple[Pcm, int]:
    """Decode an MP3 file: without the encoder's silence at both ends if its header has a correct length, else to its end."""
    cleared = take_mp3_count(data)
    whole, rate = _mp3_frames(data, _MP3_STRETCH * len(data), max_seconds, name)
    if cleared is not None:
        count, place, kept = cleared
        stated = count * (1152 if rate >= 32000 else 576)  # samples in a frame of layer III, by MPEG version
        if len(whole) <= max_seconds * rate:
            _check_whole(len(whole), Stated(stated), rate, name)
        if stated >= len(whole):
            data[place] = kept
            return _mp3_frames(data, len(data), max_seconds, name)
    begins = whole[_MP3_DELAY:]
    quiet = begins.size and np.abs(whole[:_MP3_DELAY]).max() < _MP3_QUIET * np.abs(begins).max()
    return (begins if quiet else whole), rate


def _mp3_frames(data: memoryview, size: int, max_seconds: float, name: str) -> tuple[Pcm, int]:
    """Decode a file that claims to have `size` bytes; a last frame that is cut off is left out."""
    file, blocks, samples = _File(data, size), [np.empty(0, np.float32)], 0
    with _Forward(file) as sound:
        for block in _blocks(sound, _MP3_BLOCK, name, file.ended):
            blocks.append(block)
            if (samples := samples + len(block)) > (max_seconds + 1) * sound.samplerate:
                break
        return np.concatenate(blocks), sound.samplerate


def _reason(error: soundfile.SoundFileError) -> str:
    """Return libsndfile's message without the address of the opened object."""
    return str(getattr(error, "error_string", error)).removeprefix("Error : ").rstrip(".") or "it cannot be decoded"


def check_pcm(pcm: Pcm, rate: int, what: str = "the audio") -> None:
    """Check that this is audio: an array of floats [samples], −1..1, and a whole number of Hz. Raises AudioError."""
    if not isinstance(pcm, np.ndarray) or pcm.ndim != 1 or not np.issubdtype(pcm.dtype, np.floating):
        found = f"{pcm.dtype} {list(pcm.shape)}" if isinstance(pcm, np.ndarray) else f"a {type(pcm).__name__}"
        raise AudioError(f"audio is {found}; an array of floats [samples], mono, is expected")
    if not isinstance(rate, Integral) or rate < 1:
        raise AudioError(f"the rate is {rate!r}; a whole number of Hz above 0 is expected")
    check_samples(pcm, what)


def check_samples(pcm: Pcm, what: str) -> None:
    """Check the values of pcm float [samples]. Raises AudioError for samples that are not numbers or far outside −1..1."""
    if not np.isfinite(pcm).all():
        raise AudioError(f"{what} has samples that are not numbers", hint="record or convert it again")
    if pcm.size and (most := float(np.abs(pcm).max())) > MOST_SAMPLE:
        raise AudioError(
            f"the samples of {what} reach ±{most:,.0f}; −1 to 1 is expected", hint="divide integer samples by 32,768 (16 bits)"
        )
