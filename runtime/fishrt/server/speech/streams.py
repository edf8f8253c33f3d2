"""Speech → reply: whole, in chunks while it is made, or as server-sent events.

What fails before the first audio is a status. A later fault ends the reply so that the client sees it. A client that goes away
ends its request, whether it speaks or waits.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing, closing
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ...arrays import Pcm
from ...audio.encoders import open_encoder
from ...errors import FishrtError
from ..problems import GoneError, Problem, problem
from ..service import Service
from ..words import ignored_header, warnings_header
from .fields import Speak

log = logging.getLogger(__name__)

_PAUSE_S = 0.25
"""Silence for a text without a letter or digit."""
_MOST_WARNINGS = 20
MOST_WHOLE = 64 << 20
"""Most bytes of audio that are kept for one reply."""
_T = TypeVar("_T")


class Rendering:
    """One request, or several that are spoken as one: the encoded audio, and what is known of it so far."""

    def __init__(self, service: Service, speak: Speak, more: AsyncIterator[Speak] | None = None) -> None:
        """Prepare a request. more: those that follow in the same stream of bytes; they have the same form."""
        if speak.silent and speak.request.seed is None:
            speak = replace(speak, request=replace(speak.request, seed=secrets.randbits(32)))
        self._service, self._speak, self._more = service, speak, more
        self._asked = time.perf_counter()
        self.seed = speak.request.seed
        self.queued_s = 0.0
        self.frames = 0
        self.samples = 0
        """Spoken so far, at the model's rate."""
        self.warnings: list[str] = []
        """Possible faults of the speech so far, the first of them: what the model does not read well, and what was cut off."""
        self.encoder = open_encoder(speak.format, service.tts.sample_rate, target=speak.rate, bitrate=speak.bitrate)

    async def bytes(self) -> AsyncGenerator[bytes]:
        """Yield the encoded audio; no part is empty. Raises Problem if nothing was spoken."""
        metrics, rate = self._service.metrics, self._service.tts.sample_rate
        async with aclosing(self._pcm()) as parts:
            async for pcm in parts:
                if len(pcm) and not self.samples:
                    metrics.first_audio.observe(time.perf_counter() - self._asked)
                    metrics.queued.observe(self.queued_s)
                self.samples += len(pcm)
                metrics.audio.inc(len(pcm) / rate)
                if data := await asyncio.to_thread(self.encoder.push, pcm):
                    yield data
        if not self.samples:
            raise Problem(400, "the model said nothing; try another seed, voice or text", code="nothing_spoken")
        if self._more is None:
            metrics.rtf.observe((time.perf_counter() - self._asked - self.queued_s) / (self.samples / rate))
        if data := await asyncio.to_thread(self.encoder.finish):
            yield data

    async def _pcm(self) -> AsyncGenerator[Pcm]:
        """Yield the speech as it comes: pcm float32 [samples] at the model's rate."""
        async with aclosing(self._spoken(self._speak)) as parts:
            async for pcm in parts:
                yield pcm
        if self._more is None:
            return
        async for speak in self._more:
            async with aclosing(self._spoken(speak, goes_on=True)) as parts:
                async for pcm in parts:
                    yield pcm

    async def _spoken(self, speak: Speak, *, goes_on: bool = False) -> AsyncGenerator[Pcm]:
        if speak.silent:
            yield np.zeros(int(_PAUSE_S * self._service.tts.sample_rate), np.float32)
            return
        stream = await self._service.speak(speak.request, whole=not speak.stream, goes_on=goes_on)
        self._warn(stream.warnings)
        try:
            async for chunk in stream:
                self.seed, self.queued_s = chunk.seed, stream.queued_s
                frames = chunk.codes.shape[1]
                self.frames += frames
                self._service.metrics.frames.inc(frames)
                yield chunk.pcm
            self._warn(stream.warnings)
        finally:
            await stream.aclose()

    def _warn(self, found: Sequence[str]) -> None:
        self.warnings = list(dict.fromkeys([*self.warnings, *found]))[:_MOST_WARNINGS]

    @property
    def doubts(self) -> dict[str, list[str]]:
        """The warnings as events and objects have them; nothing if there are none."""
        return {"warnings": self.warnings} if self.warnings else {}

    @property
    def usage(self) -> dict[str, int]:
        """Tokens read and frames spoken, in OpenAI's words."""
        read = self._service.count_tokens(self._speak.request.text)
        return {"input_tokens": read, "output_tokens": self.frames, "total_tokens": read + self.frames}

    def headers(self, *, whole: bool) -> dict[str, str]:
        """Return the headers of the reply. whole: the speech has ended."""
        speak, headers = self._speak, {}
        headers["Content-Type"] = "text/event-stream; charset=utf-8" if speak.sse else self.content_type
        headers["X-Audio-Sample-Rate"] = str(self.encoder.rate)
        headers["X-Audio-Channels"] = "1"
        if speak.format == "pcm":
            headers["X-Audio-Encoding"] = "pcm_s16le"
        headers["X-Seed"] = str(self.seed)
        headers["X-Queue-Time"] = f"{self.queued_s:.3f}"
        headers |= ignored_header(speak.ignored) | warnings_header(self.warnings)
        headers["Cache-Control"] = "no-cache"
        if not whole:
            headers["X-Accel-Buffering"] = "no"
            return headers
        usage = self.usage
        for name in ("input", "output", "total"):
            headers[f"X-vLLM-Omni-{name.capitalize()}-Tokens"] = str(usage[f"{name}_tokens"])
        headers["X-Prompt-Tokens"], headers["X-Completion-Tokens"] = str(usage["input_tokens"]), str(usage["output_tokens"])
        headers["X-Engine-Time"] = f"{time.perf_counter() - self._asked - self.queued_s:.3f}"
        return headers

    @property
    def content_type(self) -> str:
        """The type of the audio; samples without a header have their rate in it."""
        kind = self.encoder.content_type
        return f"audio/pcm;rate={self.encoder.rate};channels=1" if self._speak.format == "pcm" else kind


async def whole(service: Service, speak: Speak) -> tuple[bytes, Rendering]:
    """Return the whole audio of a request, and what is known of it. Raises FishrtError, and Problem for more than MOST_WHOLE."""
    rendering = Rendering(service, replace(speak, stream=False))
    async with aclosing(rendering.bytes()) as parts:
        data, ended = await _collected(parts)
    if not ended:
        raise Problem(400, f"the speech has more than {MOST_WHOLE >> 20} MiB; give less text", param="input")
    return rendering.encoder.complete(data), rendering


async def _collected(parts: AsyncGenerator[bytes]) -> tuple[bytes, bool]:
    """Return the next parts together, up to a little more than MOST_WHOLE, and whether there is no other."""
    found, length = [], 0
    async for part in parts:
        found.append(part)
        length += len(part)
        if length > MOST_WHOLE:
            return b"".join(found), False
    return b"".join(found), True


async def reply(service: Service, checking: Coroutine[Any, Any, Speak], receive: Receive, *, attached: bool = False) -> Response:
    """Return the reply to a request, whose client `receive` watches. Raises Problem and FishrtError before the first audio.

    checking: reads the fields of the request. attached: with the name of a file.
    A whole reply of more than MOST_WHOLE is sent while it is made, too.
    """
    with closing(checking):
        service.check_ready()
        speak = await unless_gone(checking, receive)
    rendering = Rendering(service, speak)
    parts = rendering.bytes()
    try:
        if speak.stream:
            first, ended = await unless_gone(anext(parts), receive), False
        else:
            first, ended = await unless_gone(_collected(parts), receive)
    except BaseException:
        await parts.aclose()
        raise
    answer: Response = _Streamed(rendering, parts, first, sse=speak.sse)
    if ended:
        answer = Response(rendering.encoder.complete(first), headers=rendering.headers(whole=True))
    if attached:
        answer.headers["Content-Disposition"] = f"attachment; filename=audio.{speak.format}"
    return answer


class _Streamed(Response):
    """A reply that is sent while it is made."""

    def __init__(self, rendering: Rendering, parts: Any, first: bytes, *, sse: bool) -> None:
        """Make the reply. parts: the async generator of the audio behind `first`."""
        super().__init__(headers=rendering.headers(whole=False))
        del self.headers["content-length"]
        self._rendering, self._parts, self._first, self._sse = rendering, parts, first, sse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the reply. A fault of the speech cuts the connection before the end of the body, unless an event can tell it."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self._parts):
            try:
                await unless_gone(self._send(send, scope), receive)
            except GoneError:
                pass
            except (FishrtError, Problem) as error:
                log.warning("a reply was cut off: %s", type(error).__name__)

    async def _send(self, send: Send, scope: Scope) -> None:
        async def put(data: bytes, *, last: bool = False) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": not last})

        if not self._sse:
            await put(self._first)
            async for part in self._parts:
                await put(part)
            await put(b"", last=True)
            return
        try:
            await put(_delta(self._first))
            async for part in self._parts:
                await put(_delta(part))
        except Exception as error:
            if not isinstance(error, FishrtError | Problem):
                log.exception("a stream failed")
            found = problem(error)
            scope["state"]["failed"] = found.status_code  # for log and metrics
            await put(_event("speech.audio.error", found.body), last=True)
            return
        await put(_event("speech.audio.done", {"usage": self._rendering.usage, **self._rendering.doubts}), last=True)


def _delta(data: bytes) -> bytes:
    return _event("speech.audio.delta", {"audio": base64.b64encode(data).decode()})


def _event(kind: str, data: dict[str, Any]) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **data}, separators=(',', ':'))}\n\n".encode()


async def unless_gone(work: Coroutine[Any, Any, _T] | Awaitable[_T], receive: Receive) -> _T:
    """Return the result of `work`, which is cancelled when the client goes away. Raises GoneError then."""
    doing, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({doing, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise GoneError
        return doing.result()
    finally:
        gone.cancel()
        if not doing.done():
            doing.cancel()
            await asyncio.wait({doing})
            if not doing.cancelled():
                doing.exception()  # nobody is there to be told; asyncio would log it


async def _gone(receive: Callable[[], Awaitable[Any]]) -> None:
    """Return when the client has gone away. Its body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass
