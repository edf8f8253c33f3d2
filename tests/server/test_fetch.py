"""Recordings by URL: only public addresses, one resolution, bounds of bytes and time. The servers are real, on the loopback."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("httpcore2", reason="needs the server extra")

from fishrt.server.voices.fetch import Fetcher, FetchError, is_public, resolve

Answer = Callable[[asyncio.StreamWriter], Awaitable[None]]


class Loopback:
    """A server that records what it is asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.port = 0

    async def resolve(self, host: str, port: int) -> list[str]:
        self.asked.append(f"resolve {host}")
        return ["127.0.0.1"]

    def fetcher(self, **options: Any) -> Fetcher:
        """A fetcher to which the loopback is public."""
        return Fetcher(**{"resolve": self.resolve, "is_public": lambda address: address == "127.0.0.1", **options})


@asynccontextmanager
async def serving(answer: bytes | Answer, tls: ssl.SSLContext | None = None) -> AsyncIterator[Loopback]:
    found = Loopback()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            found.asked.append((await reader.readuntil(b"\r\n\r\n")).decode())
            if isinstance(answer, bytes):
                writer.write(answer)
            else:
                await answer(writer)
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0, ssl=tls)
    found.port = server.sockets[0].getsockname()[1]
    async with server:
        yield found


def reply(body: bytes = b"RIFF", status: str = "200 OK", headers: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{headers}\r\n".encode() + body


def fetched(answer: bytes | Answer, path: str = "/a.wav", **options: Any) -> tuple[bytes, list[str]]:
    async def run() -> tuple[bytes, list[str]]:
        async with serving(answer) as server:
            return await server.fetcher(**options).fetch(f"http://voices.example:{server.port}{path}"), server.asked

    return asyncio.run(run())


@pytest.mark.parametrize("address", ["1.1.1.1", "93.184.215.14", "2606:4700::1111", "2a00:1450:4001::200e"])
def test_public_addresses(address: str) -> None:
    assert is_public(address)


PRIVATE = """127.0.0.1 127.1.2.3 0.0.0.0 0.1.2.3 10.0.0.1 172.16.0.1 192.168.1.1 169.254.169.254 100.64.0.1 192.0.0.8 192.0.2.1
192.88.99.1 198.18.0.1 198.51.100.7 203.0.113.9 224.0.0.1 239.255.255.250 240.0.0.1 255.255.255.255
:: ::1 ::127.0.0.1 ::ffff:127.0.0.1 ::ffff:8.8.8.8 ::ffff:7f00:1 64:ff9b::7f00:1 64:ff9b::808:808 64:ff9b:1::a00:1 100::1
2001::1 2001:0:4136:e378:8000:63bf:3fff:fdd2 2001:10::1 2001:db8::1 2002:7f00:1:: 2002:808:808:: 3fff::1 5f00::1
fc00::1 fd12::1 fe80::1 fe80::1%1 2606:4700::1111%1 fec0::1 ff02::1 ff0e::1 localhost 2130706433 0x7f000001 0177.0.0.1""".split()


@pytest.mark.parametrize("address", PRIVATE)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)


HERE = """127.0.0.1 127.1 127.0.1 2130706433 0x7f000001 0x7f.0.0.1 0X7F.1 0177.0.0.1 017700000001 0 0.0.0.0 localhost LOCALHOST
localhost. 127.0.0.1. 127.0.0.1.. [::1] [::] [0:0:0:0:0:0:0:1] [::ffff:127.0.0.1] [::ffff:7f00:1] [::127.0.0.1] [64:ff9b::7f00:1]
[2002:7f00:1::] [fe80::1%25lo] [::1%25lo] 127。0。0。1 １２７.0.0.1 ①②⑦.0.0.1 10.0.0.1 169.254.169.254 [fd00::1] 8.8.8.8@127.0.0.1
127.0.0.1#@8.8.8.8 127.0.0.1%00.example 127.0.0.1%2f.example""".split()


@pytest.mark.parametrize("host", HERE)
@pytest.mark.parametrize("port", [False, True])
def test_no_spelling_reaches_this_machine(host: str, port: bool) -> None:
    async def run() -> list[str]:
        async with serving(reply()) as server:
            where = f"{host}:{server.port}" if port and "#" not in host else host
            with pytest.raises(FetchError, match=r"not on the public internet|not valid|unusual spelling|unknown"):
                await Fetcher(most_s=5).fetch(f"http://{where}/")
            return server.asked

    assert asyncio.run(run()) == []


BAD = """ftp://voices.example/a file:///etc/passwd gopher://voices.example/ http:voices.example http:/voices.example/ http://
http:///a //voices.example/a http://user@voices.example/ http://user:word@voices.example/ http://voices.example:99999/
http://voices.example:x/ http://voices.example\\@127.0.0.1/ http://[::1 http://voices..example/ https://:443/ http://a%20b/""".split()


@pytest.mark.parametrize(
    "url", [*BAD, "http://voices.example/a b", "http://voices.example/\r\nHost: x", " http://a/", "http://\0/"]
)
def test_what_is_no_url_of_a_recording_is_never_resolved(url: str) -> None:
    server = Loopback()
    with pytest.raises(FetchError, match="not valid"):
        asyncio.run(server.fetcher().fetch(url))
    assert server.asked == []


def test_all_addresses_of_a_name_must_be_public() -> None:
    for addresses in (["1.1.1.1", "10.0.0.1"], ["2606:4700::1111", "::1"], []):

        async def several(host: str, port: int, found: list[str] = addresses) -> list[str]:
            return found

        with pytest.raises(FetchError, match="not on the public internet"):
            asyncio.run(Fetcher(resolve=several).fetch("http://voices.example/"))


def test_a_name_is_resolved_once_and_stays_in_the_request() -> None:
    body, asked = fetched(reply(b"sound"), "/a%20b/é.wav?key=1%2F2&x=y#part")
    assert body == b"sound"
    assert asked[0] == "resolve voices.example"
    assert len(asked) == 2
    first, *headers = asked[1].split("\r\n")
    assert first == "GET /a%20b/%C3%A9.wav?key=1%2F2&x=y HTTP/1.1"
    names = {line.partition(":")[0].lower() for line in headers if line}
    assert names == {"host", "accept", "accept-encoding", "user-agent", "connection"}
    assert next(line for line in headers if line.startswith("Host")).startswith("Host: voices.example:")


def test_the_next_address_is_tried_if_one_does_not_answer() -> None:
    async def run() -> bytes:
        async with serving(reply()) as server:

            async def two(host: str, port: int) -> list[str]:
                return ["127.0.0.2", "127.0.0.1"]

            return await server.fetcher(resolve=two, is_public=lambda _: True).fetch(f"http://voices.example:{server.port}/")

    assert asyncio.run(run()) == b"RIFF"


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent", "300 Many"])
def test_redirects_are_not_followed(status: str) -> None:
    with pytest.raises(FetchError, match="redirects"):
        fetched(reply(status=status, headers="Location: http://127.0.0.1/secret\r\n"))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (reply(status="404 Not Found"), "status 404"),
        (reply(status="206 Partial Content"), "status 206"),
        (reply(headers="Content-Encoding: gzip\r\n"), "compressed"),
        (reply(headers="Content-Encoding: br\r\n"), "compressed"),
        (reply(bytes(1001)), "longer than 1,000 bytes"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999\r\n\r\n", "longer than"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 999999999999999999999999\r\n\r\n", "broken"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + bytes(1001), "longer than"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort", "broken"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", "broken"),
        (b"what?\r\n\r\n", "broken"),
        (b"HTTP/1.1 200 OK\r\nX: " + bytes(200_000), "broken"),
        (b"", "broken"),
    ],
)
def test_bad_answers(answer: bytes, message: str) -> None:
    with pytest.raises(FetchError, match=message):
        fetched(answer, most_bytes=1000)


def test_a_body_of_the_longest_size_is_taken() -> None:
    assert fetched(reply(bytes(1000)), most_bytes=1000)[0] == bytes(1000)


def test_an_endless_body_ends_at_the_limit() -> None:
    async def endless(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            writer.write(b"400\r\n" + bytes(1024) + b"\r\n")
            await writer.drain()

    with pytest.raises(FetchError, match="longer than 100,000 bytes"):
        fetched(endless, most_bytes=100_000)


@pytest.mark.parametrize("start", [b"", b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 100 Continue\r\n\r\n"])
def test_a_server_that_drips_is_left_after_the_time_for_all(start: bytes) -> None:
    """Each byte arrives in time, and there is no end of them."""

    async def dripping(writer: asyncio.StreamWriter) -> None:
        writer.write(start)
        while start:
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n" if b"100" in start else b"x")
            await writer.drain()
            await asyncio.sleep(0.02)
        await asyncio.Event().wait()

    with pytest.raises(FetchError, match=r"within 0\.3 s"):
        fetched(dripping, most_s=0.3)


def test_a_resolver_that_does_not_answer_is_left() -> None:
    async def never(host: str, port: int) -> list[str]:
        await asyncio.Event().wait()
        return []

    with pytest.raises(FetchError, match=r"within 0\.1 s"):
        asyncio.run(Fetcher(resolve=never, most_s=0.1).fetch("http://voices.example/"))


def test_no_proxy_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert fetched(reply())[0] == b"RIFF"


def test_a_refused_connection_and_an_unknown_name() -> None:
    async def unknown(host: str, port: int) -> list[str]:
        return await resolve("no-such-name.invalid", port)

    with pytest.raises(FetchError, match="no connection"):
        asyncio.run(Loopback().fetcher().fetch("http://voices.example:9/"))
    with pytest.raises(FetchError, match="unknown"):
        asyncio.run(Fetcher(resolve=unknown).fetch("http://voices.example/"))


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl for a certificate")
def test_tls_names_the_host_and_checks_its_certificate(tmp_path: Path) -> None:
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    make = f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout {key} -out {cert} -days 2"
    make += " -subj /CN=voices.example -addext subjectAltName=DNS:voices.example"
    subprocess.run(make.split(), check=True, capture_output=True)
    named: list[str | None] = []
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_side.load_cert_chain(cert, key)
    server_side.sni_callback = lambda _, name, __: named.append(name)
    trusting = ssl.create_default_context(cafile=str(cert))

    async def run(host: str, context: ssl.SSLContext | None) -> bytes:
        async with serving(reply(), server_side) as server:
            return await server.fetcher(ssl_context=context).fetch(f"https://{host}:{server.port}/a.wav")

    assert asyncio.run(run("voices.example", trusting)) == b"RIFF"
    for host, context in (("other.example", trusting), ("voices.example", None)):
        with pytest.raises(FetchError, match="no connection"):
            asyncio.run(run(host, context))
    assert named == ["voices.example", "other.example", "voices.example"]
