"""LiveKit's plugin for Fish Audio, over HTTP and over a pooled WebSocket."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.large


@pytest.fixture(scope="module")
def told(drive: Callable[..., Any]) -> Any:
    return drive("livekit_fish.py")


def test_every_format(told: Any, hear: Any, share_understood: Any) -> None:
    rates = {"wav": 24_000, "mp3": 32_000, "opus": 48_000, "pcm": 24_000}
    for form, rate in rates.items():
        assert told("formats")[form]["rate"] == rate
        assert share_understood(hear(told.folder / f"fish.{form}.wav")) > 0.5, form


def test_several_texts_on_one_socket_and_every_format(told: Any, hear: Any, share_understood: Any) -> None:
    seen = told("socket")
    assert len(seen) == 6
    for name, facts in seen.items():
        assert facts["frames"] > 1
        assert share_understood(hear(told.folder / f"{name}.wav")) > 0.5, name


def test_prosody(told: Any) -> None:
    usual, double = told("prosody")
    assert double == pytest.approx(usual / 2, rel=0.05)


def test_an_unknown_voice(told: Any) -> None:
    assert told("unknown_voice") == [404, -1]


def test_an_interruption_ends_the_speech(told: Any) -> None:
    """The server has one place: what comes next would be refused."""
    assert min(told("an_interruption")) > 0.3
