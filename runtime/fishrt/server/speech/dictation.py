"""Connections on which texts come in fragments, each with the fields of its speech, and are spoken one after the other.

events ─► listen ─► Dictation ─► sentences ─► speak ─► audio
A connection listens while it speaks: so it answers pings, and a client that goes away ends its speech.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Coroutine, Mapping
from dataclasses import replace
from typing import Any

from starlette.websockets import WebSocketDisconnect

from ...errors import FishrtError
from ...text.growing import GrowingText
from ..problems import Problem, problem
from ..service import Service
from ..words import listed
from .fields import Speak

log = logging.getLogger(__name__)

_MOST_TEXT = 1 << 20
"""Most characters that wait to be spoken on one connection, if texts may have any length."""
_MOST_WAITING = 8
"""Most texts that wait for their turn on one connection."""


class Dictation:
    """One text that comes in fragments."""

    def __init__(self, fields: Mapping[str, Any], *, least: int, most: int) -> None:
        """Begin a text. least: see `GrowingText`. most: characters that may wait to be spoken."""
        self.fields = fields
        self._text, self._most = GrowingText(least), most
        self._waiting: asyncio.Queue[str | Problem | None] = asyncio.Queue()
        self._unspoken = 0
        self._over = False

    def add(self, fragment: str) -> None:
        """Take a fragment."""
        if self._over:
            return
        self._put(self._text.push(fragment))
        if self._unspoken + len(self._text) > self._most:
            self.refuse(Problem(400, f"more than {self._most:,} characters wait to be spoken", code="text_too_long"))

    def flush(self) -> None:
        """Let all that has come be spoken."""
        if not self._over:
            self._put(self._text.flush())

    def end(self) -> None:
        """Let the rest be spoken; nothing else comes."""
        self.flush()
        self._waiting.put_nowait(None)
        self._over = True

    def refuse(self, found: Problem) -> None:
        """End the text with a problem, before what has not been spoken."""
        while not self._waiting.empty():
            self._waiting.get_nowait()
        self._waiting.put_nowait(found)
        self._over = True

    def drop(self) -> None:
        """Forget what still comes."""
        self._over = True
        self._waiting = asyncio.Queue()

    async def parts(self) -> AsyncGenerator[str]:
        """Yield the parts of the text, whole sentences. Raises Problem."""
        while (part := await self._waiting.get()) is not None:
            if isinstance(part, Problem):
                raise part
            self._unspoken -= len(part)
            yield part

    def _put(self, parts: list[str]) -> None:
        for part in parts:
            self._unspoken += len(part)
            self._waiting.put_nowait(part)


class Conversation(ABC):
    """A connection."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._dictations: asyncio.Queue[Dictation | None] = asyncio.Queue()
        self._current: Dictation | None = None
        """The text whose fragments come now."""
        self._ignored: set[str] = set()

    async def run(self) -> None:
        """Listen and speak until the client goes away, or until the server ends and everything was spoken."""
        self._service.at_end.add(self._stop)
        try:
            await _first_of(self._listen(), self._speak())
        finally:
            self._service.at_end.discard(self._stop)

    @abstractmethod
    async def _listen(self) -> None:
        """Take events until the client goes away."""

    @abstractmethod
    async def _say(self, dictation: Dictation) -> None:
        """Speak a text. Raises Problem and FishrtError."""

    @abstractmethod
    async def _fail(self, dictation: Dictation, found: Problem) -> None:
        """Tell the client why a text is not spoken to its end."""

    def _stop(self) -> None:
        """End the connection when everything was spoken."""
        self._dictations.put_nowait(None)

    def _begin(self, fields: Mapping[str, Any], *, least: int = 1) -> Dictation:
        """Begin a text; the one before it ends. Raises TooManyError."""
        if self._current is not None:
            self._current.end()
        if self._dictations.qsize() >= _MOST_WAITING:
            raise TooManyError
        self._current = Dictation(fields, least=least, most=self._service.settings.max_text_length or _MOST_TEXT)
        self._dictations.put_nowait(self._current)
        return self._current

    def _end(self) -> None:
        """End the text whose fragments come now."""
        if self._current is not None:
            self._current.end()
        self._current = None

    def _refuse(self, found: Problem) -> None:
        """Answer an event with a problem, after what was asked for before."""
        self._begin({}).refuse(found)
        self._current = None

    def _checked(self, speak: Speak) -> Speak:
        """Return the request of a text with a seed, which all its parts share. Log fields without effect: no event has them."""
        new = [name for name in speak.ignored if name not in self._ignored]
        self._ignored.update(new)
        if new:
            log.info("fields of a connection that change nothing: %s", listed(new))
        seed = secrets.randbits(32) if speak.request.seed is None else speak.request.seed
        return replace(speak, request=replace(speak.request, seed=seed))

    async def _speak(self) -> None:
        while (dictation := await self._dictations.get()) is not None:
            try:
                self._service.check_ready()
                await self._say(dictation)
            except (WebSocketDisconnect, OSError):
                raise
            except Exception as error:
                if not isinstance(error, FishrtError | Problem):
                    log.exception("a text of a connection failed")
                dictation.drop()
                await self._fail(dictation, problem(error))


class TooManyError(Exception):
    """More texts wait than a connection may have."""


async def _first_of(*work: Coroutine[Any, Any, None]) -> None:
    """Do several things at once until one of them ends or fails; the others are cancelled."""
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    except (WebSocketDisconnect, OSError):
        pass
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
