"""Another speed of speech: its length, its pitch, and sound that is pushed in parts of any size."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fishrt.audio.speed import Stretcher
from fishrt.errors import AudioError

HZ = 150


def voiced(rate: int, seconds: float = 2.0) -> np.ndarray:
    """Return a harmonic tone of HZ, float32 [samples]."""
    t = np.arange(int(seconds * rate)) / rate
    return np.sum([0.2 / k * np.sin(2 * np.pi * HZ * k * t) for k in range(1, 8)], axis=0).astype(np.float32)


def stretched(pcm: np.ndarray, rate: int, speed: float, sizes: tuple[int, ...]) -> np.ndarray:
    """Return what a Stretcher makes of `pcm` that is pushed in parts of these sizes, again and again."""
    stretcher, parts, at = Stretcher(rate, speed), [], 0
    while at < len(pcm):
        size = sizes[len(parts) % len(sizes)]
        parts.append(stretcher.push(pcm[at : at + size]))
        at += size
    return np.concatenate([*parts, stretcher.finish()])


def pitch(pcm: np.ndarray, rate: int) -> float:
    """Return the frequency in Hz of the loudest harmonic of the middle half."""
    middle = pcm[len(pcm) // 4 : 3 * len(pcm) // 4]
    points = 1 << 19
    return float(np.abs(np.fft.rfft(middle * np.hanning(len(middle)), points)).argmax() * rate / points)


@pytest.mark.parametrize("rate", [16000, 24000, 44100])
@pytest.mark.parametrize("speed", [0.25, 0.4, 0.8, 1.25, 2, 4])
def test_speech_keeps_its_pitch_and_loudness(rate: int, speed: float) -> None:
    pcm = voiced(rate)
    whole = stretched(pcm, rate, speed, (len(pcm),))
    assert len(whole) == int(len(pcm) / speed + 0.5)
    assert pitch(whole, rate) == pytest.approx(HZ, rel=0.005)
    assert np.std(whole) == pytest.approx(np.std(pcm), rel=0.02)
    for sizes in ((333,), (4096,), (1, 2000, 17)):
        np.testing.assert_array_equal(stretched(pcm, rate, speed, sizes), whole)


@settings(max_examples=40, deadline=None)
@given(samples=st.integers(0, 3000), rate=st.sampled_from([8000, 44100]), speed=st.floats(0.25, 4), size=st.integers(1, 1500))
def test_any_length_at_any_speed(samples: int, rate: int, speed: float, size: int) -> None:
    pcm = np.full(samples, 0.1, np.float32)
    assert len(stretched(pcm, rate, speed, (size,))) == int(samples / speed + 0.5)


def test_what_is_said_stays_in_its_order() -> None:
    """Three tones, each for a second, take the same parts of the result."""
    rate, speed = 24000, 1.6
    tones = [np.sin(np.arange(rate) * 2 * np.pi * hz / rate).astype(np.float32) for hz in (300, 500, 800)]
    whole = stretched(np.concatenate(tones), rate, speed, (1000,))
    parts = np.split(whole, [int(rate / speed), int(2 * rate / speed)])
    assert [pitch(part, rate) for part in parts] == pytest.approx([300, 500, 800], rel=0.01)


@pytest.mark.parametrize("speed", [0.25, 1.1, 4])
def test_the_first_sound_comes_soon(speed: float) -> None:
    """Half of what has been pushed 0.3 s after the start is out."""
    stretcher, rate = Stretcher(24000, speed), 24000
    assert len(stretcher.push(voiced(rate, 0.3))) > 0.15 * rate / speed


def test_speed_1_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    pcm = voiced(16000)
    np.testing.assert_array_equal(stretched(pcm, 16000, 1.0, (777,)), pcm)


def test_what_cannot_be_done_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for speed in (0.24, 4.1, 0, -1, float("nan")):
        with pytest.raises(AudioError, match=r"0\.25 to 4 is possible"):
            Stretcher(16000, speed)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(AudioError, match="another speed needs PyAV") as caught:
        Stretcher(16000, 2)
    assert "fishrt[server]" in (caught.value.hint or "")
