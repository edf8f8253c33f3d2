"""Requests that nobody meant: whatever is in them, the reply is speech or an error object, and never a fault of the server."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote

import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fishrt.server.fields import SPELLINGS

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
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
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
