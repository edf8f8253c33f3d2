"""The process: the socket, uvicorn, connections that stall, signals, and a bounded end."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..errors import FishrtError
from ..tts import TTS
from .app import create_app
from .settings import Settings

DRAIN_S = 15
"""Longest time for running requests at the end."""
_LAST_S = 18.0
"""Longest time from a signal to the end of the process."""
_REQUEST_S = 20.0
"""Longest time for the head of a request."""
_STALL_S = 60.0
"""Longest time in which a reader takes no byte."""


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens. Raises FishrtError if the address is unknown or the port is taken."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except OSError as error:
        raise FishrtError(f"cannot listen on {host!r}: {error.strerror}", hint="give --host an address of this machine") from None
    found = socket.socket(family, kind, proto)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(2048)
    except OSError as error:
        found.close()
        hint = "give another --port, or end the program that has it; --port 0 takes a free one"
        raise FishrtError(f"cannot listen on {host}, port {port}: {error.strerror}", hint=hint) from None
    found.setblocking(False)
    return found


def address(sock: socket.socket) -> str:
    """Return the URL of a listening socket."""
    host, port = sock.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def serve(tts: TTS, settings: Settings, sock: socket.socket) -> None:
    """Serve requests on a socket until SIGTERM or SIGINT; those that run then have DRAIN_S, or until a second signal."""
    app = create_app(tts, settings)
    config = uvicorn.Config(
        app,
        http=_Connection,
        log_config=None,
        log_level=logging.CRITICAL,  # what it would log is in the log of the application, or a client's fault
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=DRAIN_S,
        lifespan="on",
    )
    server = _Server(config, app.state.service.drain)
    server.run(sockets=[sock])


class _Server(uvicorn.Server):
    """A server whose signals end it with exit status 0."""

    def __init__(self, config: uvicorn.Config, drain: Callable[[], None]) -> None:
        super().__init__(config)
        self._drain = drain

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until a signal."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._end)
        await self._serve(sockets)

    def _end(self) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True
        self._drain()
        last = threading.Timer(_LAST_S, lambda: os._exit(0))  # a graph that runs cannot be interrupted
        last.daemon = True
        last.start()


class _Connection(H11Protocol):
    """A connection that is cut if its request does not begin in time, or its reader takes nothing for too long."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Wait for a request, but not for ever."""
        super().connection_made(transport)
        self._timer = self.loop.call_later(_REQUEST_S, self._begin_or_end)

    def _begin_or_end(self) -> None:
        if self.cycle is None:
            self.transport.abort()

    def pause_writing(self) -> None:
        """Watch a reader that is slower than its speech."""
        super().pause_writing()
        self._stalled(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        """End the watch."""
        self._cancel()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """End the watch."""
        self._cancel()
        super().connection_lost(exc)

    def _stalled(self, before: int, *, checked: bool = False) -> None:
        left = self.transport.get_write_buffer_size()
        if checked and left >= before:
            logging.getLogger(__name__).info("a reader took nothing for %d s; its request ends", _STALL_S)
            self.transport.abort()
            return
        self._cancel()
        self._timer = self.loop.call_later(_STALL_S, lambda: self._stalled(left, checked=True))

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
