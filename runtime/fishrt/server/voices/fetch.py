"""Recordings by URL: fetched from public addresses only, bounded in bytes and in time.

A client that could name any URL could reach what only this machine reaches. So a name is resolved once, all of its addresses are
checked, and the connection goes to one of them: a name that changes its address between the check and the connection gains
nothing. There are no redirects, no proxies, no cookies and no compressed bodies.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any
from urllib.parse import quote, urlsplit

import httpcore2

from ...errors import VoiceError

MOST_BYTES = 32 << 20
"""Longest recording that is fetched."""
MOST_SECONDS = 20.0
"""Longest time for all of it: name, connection and body."""
_MOST_AT_ONCE = 8
_NAMES = ThreadPoolExecutor(4, thread_name_prefix="names")
"""Threads of their own: names that nobody answers for must not fill those that the rest of the server uses."""
_PORTS = {"http": 80, "https": 443}
_NUMBER = re.compile(r"(?:0x[0-9a-f]*|[0-9]+)\.?", re.IGNORECASE)
"""The last label of a host that is a number in some spelling: 127.1, 0x7f.0.0.1, 2130706433."""
_GLOBAL_6 = ipaddress.ip_network("2000::/3")
_NOT_PUBLIC = [
    ipaddress.ip_network(each)
    for each in (
        "0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12 192.0.0.0/24 192.0.2.0/24 192.88.99.0/24 "
        "192.168.0.0/16 198.18.0.0/15 198.51.100.0/24 203.0.113.0/24 224.0.0.0/3 "
        "2001::/23 2001:db8::/32 2002::/16 3fff::/20"
    ).split()
]
"""Special addresses of IANA's registries (`is_global` differs between versions of Python), multicast, and those of IPv6 that
carry one of IPv4: Teredo is in 2001::/23, 6to4 is 2002::/16; NAT64 and mapped addresses are outside 2000::/3."""

Resolve = Callable[[str, int], Awaitable[Iterable[str]]]
"""Name and port → all of its addresses. Raises OSError."""


class FetchError(VoiceError):
    """A recording cannot be fetched."""


async def resolve(host: str, port: int) -> list[str]:
    """Return the addresses of a name, as the system gives them. Raises OSError."""
    ask = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
    found = await asyncio.get_running_loop().run_in_executor(_NAMES, ask)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def is_public(address: str) -> bool:
    """Return whether an address is one of the public internet, and carries no other address."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(parsed, ipaddress.IPv6Address) and (parsed not in _GLOBAL_6 or parsed.scope_id is not None):
        return False
    return not any(parsed in part for part in _NOT_PUBLIC)


class Fetcher:
    """Fetches recordings by their URLs."""

    def __init__(
        self,
        *,
        resolve: Resolve = resolve,
        is_public: Callable[[str], bool] = is_public,
        most_bytes: int = MOST_BYTES,
        most_s: float = MOST_SECONDS,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        """Make a fetcher. ssl_context: None trusts the certificates that the system trusts."""
        self._backend, self._ssl = _Public(resolve, is_public), ssl_context or httpcore2.default_ssl_context()
        self._most_bytes, self._most_s = most_bytes, most_s
        self._slots = asyncio.Semaphore(_MOST_AT_ONCE)

    async def fetch(self, url: str) -> bytes:
        """Return the body of a URL. Raises FetchError."""
        target = _parsed(url)
        try:
            async with asyncio.timeout(self._most_s), self._slots:
                return await self._get(target)
        except TimeoutError:
            raise FetchError(f"the URL of a recording did not answer within {self._most_s:g} s") from None
        except (httpcore2.NetworkError, httpcore2.ProtocolError, httpcore2.TimeoutException, OSError) as error:
            raise FetchError(f"the URL of a recording cannot be fetched: {_reason(error)}") from None

    async def _get(self, url: httpcore2.URL) -> bytes:
        headers = [(b"Host", _host(url)), (b"Accept", b"audio/*, */*;q=0.5"), (b"Accept-Encoding", b"identity")]
        request = httpcore2.Request(b"GET", url, headers=[*headers, (b"User-Agent", b"fishrt"), (b"Connection", b"close")])
        async with httpcore2.AsyncConnectionPool(network_backend=self._backend, ssl_context=self._ssl) as pool:
            response = await pool.handle_async_request(request)
            try:
                self._check(response)
                body = bytearray()
                async for part in response.aiter_stream():
                    body += part
                    if len(body) > self._most_bytes:
                        raise self._too_long()
                return bytes(body)
            finally:
                await response.aclose()

    def _check(self, response: httpcore2.Response) -> None:
        headers = {name.lower(): value for name, value in response.headers}
        if 300 <= response.status < 400:
            raise FetchError("the URL of a recording redirects to another one", hint="give the URL that it redirects to")
        if response.status != 200:
            raise FetchError(f"the URL of a recording answers with status {response.status}")
        if headers.get(b"content-encoding", b"identity").strip().lower() != b"identity":
            raise FetchError("the URL of a recording answers with a compressed body, which was not asked for")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > self._most_bytes:
            raise self._too_long()

    def _too_long(self) -> FetchError:
        return FetchError(f"the recording at a URL is longer than {self._most_bytes:,} bytes", hint="give a shorter one")


class _Public(httpcore2.AsyncNetworkBackend):
    """Connections to public addresses. The name stays in the Host header and in TLS."""

    def __init__(self, resolve: Resolve, is_public: Callable[[str], bool]) -> None:
        self._resolve, self._is_public = resolve, is_public
        self._sockets = httpcore2.AnyIOBackend()

    async def connect_tcp(self, host: str, port: int, *args: Any, **options: Any) -> httpcore2.AsyncNetworkStream:
        """Connect to the first address of `host` that answers, if all are public. Raises FetchError, OSError."""
        addresses = list(await self._resolve(host, port))
        if not addresses or not all(map(self._is_public, addresses)):
            raise FetchError("the URL of a recording is not on the public internet")
        for address in addresses[:-1]:
            try:
                return await self._sockets.connect_tcp(address, port, *args, **options)
            except httpcore2.ConnectError:
                continue
        return await self._sockets.connect_tcp(addresses[-1], port, *args, **options)


def _parsed(url: str) -> httpcore2.URL:
    """Return the parts of a URL, taken apart once: a second parser could see another host. Raises FetchError."""
    try:
        if re.search(r"[\x00-\x20\x7f\\]", url):
            raise ValueError
        parts = urlsplit(url)
        host, scheme = parts.hostname or "", parts.scheme.lower()
        host = host if ":" in host else host.encode("idna").decode()
        port = parts.port or _PORTS[scheme]
    except (ValueError, KeyError):
        raise FetchError("the URL of a recording is not valid", hint="give http://… or https://…") from None
    if not host or "@" in parts.netloc or "%" in host:
        raise FetchError("the URL of a recording is not valid", hint="give http://… or https://…, without a user's name")
    if ":" not in host and _NUMBER.fullmatch(host.rstrip(".").rpartition(".")[2]):
        try:
            ipaddress.IPv4Address(host)
        except ValueError:
            raise FetchError("the URL of a recording has an address in an unusual spelling") from None
    path = quote(parts.path or "/", safe="/%:=&~+!$,;'@()*") + (
        f"?{quote(parts.query, safe='/%:=&?~+!$,;@()*')}" if parts.query else ""
    )
    return httpcore2.URL(scheme=scheme.encode(), host=host.encode(), port=port, target=path.encode())


def _host(url: httpcore2.URL) -> bytes:
    host = b"[%b]" % url.host if b":" in url.host else url.host
    return host if url.port == _PORTS[url.scheme.decode()] else host + f":{url.port}".encode()


def _reason(error: Exception) -> str:
    """Return what went wrong, without addresses, which a client need not learn."""
    if isinstance(error, OSError):
        return "its host is unknown" if isinstance(error, socket.gaierror) else "no connection"
    return {httpcore2.ConnectError: "no connection", httpcore2.ConnectTimeout: "no connection"}.get(
        type(error), "its answer is broken"
    )
