"""Recordings of clients → voices, one at a time, in a thread of its own. Voices of requests are remembered for the next one."""

from __future__ import annotations

import asyncio
import hashlib
import io
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

import numpy as np

from ...arrays import Pcm, Sound
from ...audio.files import read_audio
from ...codec import part
from ...tts import TTS
from ...voices.recordings import PAUSE_S, check_recording, in_turn, most_seconds
from ...voices.voice import Voice, joined
from ..problems import Problem

KEPT_BYTES = 64 << 20
"""Codes and transcripts of requests' voices that are remembered."""
_MOST_WAITING = 32
_RETRY_S = "5"
_SAMPLE_S = 10.0
"""Longest sample of a voice."""
_PAUSE_S = 0.25
"""Silence between two recordings of one voice, for a language model."""
_T = TypeVar("_T")


class VoiceEncoder:
    """Makes voices. Its methods may be called from one event loop only; recordings are the bytes of files, of any format."""

    def __init__(self, tts: TTS, *, kept_bytes: int = KEPT_BYTES) -> None:
        self._tts, self._most = tts, kept_bytes
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="voices")
        self._waiting = 0
        self._kept: OrderedDict[tuple[bytes, str], Voice] = OrderedDict()
        """Hash of a recording and its transcript → its voice."""
        self._size = 0
        self._keeping = threading.Lock()

    async def voice(self, recordings: Sequence[bytes], transcript: str, name: str) -> Voice:
        """Return a voice with its recording, as `VoiceStore.add` keeps it; several are joined, with a pause between them.

        Raises as `Voice.from_audio`; Problem 429.
        """
        return await self.run(lambda: Voice.from_audio(self._tts, self._joined(recordings), transcript, name=name))

    async def reference(self, audio: bytes, transcript: str) -> Voice:
        """Return the voice of a request, made now or remembered. Raises as `voice`."""
        key = (await asyncio.to_thread(lambda: hashlib.sha256(audio).digest()), transcript)
        if kept := self._remembered(key):
            return kept
        return await self.run(lambda: self._reference(key, audio))

    async def sound(self, audio: bytes) -> Sound:
        """Return the codes or latents of a recording. Raises AudioError, VoiceError for silence."""
        return await self.run(lambda: self._sound(audio))

    async def joined(self, voices: Sequence[Voice]) -> Voice:
        """Return one voice of several of one speaker."""
        return await self.run(lambda: joined(voices, self._tts))

    async def sample(self, voice: Voice) -> Pcm:
        """Return the first seconds of a voice as the codec speaks it, pcm float32 [samples], at the loudness of its speech."""
        return await self.run(lambda: self._sample(voice))

    def close(self) -> None:
        """End the thread. What still waits is not done."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def run(self, work: Callable[[], _T]) -> _T:
        """Return what a function returns, called in the thread. Raises what it raises, and Problem 429."""
        if self._waiting >= _MOST_WAITING:
            raise Problem(429, "too many recordings wait to be encoded", code="queue_full", headers={"Retry-After": _RETRY_S})
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        finally:
            self._waiting -= 1

    def _read(self, audio: bytes) -> tuple[Pcm, int]:
        manifest = self._tts.bundle.manifest
        return read_audio(io.BytesIO(audio), max_seconds=most_seconds(manifest.model, manifest.codec))

    def _joined(self, recordings: Sequence[bytes]) -> tuple[Pcm, int]:
        read = [self._read(recording) for recording in recordings]
        return in_turn(read, _PAUSE_S if self._tts.bundle.manifest.codec.channels is None else PAUSE_S) if read[1:] else read[0]

    def _remembered(self, key: tuple[bytes, str]) -> Voice | None:
        with self._keeping:
            voice = self._kept.get(key)
            if voice is not None:
                self._kept.move_to_end(key)
            return voice

    def _reference(self, key: tuple[bytes, str], audio: bytes) -> Voice:
        if kept := self._remembered(key):  # it may have been made while this waited
            return kept
        voice = replace(Voice.from_audio(self._tts, self._read(audio), key[1], name="reference"), recording=None)
        with self._keeping:
            self._kept[key] = voice
            self._size += _size(voice)
            while self._size > self._most:
                self._size -= _size(self._kept.popitem(last=False)[1])
        return voice

    def _sound(self, audio: bytes) -> Sound:
        manifest = self._tts.bundle.manifest
        pcm, rate = self._read(audio)
        check_recording(pcm, rate, manifest.model, manifest.codec, "the audio")
        return self._tts.encode(pcm, rate)

    def _sample(self, voice: Voice) -> Pcm:
        voice.check(self._tts.bundle)
        frames = round(_SAMPLE_S * self._tts.bundle.manifest.codec.frame_rate)
        loudness = voice.loudness or self._tts.loudness(voice.sound)
        pcm: Pcm = self._tts.decode(part(voice.sound, 0, frames)) * np.float32(loudness.gain if loudness else 1.0)
        return pcm


def _size(voice: Voice) -> int:
    return voice.sound.nbytes + 4 * len(voice.transcript)
