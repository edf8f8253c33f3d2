"""Connections that stall, on a server in a thread whose limits are short."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from http.client import HTTPConnection
from typing import Any

import msgpack
import pytest
import websockets.sync.client
from fastapi import WebSocket
from websockets.sync.client import connect as websocket

from fishrt import TTS, FishrtError
from fishrt.server import edge, run
from fishrt.speaking.scheduler import ScheduledStream
from serving import LONG, serving_here, speech

pytestmark = pytest.mark.slow  # it waits


@pytest.fixture
def served(tts: TTS, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, Any]]:
    """The port and the service of a server."""
    for module, name in ((run, "_STALL_S"), (run, "_REQUEST_S"), (edge, "_IDLE_S")):
        monkeypatch.setattr(module, name, 0.5)
    monkeypatch.setattr(run, "_PING_S", 3.0)  # a reply fills the buffers of the system in less
    with serving_here(tts) as here:

        @here.app.websocket("/echo")
        async def echo(socket: WebSocket) -> None:
            await socket.accept()
            await socket.send_text(await socket.receive_text())

        yield here.port, here.service


def connect(port: int, sent: bytes, receive_buffer: int | None = None) -> socket.socket:
    found = socket.socket()
    if receive_buffer is not None:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    found.settimeout(60)
    found.connect(("127.0.0.1", port))
    found.sendall(sent)
    return found


def test_a_reader_that_takes_nothing_ends_its_request(served: tuple[int, Any]) -> None:
    port, service = served
    stalled = connect(port, speech(LONG * 20, sample_rate=192_000), receive_buffer=4096)
    assert connect(port, speech()).recv(1 << 16)
    until = time.monotonic() + 60
    while service.scheduler.stats.active:
        assert time.monotonic() < until
        time.sleep(0.05)
    received = b""
    with suppress(ConnectionResetError):
        while data := stalled.recv(1 << 16):
            received += data
    assert not received.endswith(b"0\r\n\r\n")


def test_a_reader_that_takes_a_few_bytes_now_and_then_ends_its_request(served: tuple[int, Any]) -> None:
    """It would hold its slot as long as it likes."""
    port, service = served
    stalled = connect(port, speech(LONG * 20, sample_rate=192_000), receive_buffer=4096)
    assert stalled.recv(2000)
    until = time.monotonic() + 30
    while service.scheduler.stats.active:
        assert time.monotonic() < until
        assert stalled.recv(2000)  # 12 KB in each time in which it is looked at
        time.sleep(0.08)


def test_a_reader_that_is_slow_gets_everything(served: tuple[int, Any]) -> None:
    """It takes a little all the time, so that the reply lasts many times the limit of a stalled one."""
    port, _ = served
    slow = connect(port, speech(LONG[:240], sample_rate=192_000), receive_buffer=1 << 16)
    received = b""
    while not received.endswith(b"\r\n0\r\n\r\n"):
        data = slow.recv(1 << 16)
        assert data
        received += data
        time.sleep(0.02)
    assert len(received) > 10 * 2 * 192_000


def test_a_request_whose_head_does_not_come_is_cut(served: tuple[int, Any]) -> None:
    for sent in (b"", b"POST /v1/audio/speech HTTP/1.1\r\nHo"):
        assert connect(served[0], sent).recv(1) == b""


def test_a_head_that_does_not_come_after_another_request_is_cut(served: tuple[int, Any]) -> None:
    """An idle connection is kept, until the next request begins."""
    kept = HTTPConnection("127.0.0.1", served[0], timeout=60)
    for pause in (0, 1):
        time.sleep(pause)
        kept.request("GET", "/health")
        assert kept.getresponse().read()
    for byte in b"GET /health HT":
        kept.sock.send(bytes([byte]))
        time.sleep(0.01)
    assert kept.sock.recv(1) == b""


def test_a_websocket_is_not_cut(served: tuple[int, Any]) -> None:
    with websockets.sync.client.connect(f"ws://127.0.0.1:{served[0]}/echo") as socket:
        time.sleep(1)
        socket.send("Hi.")
        assert socket.recv() == "Hi."


def test_the_bodies_of_all_requests_together_are_bounded(served: tuple[int, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge, "MOST_HELD", 200_000)
    monkeypatch.setattr(edge, "_IDLE_S", 60)
    long = speech("Hi.", unknown="x" * 150_000)
    with connect(served[0], long[:-10]):
        until = time.monotonic() + 30
        while (refused := connect(served[0], long).recv(100)).split()[1] != b"429":
            assert time.monotonic() < until
        assert b"retry-after: 5" in refused
        assert connect(served[0], speech()).recv(100).split()[1] == b"200"
    while connect(served[0], long).recv(100).split()[1] != b"200":
        assert time.monotonic() < until


def test_a_body_that_stops_is_answered(served: tuple[int, Any]) -> None:
    asked = connect(served[0], speech()[:-3])
    assert asked.recv(1 << 16).split()[1] == b"408"


def test_a_fault_in_the_middle_cuts_the_connection(served: tuple[int, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its last chunk, so that the client does not take the part for the whole."""
    port, _ = served
    usual, taken = ScheduledStream.__anext__, []

    async def next_or_fault(stream: ScheduledStream) -> Any:
        if len(taken) == 2:
            raise FishrtError("the codes have no sound")
        taken.append(await usual(stream))
        return taken[-1]

    monkeypatch.setattr(ScheduledStream, "__anext__", next_or_fault)
    asked = connect(port, speech("Good morning."))
    received = b""
    while data := asked.recv(1 << 16):
        received += data
    assert received.startswith(b"HTTP/1.1 200")
    assert not received.endswith(b"0\r\n\r\n")
    taken.clear()
    told = connect(port, speech("Good morning.", stream_format="sse"))
    while data := told.recv(1 << 16):
        received += data
        if b"0\r\n\r\n" in data:
            break
    assert b"speech.audio.error" in received
    metrics = HTTPConnection("127.0.0.1", port, timeout=60)
    metrics.request("GET", "/metrics")
    assert b'fishrt_requests_total{route="/v1/audio/speech",status="500"} 2.0' in metrics.getresponse().read()


def test_a_socket_whose_client_reads_nothing_is_cut(served: tuple[int, Any]) -> None:
    port, service = served
    url, sock = f"ws://127.0.0.1:{port}/v1/tts/live", connect(port, b"", receive_buffer=4096)
    with websocket(url, sock=sock, compression=None, max_queue=1, ping_interval=None, close_timeout=1) as stalled:
        request = {"text": LONG * 20, "format": "pcm", "sample_rate": 192_000}
        stalled.send(msgpack.packb({"event": "start", "request": request}))
        stalled.send(msgpack.packb({"event": "flush"}))
        assert msgpack.unpackb(stalled.recv())["event"] == "audio"
        assert service.at_end
        until = time.monotonic() + 60
        while service.at_end or service.scheduler.stats.active:
            assert time.monotonic() < until
            time.sleep(0.05)


def test_a_socket_may_be_idle(served: tuple[int, Any]) -> None:
    """Clients keep it for their next text: the limit for the head of a request is not for it."""
    with websocket(f"ws://127.0.0.1:{served[0]}/v1/tts/live") as socket:
        time.sleep(2)
        socket.send(msgpack.packb({"event": "start", "request": {"text": "Hi.", "format": "pcm"}}))
        socket.send(msgpack.packb({"event": "stop"}))
        assert msgpack.unpackb(socket.recv())["event"] == "audio"
