"""What happens to every request before and after its route: path, id, key, bounds of the body, log.

client ─► canonical path ─► request id ─► host, origin ─► key ─► bounded body ─► route ─► safe headers ─► client
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
import re
import secrets
import time
from collections.abc import Container, Sequence
from urllib.parse import parse_qs

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .bodies import MOST_BYTES
from .problems import GONE, GoneError, Problem, problem, reply
from .service import Service

log = logging.getLogger(__name__)

MOST_HELD = 256 << 20
"""Most bytes of the bodies of all requests that are not answered yet."""
_SMALL = 1 << 16
"""A body up to so many bytes is always taken."""
_IDLE_S, _BODY_S = 20.0, 300.0
"""Longest wait for the next part of a body, and for all of it."""
_DISCARDED, _DISCARD_S = 64 << 20, 5.0
"""What is still read of a body that was refused, so that its sender sees the reply instead of a broken connection."""

_OPEN = re.compile(
    r"/|/health|/v1/health|/docs|/openapi\.json|/favicon\.ico|/page/.*|/v1/models(/.*)?|/v1/audio/models|/v1/audio/voices|/v1/voices"
)
"""Paths that need no key to be read."""
_SPEECH = re.compile(r"/(?:v1/)?audio/speech(?=/(?:v1/)?(?:audio|models|voices)(?:/|$))")
_ECHO = re.compile(r"^/echo(?=/)(?!/v1/audio/speech/?$)")
"""The address of clients of one dialect, in front of a path that is the same for all."""
_SHORT = re.compile(r"/(audio|models|voices)(?=/|$)")
_CSP = "default-src 'self'; img-src 'self' data: blob:; media-src 'self' blob:; worker-src 'self' blob:; object-src 'none'; "
_CSP += "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
_SAFE = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


class Edge:
    """The ASGI application around all routes."""

    def __init__(self, app: ASGIApp, service: Service, paths: Container[str]) -> None:
        """Stand around `app`, whose routes have these paths."""
        self._paths = paths
        self._held: list[_Exchange] = []
        """The requests that are not answered yet."""
        self._app, self._service, self._settings, self._metrics = app, service, service.settings, service.metrics
        settings = service.settings
        self._key = settings.api_key.encode() if settings.api_key else None
        self._only_here = self._key is None and _is_loopback(settings.host)
        """Whether nobody but this machine is to reach the server."""
        self._named = {_name(_host(origin)) for origin in settings.cors_origins}
        """Hosts of the pages that may use the server."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request, or pass on the events of the application's life."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        scope["path"] = canonical(scope["path"])
        headers = Headers(scope=scope)
        exchange = _Exchange(scope, receive, send, _request_id(headers.get("x-request-id", "")), self._held)
        self._held.append(exchange)
        if scope["path"] in self._paths:
            exchange.path = scope["path"]
        try:
            self._check_host(headers)
            self._check_origin(scope, headers)
            self._check_key(scope, headers)
            exchange.check_length(headers)
            await self._app(scope, exchange.receive, exchange.send)
        except GoneError:
            pass
        except Exception as error:
            if not isinstance(error, Problem):
                log.exception("a request failed")
            if not exchange.status:
                await exchange.refuse(problem(error))
        finally:
            self._held.remove(exchange)
            status = exchange.end(503 if self._service.state == "draining" else 500)
            self._metrics.requests.labels(exchange.route, status).inc()
            if exchange.gone:
                self._metrics.cancelled.inc()
            exchange.log_line(status)

    def _check_key(self, scope: Scope, headers: Headers) -> None:
        """Check the key, in constant time. Raises Problem 401."""
        if self._key is None:
            return
        if scope["type"] == "http" and scope["method"] in ("GET", "HEAD", "OPTIONS") and _OPEN.fullmatch(scope["path"]):
            return
        if scope["path"] == "/v1/health":
            return
        kind, _, bearer = headers.get("authorization", "").partition(" ")
        given = [headers.get("x-api-key", "").encode("latin-1")]
        given += [bearer.strip().encode("latin-1")] if kind.lower() == "bearer" else []
        if scope["type"] == "websocket":
            given += [key.encode() for key in parse_qs(scope["query_string"].decode("latin-1")).get("api_key", [])]
        right = [hmac.compare_digest(key, self._key) for key in given]
        if not any(right):
            what = "the API key is wrong" if any(given) else "an API key is needed: Authorization: Bearer KEY"
            raise Problem(401, what, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    def _check_host(self, headers: Headers) -> None:
        """Check that a server for this machine alone is asked by a name of it. Raises Problem 403.

        The owner of another name can let it lead to this machine. For a browser, pages of that name are then pages of this
        server, and may read every reply.
        """
        name = _name(headers.get("host", ""))
        if not self._only_here or not name or _is_loopback(name) or name in self._named or "*" in self._settings.cors_origins:
            return
        raise Problem(
            403,
            "a server without a key answers to names of this machine only, such as localhost; "
            "start it with --api-key, or with the public address: --cors-origin https://NAME",
            code="host_refused",
        )

    def _check_origin(self, scope: Scope, headers: Headers) -> None:
        """Check that no web page of another site makes a browser change or start something. Raises Problem 403."""
        origin, allowed = headers.get("origin"), self._settings.cors_origins
        if origin is None or (scope["type"] == "http" and scope["method"] in ("GET", "HEAD", "OPTIONS")):
            return
        if _host(origin) != headers.get("host", "-") and origin not in allowed and "*" not in allowed:
            raise Problem(
                403, "a web page of this origin may not use the server; start it with --cors-origin", code="origin_refused"
            )


def canonical(path: str) -> str:
    """Return a path as its route has it: with /v1, without / at its end, and without the path of speech in front of another."""
    path = _ECHO.sub("", re.sub("//+", "/", path))
    while found := _SPEECH.match(path):
        path = path[found.end() :]
    path = re.sub(r"^(/v1)+(?=/v1(/|$))", "", path)
    if len(path) > 1:
        path = path.rstrip("/") or "/"
    return f"/v1{path}" if _SHORT.match(path) else path


class _Exchange:
    """One request and its reply, as they pass."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, id: str, all: Sequence[_Exchange]) -> None:
        """Begin an exchange. all: those that are not answered yet."""
        self._all = all
        self._scope, self._receive, self._send, self._id = scope, receive, send, id
        self._began = time.perf_counter()
        self._read = self._sent = 0
        self._body_ended = scope["type"] != "http"
        self.path = "unknown"
        self._replied = False
        self.status = 0
        self.gone = False
        """Whether the client went away before it had the reply."""
        scope.setdefault("state", {})["request_id"] = id

    def check_length(self, headers: Headers) -> None:
        """Check the length that the body is said to have. Raises Problem 413."""
        said = headers.get("content-length", "0")
        if said.isdecimal() and int(said[:20]) > MOST_BYTES:
            raise _too_large()

    async def receive(self) -> Message:
        """Return the next event of the client. Raises Problem 413 for a body that is too long, 408 for one that stops coming."""
        if self._body_ended:
            message = await self._receive()
            self.gone = self.gone or (message["type"] == "http.disconnect" and not self._replied)
            return message
        left = min(_IDLE_S, self._began + _BODY_S - time.perf_counter())
        try:
            message = await asyncio.wait_for(self._receive(), left)
        except TimeoutError:
            raise Problem(408, "the body did not arrive in time", code="timeout", headers={"Connection": "close"}) from None
        if message["type"] == "http.request":
            self._read += len(message.get("body", b""))
            self._body_ended = not message.get("more_body", False)
            if self._read > MOST_BYTES:
                raise _too_large()
            if self._read > _SMALL and sum(each._read for each in self._all) > MOST_HELD:
                raise Problem(429, "too many long bodies are held", code="bodies_full", headers={"Retry-After": "5"})
        elif message["type"] == "http.disconnect":
            self.gone = True
            raise GoneError
        return message

    async def send(self, message: Message) -> None:
        """Send an event to the client, with the headers that every reply has."""
        if message["type"] in ("http.response.start", "websocket.http.response.start"):
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["X-Request-Id"] = self._id
            for name, value in _SAFE.items():
                headers.setdefault(name, value)
            if headers.get("content-type", "").startswith("text/html"):
                headers.setdefault("Content-Security-Policy", _CSP)
        elif message["type"] == "websocket.accept":
            self.status = 101
        elif message["type"] == "websocket.send":
            self._sent += len(message.get("bytes") or message.get("text") or "")
        elif message["type"] == "http.response.body":
            self._sent += len(message.get("body", b""))
            self._replied = not message.get("more_body", False)
            if self._replied and not self._body_ended:
                await self._send({**message, "more_body": True})
                await self._discard()
                message = {"type": "http.response.body", "body": b"", "more_body": False}
        await self._send(message)

    async def _discard(self) -> None:
        """Read and drop the rest of the body, within limits."""
        read, until = 0, time.perf_counter() + _DISCARD_S
        while not self._body_ended and read < _DISCARDED and (left := until - time.perf_counter()) > 0:
            try:
                message = await asyncio.wait_for(self._receive(), left)
            except TimeoutError:
                return
            read += len(message.get("body", b""))
            self._body_ended = message["type"] != "http.request" or not message.get("more_body", False)

    async def refuse(self, found: Problem) -> None:
        """Send the reply for a problem."""
        if self._scope["type"] == "websocket" and "websocket.http.response" not in self._scope.get("extensions", {}):
            await self._send({"type": "websocket.close", "code": 1008})
            return
        await reply(found, self._scope)(self._scope, self._receive, self.send)

    def end(self, cut: int) -> int:
        """Return the status for log and metrics. cut: that of a reply that was begun, and that the server broke off."""
        if self.gone:
            return GONE
        if self._scope["type"] == "http" and self.status and not self._replied:
            return cut
        return int(self._scope["state"].get("failed", self.status))

    @property
    def route(self) -> str:
        """The route with its parameters unfilled: what is in a path may be a client's words."""
        return getattr(self._scope.get("route"), "path", self.path)

    def log_line(self, status: int) -> None:
        """Log the request in one line."""
        seconds = time.perf_counter() - self._began
        method = self._scope.get("method", "WS")
        facts = {"method": method, "route": self.route, "status": status, "seconds": round(seconds, 3), "bytes": self._sent}
        line = f"{method} {self.route} {status} {seconds:.2f} s {self._sent} B {self._id}"
        log.info("%s", line, extra={"request": {**facts, "id": self._id}})


def _too_large() -> Problem:
    return Problem(413, f"the body is longer than {MOST_BYTES >> 20} MiB", code="body_too_large", headers={"Connection": "close"})


def _request_id(given: str) -> str:
    """Return the client's id of a request without what a header or a log cannot hold, or a new one."""
    return re.sub(r"[^A-Za-z0-9._:+/=-]", "", given)[:128] or f"req_{secrets.token_hex(12)}"


def _host(origin: str) -> str:
    """Return what a Host header has for an origin."""
    return origin.partition("://")[2]


def _name(host: str) -> str:
    """Return the name in a Host header, without the port and the brackets of IPv6."""
    return re.sub(r":\d*$", "", host).strip("[]").lower()


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
