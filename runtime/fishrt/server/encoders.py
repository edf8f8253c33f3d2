"""Temporary: encoders of audio until `fishrt.audio` has them."""

from __future__ import annotations

import numpy as np

from ..arrays import Pcm
from ..audio.encode import encode_audio, pcm16
from ..audio.resample import resample
from ..errors import AudioError

_TYPES = {
    "mp3": "audio/mpeg",
    "opus": "audio/ogg",
    "aac": "audio/aac",
    "flac": "audio/flac",
    "wav": "audio/wav",
    "pcm": "audio/pcm",
}


class _Encoder:
    def __init__(self, format: str, rate_in: int, rate: int) -> None:
        self._format, self._in, self.rate = format, rate_in, rate
        self.content_type = _TYPES[format]
        self._parts: list[Pcm] = []

    def push(self, pcm: Pcm) -> bytes:
        if self._format == "pcm" and self._in == self.rate:
            return pcm16(pcm).astype("<i2").tobytes()
        self._parts.append(pcm)
        return b""

    def finish(self) -> bytes:
        pcm = np.concatenate(self._parts) if self._parts else np.empty(0, np.float32)
        if not len(pcm):
            return b""
        return encode_audio(resample(pcm, self._in, self.rate), self.rate, self._format)

    def complete(self, data: bytes) -> bytes:
        return data


def open_encoder(format: str, rate_in: int, rate: int, bitrate: int | None) -> _Encoder:
    """Return an encoder."""
    if format == "aac":
        raise AudioError("aac is not there yet")
    return _Encoder(format, rate_in, rate)
