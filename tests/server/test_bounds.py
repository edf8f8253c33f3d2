"""Small bodies that would take much memory or time: they are refused before they do."""

from __future__ import annotations

import json
from typing import Any

import msgpack
import pytest
from fastapi.testclient import TestClient

from fishrt.server.bodies import MOST_VALUES
from fishrt.server.speech.fields import MOST_SPEAKERS

HI = {"input": "Hi.", "max_new_tokens": 2}
MANY: list[Any] = [[]] * (MOST_VALUES + 1)
PACKED = "application/msgpack"


def message(client: TestClient, path: str, body: bytes, kind: str = "application/json") -> tuple[int, str]:
    """Return the status and the message of an error."""
    reply = client.post(path, content=body, headers={"Content-Type": kind})
    return reply.status_code, reply.json()["error"]["message"]


@pytest.mark.parametrize("body", [{**HI, "x": MANY}, {**HI, "references": json.dumps(MANY)}, {**HI, "x": {"y": [[MANY]]}}])
def test_the_values_of_json_are_bounded(client: TestClient, body: dict[str, Any]) -> None:
    status, said = message(client, "/v1/audio/speech", json.dumps(body).encode())
    assert status == 400
    assert "more than 200,000 values" in said


@pytest.mark.parametrize("values", [MANY, [MANY[: MOST_VALUES // 2]] * 2, [dict.fromkeys(map(str, range(1000)))] * 200])
def test_the_values_of_messagepack_are_bounded(client: TestClient, values: Any) -> None:
    status, said = message(client, "/v1/tts", msgpack.packb({"text": "Hi.", "x": values}), PACKED)
    assert status == 400
    assert "200,000 values" in said or "200000" in said


def test_many_values_are_taken(client: TestClient) -> None:
    body = {**HI, "x": MANY[: MOST_VALUES // 2 - 20]}
    assert client.post("/v1/audio/speech", json=body).status_code == 200
    body = {**HI, "x": list(range(MOST_VALUES - 20))}
    assert client.post("/v1/tts", content=msgpack.packb(body), headers={"Content-Type": PACKED}).status_code == 200


def test_a_long_form_must_be_multipart(client: TestClient) -> None:
    kind = "application/x-www-form-urlencoded"
    assert message(client, "/v1/tts", b"text=" + b"%41" * 200_000, kind) == (
        413,
        "a form of more than 512 KiB must be multipart/form-data",
    )
    assert client.post("/v1/tts", data={"text": "Hi.", "max_new_tokens": "2"}).status_code == 200


def test_the_voices_of_a_request_are_bounded(client: TestClient) -> None:
    assert client.post("/v1/audio/speech", json={**HI, "voice": ["slt"] * 2}).status_code == 200
    status, said = message(client, "/v1/audio/speech", json.dumps({**HI, "voice": ["slt"] * (MOST_SPEAKERS + 1)}).encode())
    assert status == 400
    assert "at most 64 voices" in said


def test_the_options_of_providers_are_bounded(client: TestClient) -> None:
    body = {**HI, "provider": {"options": {str(n): {} for n in range(17)}}}
    status, said = message(client, "/v1/audio/speech", json.dumps(body).encode())
    assert status == 400
    assert "at most 16 objects" in said


@pytest.mark.parametrize(
    "fields", [{"speaker_prompt": "a " * 100_000}, {"references": [{"text": "a " * 100_000, "codes": [[0] * 9] * 8}]}]
)
def test_texts_beside_the_text_are_bounded(client: TestClient, fields: dict[str, Any]) -> None:
    status, said = message(client, "/v1/audio/speech", json.dumps(HI | fields).encode())
    assert status == 400
    assert "is too long: 200,000 characters" in said
