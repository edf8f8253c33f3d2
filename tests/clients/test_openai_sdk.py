"""OpenAI's SDK for Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

FORMATS = {
    "mp3": "audio/mpeg",
    "opus": "audio/ogg",
    "aac": "audio/aac",
    "flac": "audio/flac",
    "wav": "audio/wav",
    "pcm": "audio/pcm;rate=24000;channels=1",
}


@pytest.fixture(scope="module")
def told(drive: Callable[..., Any]) -> Any:
    return drive("openai_sdk.py")


def test_a_whole_file(told: Any, hear: Any, share_understood: Any) -> None:
    told("whole")
    assert share_understood(hear(told.folder / "whole.mp3")) > 0.5


def test_a_stream_in_every_format(told: Any, hear: Any, share_understood: Any) -> None:
    headers = told("formats")
    seconds = []
    for form, kind in FORMATS.items():
        assert headers[form]["content-type"] == kind
        assert headers[form]["x-seed"] == "6"
        assert headers[form]["x-request-id"]
        sound = hear(told.folder / f"streamed.{form}", pcm_rate=24_000 if form == "pcm" else 0)
        assert share_understood(sound) > 0.5, form
        seconds.append(sound.seconds)
    assert seconds == pytest.approx([seconds[-1]] * len(seconds), abs=0.1)  # mp3 and aac are padded to whole frames


def test_samples_come_in_parts(told: Any) -> None:
    assert len(told("parts")) > 2


def test_server_sent_events(told: Any, hear: Any, share_understood: Any) -> None:
    *deltas, done = told("events")["types"]
    assert set(deltas) == {"speech.audio.delta"}
    assert len(deltas) > 2
    assert done == "speech.audio.done"
    assert set(told("events")["usage"]) == {"input_tokens", "output_tokens", "total_tokens"}
    assert share_understood(hear(told.folder / "events.mp3")) > 0.5


def test_extra_body(told: Any) -> None:
    assert told("seeds") == [True, False]


def test_speed(told: Any, hear: Any) -> None:
    told("speeds")
    usual, double = (hear(told.folder / f"speed{speed}.wav").seconds for speed in (1, 2))
    assert double == pytest.approx(usual / 2, rel=0.05)


def test_every_preset_voice(told: Any) -> None:
    assert len(told("presets")) == 13


def test_voices(told: Any, hear: Any, share_understood: Any, voice_of: Any) -> None:
    seen = told("voices")
    made = seen["made"]
    assert made["name"] == "mine"
    assert (made["object"], made["type"]) == ("audio.voice", "audio_sample")
    assert isinstance(made["created_at"], int)
    sound = hear(told.folder / "cloned.mp3")
    assert share_understood(sound) > 0.5
    assert voice_of(sound) == "slt"
    deleted = seen["deleted"]
    assert (deleted["id"], deleted["deleted"], deleted["object"]) == (made["id"], True, "audio.voice.deleted")
    for name in ("unknown", "again"):
        assert (seen[name]["status"], seen[name]["code"], seen[name]["param"]) == (404, "voice_not_found", "voice")
    assert seen["taken"]["status"] == 409


def test_models(told: Any) -> None:
    listed, retrieved, unknown = told("models")
    assert listed == ["minnow"]
    assert retrieved == "minnow"
    assert unknown["code"] == "model_not_found"


def test_mistakes_name_their_field(told: Any) -> None:
    for name, error in told("mistakes").items():
        assert (error["status"], error["param"], error["type"]) == (400, name, "invalid_request_error")
        assert error["id"]


def test_keys(told: Any) -> None:
    seen = told("keys")
    assert seen["right"]
    assert seen["wrong"]["code"] == "invalid_api_key"
    assert seen["listed"] == ["minnow"]


def test_a_full_queue(told: Any) -> None:
    seen = told("full")
    assert seen["status"] == 429
    assert 1 <= int(seen["retry_after"]) <= 30
    assert seen["then"]


def test_requests_at_once_get_what_they_get_alone(told: Any) -> None:
    assert told("at_once") == [True] * 8
