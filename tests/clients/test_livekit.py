"""LiveKit's plugin for OpenAI."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.large


@pytest.fixture(scope="module")
def told(drive: Callable[..., Any]) -> Any:
    return drive("livekit_openai.py")


def test_events_and_bytes_in_every_format(told: Any, hear: Any, share_understood: Any) -> None:
    seen = told("formats")
    assert len(seen) == 12
    for name, facts in seen.items():
        assert facts["rate"] == 24_000
        assert facts["frames"] > 1
        assert share_understood(hear(told.folder / f"{name}.wav")) > 0.5, name


def test_with_the_defaults_of_the_plugin(told: Any, hear: Any, share_understood: Any) -> None:
    assert told("usual")["frames"] > 1
    assert share_understood(hear(told.folder / "usual.wav")) > 0.5


def test_an_unknown_voice_is_a_status(told: Any) -> None:
    assert told("unknown_voice") == 404


def test_an_interruption_ends_the_speech(told: Any) -> None:
    """The server has one place: what comes next would be refused."""
    assert told("an_interruption") > 0.3
