"""Encoders of sound that is not at its end: what is pushed comes back as bytes, so that a player can begin.

The bytes of one encoder are one continuous stream of its format, whose headers do not state a length: a wav header with unknown
sizes, MP3 without ID3 and Xing, Ogg Opus, ADTS, FLAC. wav and pcm need no package, the others PyAV.
"""

from __future__ import annotations

import io
import struct
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..arrays import Pcm
from ..errors import AudioError
from .formats import FORMATS, bit_rate, next_rate
from .pyav import pyav
from .resample import Resampler

UNKNOWN = 0xFFFFFFFF
"""An unknown size in bytes: players read until the end. It is also the largest size that a wav header can state."""
_WAV_HEADER_BYTES = 44


class Encoder(ABC):
    """An encoder of one stream."""

    def __init__(self, content_type: str, rate: int, target: int) -> None:
        """Prepare for sound of `rate` Hz, which is encoded at `target` Hz."""
        self.content_type, self.rate = content_type, target
        """The MIME type and the sample rate in Hz of the bytes."""
        self._resampler = Resampler(rate, target)

    def push(self, pcm: Pcm) -> bytes:
        """Take pcm float32 [samples], −1..1, and return the bytes that are ready, possibly none. A sample outside is clipped."""
        return self._encode(self._resampler.push(pcm))

    def finish(self) -> bytes:
        """Return the rest of the bytes. Nothing can be pushed after it."""
        return self._encode(self._resampler.finish()) + self._end()

    @property
    def header(self) -> bytes:
        """The first bytes of the finished stream with its length in them, instead of those without; empty: there is no length."""
        return b""

    def complete(self, data: bytes) -> bytes:
        """Return all bytes of the finished stream with the length in their header, if the format has it there."""
        return (header := self.header) + data[len(header) :]

    @abstractmethod
    def _encode(self, pcm: Pcm) -> bytes:
        """Return the bytes that are ready after pcm float32 [samples] at the rate of the bytes."""

    def _end(self) -> bytes:
        return b""


class _Samples(Encoder):
    """16-bit little-endian samples, after a wav header or without one."""

    def __init__(self, name: str, rate: int, target: int) -> None:
        super().__init__(FORMATS[name].content_type, rate, target)
        self._wav = name == "wav"
        self._head = _wav_header(target, UNKNOWN) if self._wav else b""
        self._bytes = 0

    @property
    def header(self) -> bytes:
        """See Encoder."""
        return _wav_header(self.rate, self._bytes) if self._wav else b""

    def _encode(self, pcm: Pcm) -> bytes:
        head, self._head = self._head, b""
        data = pcm16(pcm).astype("<i2", copy=False).tobytes()
        self._bytes += len(data)
        return head + data


@dataclass(frozen=True, slots=True)
class _Codec:
    """How PyAV writes a format."""

    muxer: str
    encoder: str
    samples: str
    """ffmpeg's name of the type of samples."""
    options: tuple[tuple[str, str], ...] = ()
    """Options of the muxer."""


_CODECS = {
    "mp3": _Codec("mp3", "libmp3lame", "fltp", (("id3v2_version", "0"), ("write_xing", "0"))),
    "opus": _Codec("ogg", "libopus", "flt", (("page_duration", "100000"),)),  # in µs; usual is a second
    "aac": _Codec("adts", "aac", "fltp"),
    "flac": _Codec("flac", "flac", "s16", (("metadata_header_padding", "0"),)),
}


class _Compressed(Encoder):
    """A stream that ffmpeg's encoders and muxers write."""

    def __init__(self, name: str, rate: int, target: int, kbit: int) -> None:
        super().__init__(FORMATS[name].content_type, rate, target)
        self._av = pyav(f"a stream of {name}")
        codec = _CODECS[name]
        self._samples, self._flac, self._pushed = codec.samples, name == "flac", 0
        self._bytes = _Taken()
        try:
            self._container = self._av.open(self._bytes, "w", codec.muxer, container_options=dict(codec.options))
            self._stream = self._container.add_stream(codec.encoder, rate=target, layout="mono")
            context = self._stream.codec_context
            context.format, context.thread_count = codec.samples, 1
            if kbit:
                context.bit_rate = 1000 * kbit
            self._container.start_encoding()
            self._first = b"".join(self._bytes.parts)
        except (self._av.FFmpegError, ValueError) as error:
            raise AudioError(f"cannot write {name} at {target:,} Hz: {error}", hint="choose another format or rate") from None

    @property
    def header(self) -> bytes:
        """See Encoder."""
        if not self._flac:
            return b""
        # The first 26 bytes end with 36 bits for the number of samples (RFC 9639, section 8.2), which were 0.
        return self._first[:21] + (self._first[21] << 32 | self._pushed).to_bytes(5, "big")

    def _encode(self, pcm: Pcm) -> bytes:
        if len(pcm):
            samples = pcm16(pcm) if self._samples == "s16" else np.clip(pcm, -1, 1)
            frame = self._av.AudioFrame.from_ndarray(samples[None], format=self._samples, layout="mono")
            frame.sample_rate, frame.pts = self.rate, self._pushed
            self._pushed += len(pcm)
            self._container.mux(self._stream.encode(frame))
        return self._bytes.take()

    def _end(self) -> bytes:
        self._container.mux(self._stream.encode(None))
        self._container.close()
        return self._bytes.take()


class _Taken(io.RawIOBase):
    """A file that is written to, and whose bytes are taken away."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []

    def writable(self) -> bool:
        """See io.IOBase."""
        return True

    def write(self, data: Any) -> int:
        """See io.RawIOBase."""
        self.parts.append(bytes(data))
        return len(data)

    def take(self) -> bytes:
        """Return what was written since the last call."""
        data, self.parts = b"".join(self.parts), []
        return data


def pcm16(pcm: Pcm) -> npt.NDArray[np.int16]:
    """Return samples float32 −1..1 as int16, rounded; a sample outside that range is clipped."""
    scaled: Pcm = np.rint(pcm * np.float32(32768))
    return scaled.clip(-32768, 32767).astype(np.int16)


def _wav_header(rate: int, size: int) -> bytes:
    """Return the header of a 16-bit mono wav of `size` bytes of samples; a size that it cannot state is UNKNOWN."""
    whole = min(size + _WAV_HEADER_BYTES - 8, UNKNOWN)
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, rate, 2 * rate, 2, 16)
    return struct.pack("<4sI4s", b"RIFF", whole, b"WAVE") + form + struct.pack("<4sI", b"data", min(size, UNKNOWN))


def open_encoder(format: str, rate: int, *, target: int | None = None, bitrate: int | None = None) -> Encoder:
    """Return an encoder of wav, pcm, mp3, opus, aac or flac, for sound of `rate` Hz.

    target: rate of the bytes in Hz, usually `rate`; a format that cannot hold it gets the next higher that it can hold, or its
    highest, and a stream of Opus 48,000. bitrate: of mp3 and opus, in kbit/s, or from 1,000 in bit/s; −1000 is opus' own choice.
    Raises AudioError for another format, for a bit rate that the format does not have, and if a format needs PyAV without it.
    """
    kind = FORMATS[format]
    kbit, target = bit_rate(format, bitrate), target or rate
    if format in ("wav", "pcm"):
        return _Samples(format, rate, target)
    if format not in _CODECS:
        raise AudioError(f"there are no streams of {format}", hint=f"use wav, pcm, {', '.join(_CODECS)}")
    rates = kind.rates if kind.stream_rates is None else kind.stream_rates
    if format == "mp3":
        rates = tuple(held for held in rates if (kbit or 0) <= _most_kbit(held))
    target = next_rate(rates, target)
    return _Compressed(format, rate, target, kbit or _usual_kbit(format, target))


def _most_kbit(rate: int) -> int:
    """Return the highest bit rate of MP3 in kbit/s at a rate in Hz: of MPEG 2.5 as LAME has it, of MPEG 2, of MPEG 1."""
    return 64 if rate < 16000 else 160 if rate < 32000 else 320


def _usual_kbit(format: str, rate: int) -> int:
    """Return the usual bit rate in kbit/s; 0: the encoder chooses."""
    return {"mp3": min(128, _most_kbit(rate)), "aac": min(96, rate // 250)}.get(format, 0)
