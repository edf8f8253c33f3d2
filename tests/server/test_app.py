"""What every request passes: paths, keys, ids, origins, bounds, errors."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from starlette.testclient import WebSocketDenialResponse
from starlette.websockets import WebSocketDisconnect

from fishrt import TTS, FishrtError
from fishrt.cli.serve import serve
from fishrt.kinds.columns import ColumnJob, ColumnTurns
from fishrt.server.app import create_app
from fishrt.server.edge import MOST_BYTES, canonical
from fishrt.server.problems import problem
from fishrt.server.settings import Settings
from fishrt.speaking.turns import Turns

Start = Callable[..., TestClient]
SPEECH = "/v1/audio/speech"
HI = {"input": "Hi.", "seed": 1}


def error(reply: Any) -> dict[str, Any]:
    found: dict[str, Any] = reply.json()["error"]
    assert set(found) == {"message", "type", "param", "code"}
    assert found["message"]
    return found


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("/v1/audio/speech", SPEECH),
        ("/audio/speech", SPEECH),
        ("//v1/audio/speech", SPEECH),
        ("/v1/audio/speech/", SPEECH),
        ("/v1/v1/audio/speech", SPEECH),
        ("/v1/audio/speech/audio/speech", SPEECH),
        ("/audio/speech/audio/speech", SPEECH),
        ("/v1/audio/speech/v1/audio/speech", SPEECH),
        ("/v1/audio/speech/audio/voices", "/v1/audio/voices"),
        ("/v1/audio/speech/models", "/v1/models"),
        ("/v1/audio/speech/batch", "/v1/audio/speech/batch"),
        ("/audio/speech/batch", "/v1/audio/speech/batch"),
        ("/models/minnow", "/v1/models/minnow"),
        ("/voices", "/v1/voices"),
        ("/model", "/model"),
        ("/", "/"),
        ("/health", "/health"),
        ("/v1", "/v1"),
        ("/audiobooks", "/audiobooks"),
    ],
)
def test_the_path_of_a_route_however_it_is_written(path: str, wanted: str) -> None:
    assert canonical(path) == wanted


@pytest.mark.parametrize("path", ["/audio/speech", "/v1/audio/speech/audio/speech", "/v1/audio/speech/"])
def test_speech_below_every_base_url(client: TestClient, path: str) -> None:
    assert client.post(path, json=HI).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("GET", "/nothing", 404, "no such path"),
        ("POST", "/v1/tts/nothing", 404, "no such path"),
        ("GET", SPEECH, 405, "takes POST;"),
        ("DELETE", "/v1/models", 405, "takes GET"),
    ],
)
def test_errors_of_routing_have_the_object_too(client: TestClient, method: str, path: str, status: int, message: str) -> None:
    reply = client.request(method, path)
    assert reply.status_code == status
    assert error(reply)["type"] == "invalid_request_error"
    assert message in error(reply)["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"{",
        b"[]",
        b'"text"',
        b"null",
        b"{'input': 'Hi.'}",
        b'{"input": NaN}',
        b"\xff\xfe\xfa",
        b"[" * 100_000,
        b'{"seed": 1' + b"0" * 10_000 + b"}",
    ],
    ids=lambda body: str(body[:12]),
)
def test_a_body_that_is_no_json_object(client: TestClient, body: bytes) -> None:
    reply = client.post(SPEECH, content=body, headers={"Content-Type": "application/json"})
    assert reply.status_code == 400
    assert error(reply)["code"] == "invalid_json"


def test_json_needs_no_content_type(client: TestClient) -> None:
    for kind in ("text/plain", "application/octet-stream", ""):
        assert client.post(SPEECH, content=json.dumps(HI), headers={"Content-Type": kind}).status_code == 200


def test_a_body_that_is_too_long(client: TestClient) -> None:
    def parts() -> Iterator[bytes]:
        yield b'{"input": "'
        for _ in range(MOST_BYTES >> 20):
            yield b"a" * (1 << 20)

    for content in (b"a" * (MOST_BYTES + 1), parts()):
        reply = client.post(SPEECH, content=content)
        assert reply.status_code == 413
        assert error(reply)["code"] == "body_too_large"


OPEN = ["/health", "/v1/health", "/v1/models", "/v1/models/minnow", "/v1/audio/models", "/models", "/docs", "/openapi.json"]


@pytest.fixture(scope="module")
def locked(start: Start) -> TestClient:
    return start(api_key="sesame")


@pytest.mark.parametrize("path", OPEN)
def test_what_needs_no_key(locked: TestClient, path: str) -> None:
    assert locked.get(path).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer "},
        {"Authorization": "Bearer other"},
        {"Authorization": "Bearer sesame2"},
        {"Authorization": "sesame"},
        {"Authorization": "Basic sesame"},
        {"X-Api-Key": "Sesame"},
        {"X-Api-Key": "s\u00e9same"},
    ],
)
@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", SPEECH), ("POST", "/audio/speech/batch"), ("GET", "/metrics"), ("GET", "/nothing"), ("POST", "/v1/models")],
)
def test_what_needs_the_key(locked: TestClient, method: str, path: str, headers: dict[str, str]) -> None:
    sent = {name: value.encode("latin-1") for name, value in headers.items()}
    reply = locked.request(method, path, headers=sent)  # type: ignore[arg-type]
    assert reply.status_code == 401
    assert error(reply)["code"] == "invalid_api_key"
    assert reply.headers["www-authenticate"] == "Bearer"


def test_the_key_is_not_taken_from_the_query_of_a_request(locked: TestClient) -> None:
    assert locked.post(f"{SPEECH}?api_key=sesame", json=HI).status_code == 401


@pytest.mark.parametrize(
    "headers", [{"Authorization": "Bearer sesame"}, {"Authorization": "bearer  sesame"}, {"X-Api-Key": "sesame"}]
)
def test_the_key(locked: TestClient, headers: dict[str, str]) -> None:
    assert locked.post(SPEECH, json=HI, headers=headers).status_code == 200


@pytest.mark.parametrize("value", ["Bearer ", "Bearer none", "Basic eDp5", "x"])
def test_without_a_key_every_authorization_passes(client: TestClient, value: str) -> None:
    assert client.post(SPEECH, json=HI, headers={"Authorization": value}).status_code == 200


@pytest.mark.parametrize("accept", ["application/octet-stream", "audio/*", "image/png", "application/json"])
def test_no_accept_is_refused(client: TestClient, accept: str) -> None:
    reply = client.post(SPEECH, json=HI, headers={"Accept": accept})
    assert (reply.status_code, reply.headers["content-type"]) == (200, "audio/mpeg")


def test_the_id_of_a_request(client: TestClient) -> None:
    assert client.get("/health", headers={"X-Request-Id": "abc-1.2:3"}).headers["x-request-id"] == "abc-1.2:3"
    made = [client.get("/nothing").headers["x-request-id"] for _ in range(2)]
    assert made[0] != made[1]
    unsafe = 'a\u00e9<b> "c'.encode("latin-1") + b"d" * 5000
    found = client.get("/health", headers={"X-Request-Id": unsafe}).headers["x-request-id"]  # type: ignore[dict-item]
    assert found == ("abcd" + "d" * 5000)[:128]


def test_no_header_holds_what_a_client_invents(client: TestClient) -> None:
    evil = {"input": "Hi.", "voice": "x\r\nSet-Cookie: a=b", "x\r\ny": 1, "language": "e\r\nn", "model": "m\r\n\u00e9"}
    for fields in (evil, {**evil, "voice": None}):
        reply = client.post(SPEECH, json=fields)
        assert "set-cookie" not in reply.headers
        for name, value in reply.headers.items():
            assert all(" " <= char <= "~" for char in name + value), name


def test_a_web_page_of_another_site_starts_nothing(client: TestClient, start: Start) -> None:
    other = {"Origin": "https://evil.example", "Content-Type": "text/plain"}
    reply = client.post(SPEECH, content=json.dumps(HI), headers=other)
    assert reply.status_code == 403
    assert "access-control-allow-origin" not in reply.headers
    assert client.get("/health", headers=other).status_code == 200
    assert client.post(SPEECH, json=HI, headers={"Origin": "null"}).status_code == 403
    allowed = start(cors_origins=("https://evil.example",)).post(SPEECH, json=HI, headers=other)
    assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, "https://evil.example")
    assert "X-Seed" in allowed.headers["access-control-expose-headers"]


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        ("127.0.0.1:8080", "http://127.0.0.1:8080", 200),
        ("localhost:8080", "http://localhost:8080", 200),
        ("[::1]:8080", "http://[::1]:8080", 200),
        ("127.0.0.1:8080", "http://127.0.0.1:9999", 403),
        ("rebound.example:8080", "http://rebound.example:8080", 403),
    ],
)
def test_the_page_itself_may_speak(client: TestClient, host: str, origin: str, status: int) -> None:
    """A name of another site that leads to this machine is not the page, though its origin and host agree."""
    assert client.post(SPEECH, json=HI, headers={"Host": host, "Origin": origin}).status_code == status


READ = ["/", "/health", "/v1/health", "/v1/voices", "/metrics", "/openapi.json", "/page/main.js", "/nothing"]


@pytest.mark.parametrize("path", READ)
def test_a_page_of_another_name_reads_nothing_of_this_machine(client: TestClient, path: str) -> None:
    """A name whose owner lets it lead to this machine: what a browser gets there has no Origin, and is a page's to read."""
    for host in ("rebound.example:8080", "rebound.example", "127.0.0.1.rebound.example", "10.0.0.1:8080", "[fe80::1]", "x"):
        reply = client.get(path, headers={"Host": host})
        assert (reply.status_code, error(reply)["code"]) == (403, "host_refused")
        assert "--api-key" in error(reply)["message"]
        assert client.post(SPEECH, json=HI, headers={"Host": host}).status_code == 403
        with pytest.raises(WebSocketDenialResponse), client.websocket_connect("/v1/tts/live", headers={"Host": host}):
            pass


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:8080", "127.9.9.9", "[::1]", "[::1]:8080", ""])
def test_this_machine_is_answered_by_each_of_its_names(client: TestClient, host: str) -> None:
    assert client.get("/metrics", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    ("settings", "host", "status"),
    [
        ({"cors_origins": ("https://tts.example",)}, "tts.example", 200),
        ({"cors_origins": ("https://tts.example:8443",)}, "tts.example", 200),
        ({"cors_origins": ("https://tts.example",)}, "other.example", 403),
        ({"cors_origins": ("*",)}, "other.example", 200),
        ({"api_key": "sesame"}, "tts.example", 200),
        ({"host": "0.0.0.0"}, "tts.example", 200),
        ({"host": "localhost"}, "tts.example", 403),
        ({"host": "::1"}, "tts.example", 403),
    ],
)
def test_the_names_of_a_server_behind_a_proxy(start: Start, settings: dict[str, Any], host: str, status: int) -> None:
    sent = {"Host": host, "X-Api-Key": "sesame"}
    assert start(**settings).get("/v1/voices", headers=sent).status_code == status
    assert start(**settings).post(SPEECH, json=HI, headers={**sent, "Origin": f"https://{host}"}).status_code == status


def test_replies_are_what_they_say(client: TestClient) -> None:
    for path in ("/health", "/docs", "/nothing"):
        assert client.get(path).headers["x-content-type-options"] == "nosniff"
    assert "default-src 'self'" in client.get("/docs").headers["content-security-policy"]


def test_health(client: TestClient) -> None:
    reply = client.get("/health")
    assert reply.status_code == 200
    assert reply.json() == {
        "status": "ok",
        "model": "minnow",
        "version": "0.1.0",
        "provider": "cpu",
        "needs_key": False,
        "queue": {"waiting": 0, "active": 0, "max_queue": 64, "max_active": 8},
    }
    assert client.post("/v1/health").json() == reply.json()
    assert client.head("/health").status_code == 200


def test_a_server_that_drains_refuses_with_its_reason(start: Start) -> None:
    client = start()
    client.app.state.service.drain()  # type: ignore[attr-defined]
    assert (client.get("/health").status_code, client.get("/health").json()["status"]) == (503, "draining")
    reply = client.post(SPEECH, json=HI)
    assert (reply.status_code, error(reply)["code"]) == (503, "draining")


def test_metrics_count_what_happened(start: Start) -> None:
    client = start()
    frames = int(client.post(SPEECH, json=HI).headers["x-completion-tokens"])
    client.post(SPEECH, json={})
    lines = client.get("/metrics").text.splitlines()
    found = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert float(found["fishrt_frames_total"]) == frames
    assert float(found["fishrt_audio_seconds_total"]) == pytest.approx(frames * 640 / 16_000)
    assert float(found['fishrt_requests_total{route="/v1/audio/speech",status="200"}']) == 1
    assert float(found['fishrt_requests_total{route="/v1/audio/speech",status="400"}']) == 1
    assert float(found["fishrt_first_audio_seconds_count"]) == 1


def test_the_description_says_what_is_there(client: TestClient) -> None:
    found = client.get("/openapi.json").json()
    assert {"/v1/audio/speech", "/v1/audio/speech/batch", "/v1/models", "/health", "/metrics"} <= found["paths"].keys()
    for path, methods in found["paths"].items():
        for operation in methods.values():
            assert "422" not in operation["responses"], path
            assert operation["summary"]
    assert {"get", "post"} <= found["paths"]["/v1/health"].keys()
    assert found["x-websockets"].keys() == {"/v1/tts/live", "/v1/audio/speech/stream"}
    page = unescape(client.get("/docs").text)
    assert all(path in page for path in found["paths"])
    assert all(f"WebSocket {path}" in page and said in page for path, said in found["x-websockets"].items())
    assert '"flush"' in page
    assert "http" not in page.replace("http-equiv", "")


def test_a_fault_of_the_server_says_nothing_of_its_inside() -> None:
    found = problem(RuntimeError("/secret/path"))
    assert found.status_code == 500
    assert "secret" not in json.dumps(found.body)


def test_the_log_has_one_line_and_no_text(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "fishrt.server")
    client.post(SPEECH, json={"input": "Secret words."}, headers={"X-Request-Id": "id-7"})
    client.post(SPEECH, json={"input": "Secret words.", "voice": "secret"})
    client.get("/v1/models/secret?secret=1")
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("fishrt.server")]
    assert len(lines) == 3
    assert "secret" not in "".join(lines).lower()
    assert lines[0].startswith("POST /v1/audio/speech 200 ")
    assert lines[0].endswith(" id-7")


def test_a_key_of_any_letters_also_for_websockets(start: Start) -> None:
    client = start(api_key="schlüssel 1")
    assert client.post(SPEECH, json=HI, headers={"X-Api-Key": "schlüssel 1".encode()}).status_code == 200  # type: ignore[dict-item]
    for path in ("/nothing", "/nothing?api_key=x", "/nothing?api_key=schlussel%201"):
        with pytest.raises(WebSocketDenialResponse) as caught, client.websocket_connect(path):
            pass
        assert (caught.value.status_code, error(caught.value)["code"]) == (401, "invalid_api_key")
    with pytest.raises(WebSocketDisconnect) as closed, client.websocket_connect("/nothing?api_key=schl%C3%BCssel%201"):
        pass
    assert not isinstance(closed.value, WebSocketDenialResponse)  # the key is right, and there is no such path


@pytest.mark.parametrize("origin", ["http://[", "x", "", "://", "http://\u00e9"])
def test_an_origin_that_is_none_is_refused(client: TestClient, origin: str) -> None:
    headers = {"Origin": origin.encode("latin-1"), "Host": "[::1"}
    assert client.post(SPEECH, json=HI, headers=headers).status_code == 403  # type: ignore[arg-type]


def test_a_request_that_waits_too_long_is_answered(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that speaks has all the time that it needs."""
    client, usual = start(max_active=1, max_wait=0.3), ColumnTurns._step

    def slow(turns: ColumnTurns, jobs: list[ColumnJob]) -> None:
        time.sleep(0.05)
        usual(turns, jobs)

    monkeypatch.setattr(ColumnTurns, "_step", slow)
    with ThreadPoolExecutor() as pool:
        speaking = pool.submit(client.post, SPEECH, json={"input": "The birds sing in the trees and the sun shines.", "seed": 1})
        while not client.get("/health").json()["queue"]["active"]:
            time.sleep(0.01)
        for path, body in ((SPEECH, HI), (SPEECH, {**HI, "stream": True}), (f"{SPEECH}/batch", {"items": [HI]})):
            late = client.post(path, json=body)
            assert (late.status_code, error(late)["code"]) == (429, "waited_too_long")
            assert 1 <= int(late.headers["retry-after"]) <= 30
        assert not speaking.done()
        assert speaking.result().status_code == 200
    assert client.post(SPEECH, json=HI).status_code == 200


def test_a_model_that_fails_is_told_by_health_until_it_speaks_again(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    client = start()

    def fail(_: Turns) -> None:
        raise RuntimeError("a device with secrets")

    with monkeypatch.context() as patch:
        patch.setattr(Turns, "turn", fail)
        reply = client.post(SPEECH, json=HI)
        assert (reply.status_code, "secrets" in reply.text) == (500, False)
    health = client.get("/health")
    assert (health.status_code, health.json()["status"]) == (503, "failing")
    assert client.post(SPEECH, json=HI).status_code == 200
    assert client.get("/health").status_code == 200


def test_a_server_that_loads_refuses_with_its_reason(tts: TTS) -> None:
    client = TestClient(create_app(tts, Settings()), headers={"Host": "localhost"})  # not entered: its life has not begun
    health = client.get("/health")
    assert (health.status_code, health.json()["status"], bool(health.json()["reason"])) == (503, "loading", True)
    reply = client.post(SPEECH, json=HI)
    assert (reply.status_code, error(reply)["code"], reply.headers["retry-after"]) == (503, "loading", "2")
    assert client.get("/v1/models").status_code == 200


def test_a_model_that_cannot_speak_is_dead(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Turns) -> None:
        raise FishrtError("a graph is damaged")

    with monkeypatch.context() as patch:
        patch.setattr(Turns, "turn", fail)
        client = start()
    health = client.get("/health")
    assert (health.status_code, health.json()["status"]) == (503, "dead")
    assert "a graph is damaged" in health.json()["reason"]
    assert (client.post(SPEECH, json=HI).status_code, client.get("/v1/models").status_code) == (503, 200)


def test_every_option_is_a_variable_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    values = {
        "HOST": "::1",
        "PORT": "1",
        "API_KEY": "a key",
        "MAX_QUEUE": "2",
        "MAX_ACTIVE": "3",
        "MAX_WAIT": "1.5",
        "MAX_TEXT_LENGTH": "4",
        "CORS_ORIGIN": "https://a.example https://b.example",
        "STRICT_VOICES": "1",
        "PCM_RATE": "8000",
        "ALLOW_URL_REFS": "true",
        "WYOMING_PORT": "5",
        "LOG_JSON": "yes",
        "PROVIDER": "cpu",
        "THREADS": "6",
        **{name: str(tmp_path / name) for name in ("BUNDLE", "VOICE_DIR", "MEDIA_DIR", "API_KEY_FILE")},
    }
    named = {option.name for option in serve.params if option.expose_value and option.name != "quiet"}
    assert named == {name.lower().replace("origin", "origins") for name in values}
    for name, value in values.items():
        monkeypatch.setenv(f"FISHRT_{name}", value)
    found = serve.make_context("serve", []).params
    assert (found["host"], found["port"], found["max_queue"], found["pcm_rate"]) == ("::1", 1, 2, 8000)
    assert found["cors_origins"] == ("https://a.example", "https://b.example")
    assert found["max_wait"] == 1.5
    assert (found["strict_voices"], found["allow_url_refs"], found["log_json"]) == (True, True, True)
    assert (found["bundle"], found["media_dir"]) == (tmp_path / "BUNDLE", tmp_path / "MEDIA_DIR")
    assert serve.make_context("serve", ["--max-queue", "9"]).params["max_queue"] == 9
