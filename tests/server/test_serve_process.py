"""`fishrt serve` as a process: start, signals, clients that stall or go away, logs."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from http.client import HTTPResponse
from pathlib import Path

import pytest
from click.testing import CliRunner

from fishrt.cli import main
from serving import LONG, Server, serving, speech, start

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name != "posix", reason="signals of POSIX"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server")) as started:
        yield started


def upload(key: str, body: bytes) -> bytes:
    """Return the bytes of a request with a multipart body."""
    head = f"POST /v1/voices HTTP/1.1\r\nHost: localhost\r\nX-Api-Key: {key}\r\nContent-Length: {len(body)}\r\n"
    return f"{head}Content-Type: multipart/form-data; boundary=b\r\n\r\n".encode() + body


def until_idle(server: Server) -> None:
    """Wait until nothing speaks and nothing waits."""
    until = time.monotonic() + 30
    while any(server.health()["queue"][name] for name in ("active", "waiting")):
        assert time.monotonic() < until
        time.sleep(0.02)


def test_speech_over_a_socket(server: Server) -> None:
    reply = server.ask("POST", "/v1/audio/speech", {"input": "Hi.", "response_format": "pcm"})
    assert reply.status == 200
    assert reply.getheader("Transfer-Encoding") == "chunked"
    assert len(reply.read()) > 0.3 * 32_000


@pytest.mark.parametrize(
    ("options", "variables", "said"),
    [
        ((), {}, "127.0.0.1:{}/, without a key"),
        ((), {"FISHRT_API_KEY": "sesame"}, "127.0.0.1:{}/, with the key"),
        (("--host", "0.0.0.0"), {}, "localhost:{}/, without a key"),
    ],
)
def test_the_second_line_names_the_page_and_whether_it_needs_a_key(
    tmp_path: Path, options: tuple[str, ...], variables: dict[str, str], said: str
) -> None:
    process = start(*options, "--voice-dir", str(tmp_path), **variables)
    assert process.stdout is not None
    first, second = process.stdout.readline(), process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert second == f"To try it: http://{said.format(first.rpartition(':')[2].strip())}\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_an_idle_server_at_once(tmp_path: Path, number: int) -> None:
    with serving(tmp_path) as server:
        idle = server.socket()  # no request comes on it
        half = server.socket(b"POST /v1/audio/speech HTTP/1.1\r\nHo")
        assert server.stop(number) == 0
        assert "Traceback" not in server.log
        assert idle.recv(1) == b""
        assert half.recv(1) == b""


def test_a_stream_ends_whole_after_a_signal(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        reply = server.ask("POST", "/v1/audio/speech", {"input": LONG[:300], "response_format": "pcm", "seed": 1})
        server.process.send_signal(signal.SIGTERM)
        assert len(reply.read()) > 5 * 32_000  # the last chunk came, or http.client would raise IncompleteRead
        assert server.process.wait(30) == 0


def test_a_second_signal_cuts_what_runs(tmp_path: Path) -> None:
    with serving(tmp_path) as server, server.socket(speech(LONG * 20)) as stalled:
        stalled.recv(1)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert server.process.poll() is None
        assert server.stop() == 0
        assert "Traceback" not in server.log
        assert "POST /v1/audio/speech 503 " in server.log


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        process = start("--port", port, "--voice-dir", str(tmp_path))
        _, said = process.communicate(timeout=60)
    assert process.returncode not in (0, None)
    assert [line.split(":")[0] for line in said.splitlines()] == ["error", "hint"]
    assert port in said


@pytest.mark.parametrize(
    "options",
    [
        ("--port", "65536"),
        ("--port", "x"),
        ("--max-active", "0"),
        ("--max-wait", "0"),
        ("--nothing",),
        ("--bundle", "nowhere"),
        ("--voice-dir", __file__),
        ("--media-dir", "nowhere"),
        ("--pcm-rate", "1"),
        ("--host", "not a host"),
        ("--provider", "abacus"),
        ("--api-key-file", "nowhere"),
        ("--api-key-file", os.devnull),
        ("--api-key-file", sys.executable),
        ("--api-key", " "),
        ("--api-key", "x", "--api-key-file", __file__),
        ("--wyoming-port", "x"),
    ],
    ids=lambda options: options[0],
)
def test_a_wrong_option_is_an_error_line(tmp_path: Path, options: tuple[str, ...]) -> None:
    refused(*(() if "--voice-dir" in options else ("--voice-dir", str(tmp_path))), *options)


def refused(*options: str, **variables: str) -> str:
    """Check that a server does not start, in this process. Return what it says."""
    result = CliRunner().invoke(main, ["serve", "--port", "0", *options], env=variables)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    assert "Errno" not in result.stderr
    return result.stderr


def test_a_client_that_goes_away_ends_its_request(server: Server) -> None:
    gone = server.socket(speech(LONG * 10))
    gone.recv(1000)
    gone.close()
    until_idle(server)
    until = time.monotonic() + 10
    while " 499 " not in server.log:
        assert time.monotonic() < until
        time.sleep(0.02)


def test_a_client_that_leaves_a_batch_ends_its_items(server: Server) -> None:
    body = json.dumps({"items": [{"input": LONG * 5}] * 12}).encode()
    head = b"POST /v1/audio/speech/batch HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
    with server.socket(head + body):
        while outstanding(server) != 8:
            time.sleep(0.02)
    until_idle(server)
    assert server.ask("POST", "/v1/audio/speech", {"input": "Hi."}).status == 200
    assert " error: " not in server.log


def test_half_sent_requests_hold_nothing_up(server: Server) -> None:
    halves = [b"POST /v1/audio/speech HTTP/1.1\r\nHo", speech()[:-5], b""] * 20
    held = [server.socket(half) for half in halves]
    assert server.ask("POST", "/v1/audio/speech", {"input": "Hi."}).status == 200
    for each in held:
        each.close()
    until_idle(server)


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"Content-Length: 99999999999\r\n", 413),
        (b"Content-Length: -1\r\n", 400),
        (b"Content-Length: x\r\n", 400),
        (b"Content-Length: 5\r\nContent-Length: 6\r\n", 400),
        (b"Transfer-Encoding: nonsense\r\n", 400),
        (b"No colon\r\n", 400),
    ],
)
def test_headers_that_lie_about_the_body(server: Server, head: bytes, status: int) -> None:
    with server.socket(b"POST /v1/audio/speech HTTP/1.1\r\nHost: localhost\r\n" + head + b"\r\n{}") as asked:
        asked.shutdown(socket.SHUT_WR)
        reply = HTTPResponse(asked)
        reply.begin()
        assert reply.status == status
        assert set(json.loads(reply.read())["error"]) == {"message", "type", "param", "code"}


def test_a_long_body_in_parts_is_refused_while_it_arrives(server: Server) -> None:
    with server.socket(b"POST /v1/audio/speech HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n") as asked:
        for _ in range(40):
            asked.sendall(b"100000\r\n" + b"a" * (1 << 20) + b"\r\n")
        assert asked.recv(100).split()[1] == b"413"


def test_five_hundred_at_once_are_all_answered(server: Server) -> None:
    sockets = [server.socket(speech(max_new_tokens=4)) for _ in range(500)]
    statuses = [each.recv(100).split()[1] for each in sockets]
    for each in sockets:
        each.close()
    assert set(statuses) <= {b"200", b"429"}
    assert statuses.count(b"200") >= 8 + 64


def test_logs_as_json_have_no_text_and_no_key(tmp_path: Path) -> None:
    key = "a-very-secret-key"
    with serving(tmp_path, "--log-json", FISHRT_API_KEY=key) as server:
        for sent in (key, "wrong"):
            body = {"input": "Secret words, number seven.", "max_new_tokens": 3}
            server.ask("POST", f"/v1/audio/speech?api_key={sent}", body, Authorization=f"Bearer {sent}").read()
        with server.socket(upload(key, b"--b\r\nContent-Disposition: secret\rSecret\r\n\r\n--b--")) as odd:
            assert odd.recv(100).split()[1] == b"400"
        assert server.stop() == 0
    records = [json.loads(line) for line in server.log.splitlines()]
    requests = [each for each in records if each.get("route") == "/v1/audio/speech"]
    assert [each["status"] for each in requests] == [200, 401]
    assert {"method", "route", "status", "seconds", "bytes", "id", "time", "level"} == requests[0].keys()
    assert "ecret" not in server.log


def test_an_empty_key_in_the_environment_does_not_open_the_server(tmp_path: Path) -> None:
    assert refused("--voice-dir", str(tmp_path), FISHRT_API_KEY="").startswith("error: the API key is empty")


def test_options_from_the_environment_and_the_key_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("sesame\n")
    with serving(tmp_path, "--api-key-file", str(tmp_path / "key"), FISHRT_MAX_QUEUE="3", FISHRT_PCM_RATE="8000") as server:
        assert server.health()["queue"]["max_queue"] == 3
        asked = {"input": "Hi.", "response_format": "pcm"}
        assert server.ask("POST", "/v1/audio/speech", asked).status == 401
        reply = server.ask("POST", "/v1/audio/speech", asked, Authorization="Bearer sesame")
        assert reply.getheader("X-Audio-Sample-Rate") == "8000"


def outstanding(server: Server) -> int:
    queue = server.health()["queue"]
    return int(queue["waiting"] + queue["active"])


def test_a_full_queue_refuses_until_clients_leave(tmp_path: Path) -> None:
    """Of streams that nobody reads, one has the slot, one is parked, and one waits; the next is refused."""
    with serving(tmp_path, "--max-active", "1", "--max-queue", "1") as server:
        held = []
        for number in range(1, 4):
            held.append(server.socket(speech(LONG * 10, sample_rate=192_000)))
            while number != 3 and not held[-1].recv(1):
                pass
        while outstanding(server) != 3:
            time.sleep(0.02)
        refused = server.ask("POST", "/v1/audio/speech", {"input": "Hi."})
        assert refused.status == 429
        assert 1 <= int(refused.getheader("Retry-After") or 0) <= 30
        assert json.loads(refused.read())["error"]["code"] == "queue_full"
        for count in (2, 1, 0):
            held.pop().close()
            while outstanding(server) != count:
                time.sleep(0.02)
        reply = server.ask("POST", "/v1/audio/speech", {"input": "Hi."})
        assert reply.status == 200
        assert float(reply.getheader("X-Queue-Time") or -1) >= 0
        metrics = server.ask("GET", "/metrics").read().decode()
        assert "\nfishrt_refused_total 1.0\n" in metrics
        assert "\nfishrt_cancelled_total 3.0\n" in metrics


def test_a_stream_that_nobody_reads_is_cut_at_the_end_of_the_server(tmp_path: Path) -> None:
    with serving(tmp_path) as server, server.socket(speech(LONG * 20, sample_rate=192_000)) as stalled:
        stalled.recv(1)
        assert server.stop() == 0
        assert "Traceback" not in server.log
        assert "POST /v1/audio/speech 503 " in server.log
        assert "POST /v1/audio/speech 200 " not in server.log
