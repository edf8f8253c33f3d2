"""Requests that nobody meant: whatever is in them, the reply is speech or an error object, and never a fault of the server."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote

import msgpack
import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fishrt.server.speech.fields import SPELLINGS

pytestmark = pytest.mark.slow  # hundreds of requests

_SPELLINGS = sorted(
    {*SPELLINGS, *(other for others in SPELLINGS.values() for other in others), "extra_body", "provider", "items"}
)
_LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(
        ["Hi.", ".", "alloy", "slt", "pcm", "wav", "sse", "<|im_end|>", "<|speaker:3|> Hi.", "\ud800", "[x]", "1", "ü"]
    ),
)
_VALUES = st.recursive(
    _LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
_FIELDS = st.dictionaries(st.sampled_from(_SPELLINGS) | st.text(max_size=8), _VALUES, max_size=6)
_QUICK = settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])


def check(reply: Any) -> None:
    if reply.status_code == 200:
        assert reply.content
    else:
        assert 400 <= reply.status_code < 500
        assert reply.status_code != 422
        packed = reply.headers["content-type"] == "application/msgpack"
        found = msgpack.unpackb(reply.content) if packed else reply.json()
        assert set(found["error"]) == {"message", "type", "param", "code"}
    for name, value in reply.headers.items():
        assert all(" " <= char <= "~" for char in name + value)


@_QUICK
@given(fields=_FIELDS, nested=_FIELDS)
def test_mutated_fields(client: TestClient, fields: dict[str, Any], nested: dict[str, Any]) -> None:
    body = {"input": "Hi.", "max_new_tokens": 2, **fields, "extra_body": nested or None}
    if isinstance(body.get("max_new_tokens"), int):
        body["max_new_tokens"] = min(body["max_new_tokens"], 3) or 1
    check(client.post("/v1/audio/speech", content=json.dumps(body)))


@_QUICK
@given(body=st.binary(max_size=40), kind=st.sampled_from(["application/json", "multipart/form-data", "text/plain"]))
def test_mutated_bodies(client: TestClient, body: bytes, kind: str) -> None:
    for path in ("/v1/audio/speech", "/v1/audio/speech/batch"):
        check(client.post(path, content=body, headers={"Content-Type": kind}))


@_QUICK
@given(items=st.lists(_FIELDS | _VALUES, max_size=3), shared=_FIELDS)
def test_mutated_batches(client: TestClient, items: list[Any], shared: dict[str, Any]) -> None:
    check(client.post("/v1/audio/speech/batch", content=json.dumps({**shared, "max_new_tokens": 2, "items": items})))


@_QUICK
@given(path=st.text(max_size=20), method=st.sampled_from(["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "BREW"]))
def test_mutated_paths(client: TestClient, path: str, method: str) -> None:
    check(client.request(method, f"/v1/models/x{quote(path, errors='replace')}"))


_NATIVE = sorted(
    {*_SPELLINGS, "audios", "tokens", "id", "audio", "reference_id", "old_reference_id", "new_reference_id", "params", "title"}
    | {"voices", "texts", "voice_profile", "voice_dir", "prosody", "chunk_length"}
)
_OF_OTHERS = st.dictionaries(st.sampled_from(_NATIVE) | st.text(max_size=8), _VALUES | st.binary(max_size=20), max_size=6)
_PATHS = [
    ("POST", "/v1/tts"),
    ("POST", "/generate"),
    ("POST", "/v1/references/add"),
    ("POST", "/v1/references/update"),
    ("DELETE", "/v1/references/delete"),
    ("POST", "/v1/vqgan/encode"),
    ("POST", "/v1/vqgan/decode"),
    ("POST", "/model"),
]


def packable(value: Any) -> bytes:
    """Return a value as MessagePack, whose whole numbers have at most 64 bits."""
    return bytes(msgpack.packb(value, default=str, unicode_errors="surrogatepass"))


@_QUICK
@given(where=st.sampled_from(_PATHS), fields=_OF_OTHERS, form=st.booleans())
def test_mutated_requests_of_other_servers(
    client: TestClient, where: tuple[str, str], fields: dict[str, Any], form: bool
) -> None:
    fields = {"text": "Hi.", **fields, "max_new_tokens": 2}
    if form:
        sent = {name: value if isinstance(value, bytes) else str(value) for name, value in fields.items()}
        files = {
            name: (None, value if isinstance(value, bytes) else value.encode(errors="replace")) for name, value in sent.items()
        }
        check(client.request(*where, files={quote(name, errors="replace"): each for name, each in files.items()}))
        return
    try:
        body = packable(fields)
    except OverflowError:
        return
    check(client.request(*where, content=body, headers={"Content-Type": "application/msgpack"}))


@_QUICK
@given(where=st.sampled_from(_PATHS), body=st.binary(max_size=40))
def test_mutated_msgpack(client: TestClient, where: tuple[str, str], body: bytes) -> None:
    check(client.request(*where, content=body, headers={"Content-Type": "application/msgpack"}))


@_QUICK
@given(
    events=st.lists(
        st.binary(max_size=20)
        | st.text(max_size=10)
        | st.fixed_dictionaries(
            {"event": st.sampled_from(["start", "text", "flush", "stop", "x"])},
            optional={"request": _OF_OTHERS | _VALUES, "text": _LEAVES},
        ),
        max_size=5,
    )
)
def test_mutated_events(client: TestClient, events: list[Any]) -> None:
    with client.websocket_connect("/v1/tts/live") as socket:
        for event in events:
            if isinstance(event, str):
                socket.send_text(event)
                continue
            try:
                socket.send_bytes(event if isinstance(event, bytes) else packable(event))
            except OverflowError:
                continue
        socket.send_bytes(
            packable({"event": "start", "request": {"text": "Hi.", "format": "pcm", "max_new_tokens": 2, "seed": 9}})
        )
        socket.send_bytes(packable({"event": "stop"}))
        while (message := socket.receive())["type"] == "websocket.send":
            event = msgpack.unpackb(message["bytes"])
            if event["event"] == "finish" and event["reason"] == "error":
                assert event["error"]["code"] != "internal_error", event
            if event["event"] == "finish" and event["reason"] == "stop":
                return
        assert message["code"] == 1008
