"""WebSockets: text comes in fragments, and audio goes back while it is made.

Both routes take the next text after the end of one.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import msgpack
from fastapi import APIRouter, WebSocket
from starlette.websockets import WebSocketState

from ..bodies import object_of, unpacked
from ..problems import Problem
from ..service import Service
from .dictation import Conversation, Dictation, TooManyError
from .fields import Speak, speak_of
from .native import native_speak
from .streams import Rendering, whole

_AGAIN = 1012
"""Code of a WebSocket that ends because the server does."""
_TOO_MANY = 1008
"""Code of a WebSocket whose client asks for too much."""
_USUAL_LENGTH = 200
"""UTF-8 bytes of whole sentences that are spoken without a flush, if the client says nothing else."""
_AUDIO_BYTES = 32 << 10
"""Most audio in an event of `/v1/tts/live`: some clients take no message above 64 KiB."""
_FRAME_BYTES = 512 << 10
"""Most audio in a frame of `/v1/audio/speech/stream`: some clients take none above 1 MiB."""


def routes(service: Service) -> APIRouter:
    """Return the routes."""
    router = APIRouter()

    @router.websocket("/v1/tts/live")
    async def live(socket: WebSocket) -> None:
        """Speak texts that come in fragments, as Fish Audio does. Events are MessagePack in binary frames.

        You send  {"event": "start", "request": {…}}   with fields of /v1/tts
                  {"event": "text", "text": "…"}       for each fragment
                  {"event": "flush"}                   to hear all that has come
                  {"event": "stop"}
        You get   {"event": "audio", "audio": bytes}   all of one start are one stream
                  {"event": "finish", "reason": "stop"}, or "error" with a message; then the next start may come
        """
        await _Live(service, socket).run()

    @router.websocket("/v1/audio/speech/stream")
    async def stream(socket: WebSocket) -> None:
        """Speak sentence by sentence, as vLLM-Omni does. Events are JSON in text frames.

        You send  {"type": "session.config", …}        with fields of /v1/audio/speech
                  {"type": "input.text", "text": "…"}  for each fragment
                  {"type": "input.done"}
                  {"type": "session.close"}            to end the connection
        You get   {"type": "audio.start", …}           with the format and the rate of a sentence
                  its audio in binary frames
                  {"type": "audio.done", …}
                  {"type": "session.done", …}          after the last; before it, after a fault, {"type": "error", …}
        """
        await _Stream(service, socket).run()

    return router


class _Socket(Conversation):
    """A conversation over a WebSocket."""

    def __init__(self, service: Service, socket: WebSocket) -> None:
        super().__init__(service)
        self._socket = socket

    async def run(self) -> None:
        """See Conversation."""
        await self._socket.accept()
        await super().run()
        if self._socket.client_state is self._socket.application_state is WebSocketState.CONNECTED:
            await self._socket.close(_AGAIN if self._service.state == "draining" else 1000)

    async def _listen(self) -> None:
        while (message := await self._socket.receive())["type"] == "websocket.receive":
            try:
                try:
                    if not self._take(message.get("bytes"), message.get("text")):
                        return
                except Problem as found:
                    self._refuse(found)
            except TooManyError:
                await self._socket.close(_TOO_MANY, "too many texts wait")
                return

    @abstractmethod
    def _take(self, data: bytes | None, text: str | None) -> bool:
        """Take a frame; return whether the client stays. Raises Problem."""

    def _add(self, text: Any, first: str) -> None:
        """Take a fragment of the text that `first` has begun. Raises Problem."""
        if not isinstance(text, str):
            raise Problem(400, "text: a string is expected", param="text")
        if self._current is None:
            raise Problem(400, f"a text comes before {first}")
        self._current.add(text)


class _Live(_Socket):
    def _take(self, data: bytes | None, text: str | None) -> bool:
        if data is None:
            raise Problem(400, "events are MessagePack in binary frames", code="invalid_msgpack")
        event = unpacked(data)
        match event.get("event"):
            case "start":
                request = event.get("request") or {}
                if not isinstance(request, dict):
                    raise Problem(400, "request: a map is expected", param="request")
                least = request.get("chunk_length")
                fields = {name: value for name, value in request.items() if name not in ("text", "chunk_length")}
                self._begin(fields, least=least if isinstance(least, int) and least > 0 else _USUAL_LENGTH)
                self._add(request.get("text") or "", "start")
            case "text":
                self._add(event.get("text"), "start")
            case "flush" if self._current is not None:
                self._current.flush()
            case "stop":
                self._end()
        return True

    async def _say(self, dictation: Dictation) -> None:
        speak = self._checked(await native_speak(self._service, {**dictation.fields, "input": "."}))
        speak = replace(speak, stream=True)
        doubts: dict[str, Any] = {}
        async with aclosing(dictation.parts()) as texts:
            async for first in texts:
                rendering = Rendering(self._service, speak.of(first), (speak.of(text) async for text in texts))
                async with aclosing(rendering.bytes()) as parts:
                    async for part in parts:
                        for audio in _cut(part, _AUDIO_BYTES):
                            await self._send({"event": "audio", "audio": audio})
                doubts = rendering.doubts
        await self._send({"event": "finish", "reason": "stop", **doubts})

    async def _fail(self, dictation: Dictation, found: Problem) -> None:
        await self._send({"event": "finish", "reason": "error", "message": found.detail, **found.body})

    async def _send(self, event: dict[str, Any]) -> None:
        await self._socket.send_bytes(msgpack.packb(event))


class _Stream(_Socket):
    def _take(self, data: bytes | None, text: str | None) -> bool:
        if text is None:
            raise Problem(400, "events are JSON in text frames", code="invalid_json")
        event = object_of(text)
        match event.get("type"):
            case "session.config":
                fields = {name: value for name, value in event.items() if name not in ("type", "stream_audio")}
                self._begin({"stream": event.get("stream_audio"), **fields})
            case "input.text":
                self._add(event.get("text"), "session.config")
            case "input.done":
                self._end()
            case "session.close":
                return False
        return True

    async def _say(self, dictation: Dictation) -> None:
        speak = self._checked(await speak_of(self._service, {**dictation.fields, "input": "."}, usual="wav"))
        nth = -1
        async with aclosing(dictation.parts()) as texts:
            async for text in texts:
                nth += 1
                await self._sentence(speak.of(text), {"sentence_index": nth, "sentence_text": text})
        await self._send({"type": "session.done", "total_sentences": nth + 1})

    async def _sentence(self, speak: Speak, about: dict[str, Any]) -> None:
        """Speak a sentence: its frames while they are made, or a whole file."""
        if speak.stream:
            rendering = Rendering(self._service, speak)
            parts = rendering.bytes()
        else:
            data, rendering = await whole(self._service, speak)
            parts = _once(data)
        form = {"format": speak.format, "sample_rate": rendering.encoder.rate, "channels": 1}
        await self._send({"type": "audio.start", **about, **form})
        sent = 0
        async with aclosing(parts):
            async for part in parts:
                sent += len(part)
                for frame in _cut(part, _FRAME_BYTES):
                    await self._socket.send_bytes(frame)
        done = {"sentence_index": about["sentence_index"], "total_bytes": sent, "error": False}
        await self._send({"type": "audio.done", **done, **rendering.doubts})

    async def _fail(self, dictation: Dictation, found: Problem) -> None:
        await self._send({"type": "error", "message": found.detail, **found.body})
        await self._send({"type": "session.done", "total_sentences": 0})

    async def _send(self, event: dict[str, Any]) -> None:
        await self._socket.send_text(json.dumps(event))


async def _once(data: bytes) -> AsyncGenerator[bytes]:
    yield data


def _cut(data: bytes, size: int) -> Iterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]
