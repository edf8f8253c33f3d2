"""Prepared voices: keys and values of the slow AR, stored with the voice."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from fishrt import TTS
from fishrt.errors import OutputError, VoiceError
from fishrt.voices.prepared import prepared_path

FRAMES = 6


@pytest.fixture
def tts() -> TTS:
    return TTS.load(threads=1)


def codes(tts: TTS, voice: str) -> np.ndarray:
    return tts.speak("Good morning.", voice=voice, seed=4, max_frames=FRAMES).codes


def kept(tts: TTS, folder: Path) -> Path:
    return prepared_path(folder, tts.bundle.manifest.specs["slow_ar"].identity)


def test_the_same_codes_cold_warm_and_from_the_disk(tts: TTS, tmp_path: Path) -> None:
    cold = codes(tts, "slt")
    np.testing.assert_array_equal(codes(tts, "slt"), cold)
    assert not tts.prepared_path(tmp_path).is_file()
    tts.prepare("slt", tmp_path)
    assert tts.prepared_path(tmp_path).is_file()
    other = TTS.load(threads=1)
    other.prepare("slt", tmp_path)
    np.testing.assert_array_equal(codes(other, "slt"), cold)


def test_a_prepared_voice_is_not_read_again(tts: TTS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tts.prepare("slt", tmp_path)
    other = TTS.load(threads=1)
    other.prepare("slt", tmp_path)
    slow, lengths = other.engines["slow_ar"], []
    run = slow.run
    monkeypatch.setattr(slow, "run", lambda feeds, *rest: lengths.append(feeds["prompt"].shape[2]) or run(feeds, *rest))
    codes(other, "slt")
    whole = other._model._prompts.start([other.voice("slt")])
    assert lengths[0] == whole.user("Good morning.").shape[1] - whole.head.shape[1]
    assert set(lengths[1:]) <= {1}


@pytest.mark.parametrize("damage", ["cut", "another voice", "other shapes", "no columns", "not an archive"])
def test_a_file_of_no_use_is_passed_over(tts: TTS, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    tts.prepare("slt", tmp_path)
    path = kept(tts, tmp_path)
    with np.load(path) as file:
        stored = dict(file)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "not an archive":
        path.write_bytes(b"something else")
    elif damage == "no columns":
        np.savez(path, **{name: array for name, array in stored.items() if name != "columns"})
    elif damage == "other shapes":
        np.savez(path, **{name: array if name == "columns" else array[:, :, 1:] for name, array in stored.items()})
    other = TTS.load(threads=1)
    with caplog.at_level(logging.WARNING):
        other.prepare("awb" if damage == "another voice" else "slt", tmp_path)
    assert "is read again" in caplog.text
    np.testing.assert_array_equal(codes(other, "slt"), codes(tts, "slt"))
    assert prepared_path(tmp_path, "0" * 64) != path


def test_a_folder_that_is_not_there(tts: TTS, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="prepared"):
        tts.prepare("slt", tmp_path / "missing")


def test_an_unknown_voice(tts: TTS) -> None:
    with pytest.raises(VoiceError, match="no voice"):
        tts.prepare("nobody")
