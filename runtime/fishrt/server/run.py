"""The process: the socket, uvicorn, connections that stall, signals, and a bounded end."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import socket
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from ..errors import FishrtError
from ..tts import TTS
from .app import create_app
from .problems import Problem
from .service import DRAIN_S
from .settings import Settings

log = logging.getLogger(__name__)

_LAST_S = 18.0
"""Longest time from a signal to the end of the process."""
_IDLE_S = 60
"""Longest time between two requests on a connection. Clients keep connections for 5 s or more; a shorter time races them."""
_REQUEST_S = 20.0
"""Longest time for the head of a request."""
_PING_S = 20.0
"""Seconds between pings on a WebSocket."""
_STALL_S, _LEAST_BYTES = 60.0, 16 << 10
"""A reader that is slower than its speech takes at least so many bytes in this time; no codec needs fewer for speech."""


def listen(host: str, port: int, option: str = "--port") -> socket.socket:
    """Return a socket that listens; `option` sets the port. Raises FishrtError if the address is unknown or the port is taken."""
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
        hint = f"give another {option}, or end the program that has it; {option} 0 takes a free one"
        raise FishrtError(f"cannot listen on {host}, port {port}: {error.strerror}", hint=hint) from None
    found.setblocking(False)
    return found


def address(sock: socket.socket, scheme: str = "http") -> str:
    """Return the URL of a listening socket."""
    host, port = sock.getsockname()[:2]
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


def page_address(sock: socket.socket) -> str:
    """Return the URL of the page for a browser on this machine: of a socket for all addresses, it is that of localhost."""
    return re.sub(r"//(0\.0\.0\.0|\[::\]):", "//localhost:", address(sock)) + "/"


def serve(tts: TTS, settings: Settings, sock: socket.socket, wyoming: socket.socket | None = None) -> None:
    """Serve requests on a socket until SIGTERM or SIGINT; those that run then have DRAIN_S, or until a second signal.

    wyoming: a socket for Wyoming's protocol.
    """
    app = create_app(tts, settings, wyoming=wyoming)
    service = app.state.service
    try:
        _Server(configuration(app), service.drain).run(sockets=[sock])
    finally:
        service.close()  # a second signal leaves out the end of the application


def configuration(app: FastAPI) -> uvicorn.Config:
    """Return how uvicorn serves the application."""
    return uvicorn.Config(
        app,
        http=_Connection,
        ws=_Socket,
        ws_ping_interval=_PING_S,
        ws_ping_timeout=_STALL_S,
        ws_per_message_deflate=False,
        log_config=None,
        log_level=logging.CRITICAL,  # what it would log is in the log of the application, or a client's fault
        access_log=False,
        server_header=False,
        timeout_keep_alive=_IDLE_S,
        timeout_graceful_shutdown=DRAIN_S,
        lifespan="on",
    )


class _Server(uvicorn.Server):
    """A server whose signals end it with exit status 0."""

    def __init__(self, config: uvicorn.Config, drain: Callable[[], None]) -> None:
        super().__init__(config)
        self._drain = drain

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to end at a signal, and cut what runs at a second one."""
        self.force_exit = self.should_exit
        self.should_exit = True
        self._drain()
        last = threading.Timer(_LAST_S, lambda: os._exit(0))  # a graph that runs cannot be interrupted
        last.daemon = True
        last.start()


class _Connection(H11Protocol):
    """A connection that is cut if the head of a request does not arrive in time, or its reader takes too little for too long."""

    _head: asyncio.TimerHandle
    """Runs while the head of a request is not whole; else it is cancelled."""
    _reader: asyncio.TimerHandle
    """Runs while the reader is slower than its speech; else it is cancelled."""

    def connection_made(self, transport: Any) -> None:
        """Wait for a request, but not for ever."""
        super().connection_made(transport)
        self._head = self.loop.call_later(_REQUEST_S, transport.abort)
        self._reader = self.loop.call_later(_STALL_S, transport.abort)
        self._reader.cancel()

    def data_received(self, data: bytes) -> None:
        """Take data. A head has a limit from its first byte, whatever arrives later."""
        super().data_received(data)
        self._watch_head()

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        """Leave the connection to the protocol of WebSockets."""
        self._head.cancel()
        super().handle_websocket_upgrade(event)

    def pause_writing(self) -> None:
        """Watch the reader."""
        super().pause_writing()
        self._watch_reader(None)

    def resume_writing(self) -> None:
        """End the watch."""
        self._reader.cancel()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """End all watches."""
        self._head.cancel()
        self._reader.cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, with the object that all errors have."""
        data = json.dumps(Problem(400, "this is no valid HTTP request", code="invalid_http").body).encode()
        headers = [("Content-Type", "application/json"), ("Content-Length", str(len(data))), ("Connection", "close")]
        for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=data), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _watch_head(self) -> None:
        if self.transport.get_protocol() is not self or (self.cycle is not None and not self.cycle.response_complete):
            self._head.cancel()
        elif self._head.cancelled():
            self._head = self.loop.call_later(_REQUEST_S, self.transport.abort)

    def _watch_reader(self, before: int | None) -> None:
        """Cut the connection if too little was taken of `before` bytes, else look again."""
        left = self.transport.get_write_buffer_size()
        if before is not None and before - left < _LEAST_BYTES:
            log.info("a reader took less than %d bytes in %d s; its request ends", _LEAST_BYTES, _STALL_S)
            self.transport.abort()
        else:
            self._reader = self.loop.call_later(_STALL_S, self._watch_reader, left)


class _Socket(WebSocketsSansIOProtocol):
    """A WebSocket that the end of the server leaves to the application, which speaks to the end what it has begun."""

    def shutdown(self) -> None:
        """End the connection only if it has not begun."""
        if not self.handshake_complete:
            super().shutdown()

    def keepalive_timeout(self) -> None:
        """Cut a connection whose client answers no ping: it would not take what is left to send either."""
        super().keepalive_timeout()
        self.transport.abort()
