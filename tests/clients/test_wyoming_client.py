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


@pytest.mark.parametrize(("scenario", "name"), [("whole", "whole"), ("by_language", "language")])
def test_a_text(told: Any, hear: Any, share_understood: Any, scenario: str, name: str) -> None:
    assert told(scenario) == ["audio-start", "audio-stop"]
    assert share_understood(hear(told.folder / f"{name}.wav")) > 0.5


def test_a_stream_is_spoken_once(told: Any, hear: Any, share_understood: Any) -> None:
    *audio, last = told("streamed")
    assert last == "synthesize-stopped"
    assert audio == ["audio-start", "audio-stop"] * (len(audio) // 2)
    assert share_understood(hear(told.folder / "streamed.wav")) > 0.5  # spoken twice, every word would be wrong once


def test_an_unknown_voice(told: Any) -> None:
    kind, (text, code) = told("unknown")
    assert (kind, code) == ("error", "voice_not_found")
    assert "nobody" in text
