"""Fish Audio's SDK, both halves, over HTTP and WebSockets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture(scope="module")
def told(drive: Callable[..., Any]) -> Any:
    return drive("fish_audio.py")


@pytest.mark.parametrize("name", ["converted", "socket"])
def test_every_format(told: Any, hear: Any, share_understood: Any, name: str) -> None:
    told(name)
    for form in ("mp3", "wav", "pcm", "opus"):
        sound = hear(told.folder / f"{name}.{form}", pcm_rate=16_000 if form == "pcm" else 0)
        assert share_understood(sound) > 0.5, form


@pytest.mark.parametrize(
    ("scenario", "names"),
    [
        ("streamed", ["streamed.mp3"]),
        ("flushed", ["flushed.mp3"]),
        ("asynchronous", ["async.mp3", "async-socket.mp3"]),
        ("old_half", ["old.mp3"]),
        ("old_socket", ["old-socket0.mp3", "old-socket1.mp3"]),
    ],
)
def test_speech(told: Any, hear: Any, share_understood: Any, scenario: str, names: list[str]) -> None:
    told(scenario)
    for name in names:
        assert share_understood(hear(told.folder / name)) > 0.5, name


@pytest.mark.parametrize(
    ("scenario", "name"), [("cloned", "cloned.mp3"), ("voices", "stored.mp3"), ("old_half", "old-cloned.wav")]
)
def test_cloned_speech(told: Any, hear: Any, share_understood: Any, voice_of: Any, scenario: str, name: str) -> None:
    told(scenario)
    sound = hear(told.folder / name)
    assert share_understood(sound) > 0.5
    assert voice_of(sound) == "slt"


def test_a_socket_gives_audio_in_parts(told: Any) -> None:
    assert told("flushed") > 2


def test_every_default_of_the_sdk(told: Any) -> None:
    assert told("usual") > 1000


def test_temperature_0_and_top_p_0_are_greedy(told: Any) -> None:
    assert told("greedy") == [True, True]


def test_speed(told: Any, hear: Any) -> None:
    told("speeds")
    usual, double = (hear(told.folder / f"speed{speed}.wav").seconds for speed in (1, 2))
    assert double == pytest.approx(usual / 2, rel=0.05)


def test_voices(told: Any) -> None:
    seen = told("voices")
    assert seen["made"] == ["mine", "tts", "trained"]
    assert {"awb", "mine", "rms", "slt"} <= set(seen["listed"])
    assert seen["total"] == len(seen["listed"])
    assert seen["page"] == 2
    assert seen["shown"] == [True, "mine"]
    status, message = seen["gone"]
    assert status == 404
    assert "mine" in message


def test_models_of_the_old_half(told: Any) -> None:
    seen = told("old_models")
    assert seen["made"] == seen["shown"] == "ours"
    assert "ours" in seen["listed"]


def test_mistakes(told: Any) -> None:
    assert [status for _, status in told("mistakes")] == [404, 401, 429]
    assert "nobody" in told("mistakes")[0][0]
    seen = told("old_half")
    assert (seen["unknown"], seen["key"], seen["model"][0]) == (404, 401, 404)
    assert "nobody" in seen["model"][1]
