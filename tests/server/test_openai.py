"""OpenAI's routes: fields, formats, streams, voices, models."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import numpy as np
import pytest
import soundfile
from fastapi.testclient import TestClient

SPEECH = "/v1/audio/speech"


def spoken(client: TestClient, path: str = SPEECH, **fields: Any) -> Any:
    reply = client.post(path, json={"input": "Hi.", "seed": 1, **fields})
    assert reply.status_code == 200, reply.text
    return reply


def decoded(data: bytes) -> tuple[np.ndarray, int]:
    return soundfile.read(io.BytesIO(data))


def refused(client: TestClient, status: int = 400, **fields: Any) -> dict[str, Any]:
    reply = client.post(SPEECH, json={"input": "Hi.", **fields})
    assert reply.status_code == status, reply.text
    error: dict[str, Any] = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def test_without_a_format_the_reply_is_mp3(client: TestClient) -> None:
    reply = spoken(client)
    assert reply.headers["content-type"] == "audio/mpeg"
    assert len(decoded(reply.content)[0]) > 0.3 * 16_000


def test_the_same_seed_gives_the_speech_of_the_library(client: TestClient, tts: Any) -> None:
    wanted = tts.speak("Hi.", seed=1).pcm
    reply = spoken(client, response_format="wav")
    assert reply.headers["x-seed"] == "1"
    pcm, rate = decoded(reply.content)
    assert rate == tts.sample_rate
    np.testing.assert_allclose(pcm, wanted, atol=1 / 32000)


@pytest.mark.parametrize(
    ("fields", "rate"),
    [
        ({}, 16_000),
        ({"model": "echo-tts"}, 16_000),
        ({"model": "tts-1"}, 24_000),
        ({"model": "tts-1-hd"}, 24_000),
        ({"model": "gpt-4o-mini-tts-2025-12-15"}, 24_000),
        ({"model": "tts-1", "sample_rate": 8_000}, 8_000),
        ({"sample_rate": 44_100}, 44_100),
    ],
)
def test_the_rate_of_raw_samples(client: TestClient, fields: dict[str, Any], rate: int) -> None:
    reply = spoken(client, response_format="pcm", **fields)
    assert reply.headers["content-type"] == f"audio/pcm;rate={rate};channels=1"
    assert reply.headers["x-audio-sample-rate"] == str(rate)
    assert (reply.headers["x-audio-channels"], reply.headers["x-audio-encoding"]) == ("1", "pcm_s16le")
    seconds = len(decoded(spoken(client, response_format="wav").content)[0]) / 16_000
    assert len(reply.content) / 2 / rate == pytest.approx(seconds, abs=0.01)


def events(reply: Any) -> list[dict[str, Any]]:
    lines = reply.text.splitlines()
    return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]


def test_server_sent_events_carry_the_same_audio(client: TestClient) -> None:
    reply = spoken(client, response_format="pcm", stream_format="sse")
    assert reply.headers["content-type"].startswith("text/event-stream")
    *deltas, done = events(reply)
    assert {each["type"] for each in deltas} == {"speech.audio.delta"}
    assert b"".join(base64.b64decode(each["audio"]) for each in deltas) == spoken(client, response_format="pcm").content
    assert done["type"] == "speech.audio.done"
    usage = done["usage"]
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert usage["output_tokens"] * 640 == sum(len(base64.b64decode(each["audio"])) for each in deltas) / 2


@pytest.mark.parametrize("fields", [{"voice": "nobody"}, {"voice": {"id": "nobody"}}, {"reference_id": "nobody"}])
def test_an_unknown_voice_is_404(client: TestClient, fields: dict[str, Any]) -> None:
    error = refused(client, 404, **fields)
    assert (error["code"], error["param"]) == ("voice_not_found", "voice")


@pytest.mark.parametrize("text", [".", "…", "?!", " - "])
def test_a_text_without_a_letter_is_a_pause(client: TestClient, text: str) -> None:
    pcm, rate = decoded(spoken(client, input=text, response_format="wav", voice="alloy").content)
    assert len(pcm) >= 0.1 * rate
    assert not pcm.any()


def test_models(client: TestClient) -> None:
    listed = client.get("/v1/models").json()
    assert [each["id"] for each in listed["data"]] == ["minnow"]
    assert client.get("/v1/models/minnow").json() == listed["data"][0]
    assert client.get("/v1/models/tts-1").status_code == 404
    assert [each["id"] for each in client.get("/v1/audio/models").json()["models"]] == ["minnow"]
