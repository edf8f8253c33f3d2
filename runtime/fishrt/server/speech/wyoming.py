"""The Wyoming protocol, as Home Assistant speaks it: events over TCP.

describe ─► info
synthesize ─► audio-start · audio-chunk … · audio-stop
synthesize-start · synthesize-chunk … · synthesize-stop ─► the same, from the first whole sentence on · synthesize-stopped
An error is an event `error`. Wyoming has no keys.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

from wyoming.audio import AudioChunk, AudioStart, AudioStop
from wyoming.error import Error
from wyoming.event import Event, Eventable, async_read_event, async_write_event
from wyoming.info import Attribution, Describe, Info, TtsProgram, TtsVoice
from wyoming.ping import Ping, Pong
from wyoming.tts import Synthesize, SynthesizeChunk, SynthesizeStart, SynthesizeStop, SynthesizeStopped

from ...bundle.features import Reads
from ...version import __version__
from ..problems import Problem
from ..service import DRAIN_S, Service
from .dictation import Conversation, Dictation, TooManyError
from .fields import speak_of
from .streams import Rendering

log = logging.getLogger(__name__)

_URL = "https://github.com/fishrt/fishrt"
_USUAL_LANGUAGES = "ar cs da de el en es fi fr he hi hu id it ja ko nl no pl pt ro ru sv th tr uk vi zh".split()
"""Of a model that does not say which languages it reads."""
_MOST_BYTES = 1 << 20
"""Longest part of an event."""
_CHUNK_BYTES = 32 << 10
_STALL_S = 60.0
"""Longest wait for a client that takes an event."""


@asynccontextmanager
async def serving(service: Service, sock: socket.socket) -> AsyncIterator[None]:
    """Serve connections to a listening socket in the block; at its end, those that speak have the time that all have."""
    running: set[asyncio.Task[None]] = set()

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(_converse(service, reader, writer))
        running.add(task)
        task.add_done_callback(running.discard)

    if service.settings.api_key is not None:
        log.warning("Wyoming has no keys: everybody who reaches port %d may speak", sock.getsockname()[1])
    server = await asyncio.start_server(connected, sock=sock, limit=_MOST_BYTES)
    try:
        yield
    finally:
        server.close()
        if running:
            await asyncio.wait(running, timeout=max(0.0, service.drained_at + DRAIN_S - time.monotonic()))
        for task in running:
            task.cancel()


async def _converse(service: Service, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    began = time.perf_counter()
    try:
        await _Connection(service, reader, writer).run()
    except Exception:
        log.exception("a connection of Wyoming failed")
    finally:
        writer.close()
        log.info("Wyoming %.2f s", time.perf_counter() - began)


class _Connection(Conversation):
    def __init__(self, service: Service, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        super().__init__(service)
        self._reader, self._writer = _Reader(reader), writer

    async def _listen(self) -> None:
        while (event := await self._event()) is not None:
            try:
                try:
                    await self._take(event)
                except Problem as found:
                    self._refuse(found)
            except TooManyError:
                return

    async def _event(self) -> Event | None:
        """Return the next event; None after the last, and after what is none."""
        try:
            event = await async_read_event(self._reader)  # type: ignore[arg-type]
        except (AttributeError, EOFError, KeyError, RecursionError, TypeError):
            return None
        return event if event is not None and isinstance(event.data, dict) else None

    async def _take(self, event: Event) -> None:
        """Take an event. Raises Problem."""
        kind, data = event.type, event.data
        if Describe.is_type(kind):
            await self._send(await asyncio.to_thread(self._info))
        elif Ping.is_type(kind):
            await self._send(Pong(data.get("text")))
        elif SynthesizeStart.is_type(kind):
            self._begin(_fields(data) | {"streamed": True})
        elif SynthesizeChunk.is_type(kind) and self._current is not None:
            self._current.add(_text(data))
        elif SynthesizeStop.is_type(kind):
            self._end()
        elif Synthesize.is_type(kind) and self._current is None:  # during a stream it is the same text, for older servers
            text = _text(data)
            if not text.strip():
                raise Problem(400, "the text is empty", param="text")
            self._begin(_fields(data)).add(text)
            self._end()

    async def _say(self, dictation: Dictation) -> None:
        fields = {"input": ".", "voice": dictation.fields.get("voice"), "response_format": "pcm", "stream": True}
        speak = self._checked(await speak_of(self._service, fields))
        async with aclosing(dictation.parts()) as texts:
            async for first in texts:
                rendering = Rendering(self._service, speak.of(first), (speak.of(text) async for text in texts))
                form = {"rate": rendering.encoder.rate, "width": 2, "channels": 1}
                started = False
                async with aclosing(rendering.bytes()) as parts:
                    async for part in parts:
                        if not started:
                            await self._send(AudioStart(**form))
                            started = True
                        for at in range(0, len(part), _CHUNK_BYTES):
                            await self._send(AudioChunk(audio=part[at : at + _CHUNK_BYTES], **form))
                await self._send(AudioStop())
        if "streamed" in dictation.fields:
            await self._send(SynthesizeStopped())

    async def _fail(self, dictation: Dictation, found: Problem) -> None:
        await self._send(Error(found.detail, found.code or str(found.status_code)))
        if "streamed" in dictation.fields:
            await self._send(SynthesizeStopped())

    async def _send(self, event: Eventable) -> None:
        await asyncio.wait_for(async_write_event(event.event(), self._writer), _STALL_S)

    def _info(self) -> Info:
        """Return what this server can speak: the default voice comes first."""
        manifest, usual = self._service.tts.bundle.manifest, self._service.tts.default_voice
        languages = languages_of(manifest.model.reads)
        by = Attribution("fishrt", _URL)
        names = sorted((entry.name for entry in self._service.library.list()), key=lambda name: (name != usual, name))
        voices = [
            TtsVoice(name=name, attribution=by, installed=True, description=name, version=None, languages=languages)
            for name in names
        ]
        program = TtsProgram(
            name="fishrt",
            attribution=by,
            installed=True,
            description=f"{manifest.name}, spoken by fishrt",
            version=__version__,
            voices=voices,
            supports_synthesize_streaming=True,
        )
        return Info(tts=[program])


class _Reader:
    """A reader that refuses the long parts that an event announces, before they are read."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self._reader = reader

    async def readline(self) -> bytes:
        """Return a line. Raises ValueError for a long one."""
        return await self._reader.readline()

    async def readexactly(self, size: int) -> bytes:
        """Return so many bytes. Raises ValueError for too many."""
        if size > _MOST_BYTES:
            raise ValueError("too long")
        return await self._reader.readexactly(size)


def languages_of(reads: Reads | None) -> list[str]:
    """Return the languages that a model is offered for: clients choose a voice by language, and show none that has none."""
    return list(reads.languages if reads and reads.languages else _USUAL_LANGUAGES)


def _fields(data: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a request. A voice that is given by its language alone is the default one. Raises Problem."""
    voice = data.get("voice") or {}
    if not isinstance(voice, dict):
        raise Problem(400, "voice: an object is expected", param="voice")
    if data.get("text_format") not in (None, "text"):
        raise Problem(400, f"text_format {data['text_format']!r:.40}: only text is spoken", param="text_format")
    return {"voice": voice.get("name")}


def _text(data: dict[str, Any]) -> str:
    if not isinstance(text := data.get("text"), str):
        raise Problem(400, "text: a string is expected", param="text")
    return text
