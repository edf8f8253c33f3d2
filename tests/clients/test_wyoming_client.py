"""Wyoming's own client."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture(scope="module")
def told(drive: Callable[..., Any]) -> Any:
    return drive("wyoming_client.py")


def test_what_the_server_speaks(told: Any) -> None:
    seen = told("described")
    assert seen["streaming"]
    assert seen["installed"]
    assert seen["voices"] == {name: ["en"] for name in ("awb", "rms", "slt")}


@pytest.mark.parametrize(("scenario", "voice"), [("whole", "rms"), ("by_language", "awb")])
def test_a_text(told: Any, hear: Any, share_understood: Any, voice_of: Any, scenario: str, voice: str) -> None:
    assert told(scenario) == ["audio-start", "audio-stop"]
    sound = hear(told.folder / f"{scenario}.wav")
    assert share_understood(sound) > 0.5
    assert voice_of(sound) == voice


def test_a_stream_is_spoken_once(told: Any, hear: Any, share_understood: Any) -> None:
    *audio, last = told("streamed")
    assert last == "synthesize-stopped"
    assert audio == ["audio-start", "audio-stop"] * (len(audio) // 2)
    assert share_understood(hear(told.folder / "streamed.wav")) > 0.5  # spoken twice, every word would be wrong once


def test_an_unknown_voice(told: Any) -> None:
    kind, (text, code) = told("unknown")
    assert (kind, code) == ("error", "voice_not_found")
    assert "nobody" in text
