"""OpenAI's SDK for JavaScript."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.large,
    pytest.mark.skipif(shutil.which("node") is None, reason="needs Node"),
    pytest.mark.skipif(
        not (Path(__file__).parent / "node_modules/openai").is_dir(), reason="`make clients` has not installed its packages"
    ),
]


@pytest.fixture(scope="module")
def told(drive: Callable[..., Any]) -> Any:
    return drive("openai_node.mjs", "node")


def test_every_format(told: Any, hear: Any, share_understood: Any) -> None:
    told("formats")
    for form in ("mp3", "opus", "aac", "flac", "wav", "pcm"):
        sound = hear(told.folder / f"node.{form}", pcm_rate=24_000 if form == "pcm" else 0)
        assert share_understood(sound) > 0.5, form


def test_samples_come_in_parts(told: Any) -> None:
    assert len(told("parts")) > 2


def test_server_sent_events(told: Any, hear: Any, share_understood: Any) -> None:
    *deltas, done = told("events")
    assert set(deltas) == {"speech.audio.delta"}
    assert done == "speech.audio.done"
    assert share_understood(hear(told.folder / "events.mp3")) > 0.5


def test_models(told: Any) -> None:
    assert told("models") == ["minnow", "minnow"]


def test_mistakes(told: Any) -> None:
    field, voice, key = told("mistakes")
    assert (field["status"], field["param"]) == (400, "speed")
    assert (voice["status"], voice["code"], voice["param"]) == (404, "voice_not_found", "voice")
    assert (key["status"], key["code"]) == (401, "invalid_api_key")
    assert all(error["id"] for error in (field, voice, key))
