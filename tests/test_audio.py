"""Audio files that are read, their errors, and resampling."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import soundfile

from fishrt.audio import read_audio, resample
from fishrt.encode import write_audio
from fishrt.errors import AudioError

RATE = 16000
TONE = (0.5 * np.sin(np.arange(RATE // 2) * 2 * np.pi * 440 / RATE)).astype(np.float32)


def test_channels_are_averaged(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "s.wav", np.stack([TONE, np.zeros_like(TONE), TONE / 2], axis=1), RATE, "FLOAT")
    np.testing.assert_allclose(read_audio(tmp_path / "s.wav")[0], TONE / 2, atol=1e-7)


def test_an_open_file_is_read() -> None:
    buffer = io.BytesIO()
    soundfile.write(buffer, TONE, RATE, format="FLAC")
    buffer.seek(0)
    assert len(read_audio(buffer)[0]) == len(TONE)


def bad_files(folder: Path) -> dict[str, tuple[Path, str]]:
    (folder / "text.wav").write_text("this is no audio")
    (folder / "nothing.wav").write_bytes(b"")
    soundfile.write(folder / "empty.wav", np.zeros(0), RATE)
    soundfile.write(folder / "nan.wav", np.array([0, np.nan]), RATE, "FLOAT")
    return {
        "missing": (folder / "missing.wav", "No such file"),
        "folder": (folder, "Is a directory"),
        "text": (folder / "text.wav", "not audio"),
        "no bytes": (folder / "nothing.wav", "not audio"),
        "no samples": (folder / "empty.wav", "no samples"),
        "not numbers": (folder / "nan.wav", "not numbers"),
    }


@pytest.mark.parametrize("case", ["missing", "folder", "text", "no bytes", "no samples", "not numbers"])
def test_files_that_cannot_be_used_are_named(tmp_path: Path, case: str) -> None:
    path, says = bad_files(tmp_path)[case]
    with pytest.raises(AudioError, match=says) as caught:
        read_audio(path)
    assert str(path) in str(caught.value)


def test_the_length_is_checked_before_anything_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_audio(tmp_path / "a.wav", TONE, RATE)
    assert len(read_audio(tmp_path / "a.wav", max_seconds=0.5)[0]) == len(TONE)
    monkeypatch.setattr(soundfile.SoundFile, "read", None)
    with pytest.raises(AudioError, match=r"a\.wav is too long: 0\.5 s; at most 0\.4 s"):
        read_audio(tmp_path / "a.wav", max_seconds=0.4)


def test_memory_that_does_not_suffice_is_an_error_for_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: object, **__: object) -> None:
        raise MemoryError

    write_audio(tmp_path / "a.wav", TONE, RATE)
    monkeypatch.setattr(soundfile.SoundFile, "read", no_memory)
    with pytest.raises(AudioError, match=r"a\.wav is too long for the memory"):
        read_audio(tmp_path / "a.wav")


def test_resampling_keeps_the_tone() -> None:
    up = resample(TONE, RATE, 44100)
    assert (len(up), up.dtype) == (22050, np.float32)
    expected = 0.5 * np.sin(np.arange(22050) * 2 * np.pi * 440 / 44100)
    assert np.abs(up - expected)[1000:-1000].max() < 1e-3
    assert resample(TONE, RATE, RATE) is TONE


def test_resampling_refuses_nonsense() -> None:
    with pytest.raises(AudioError, match="0 Hz"):
        resample(TONE, 0, RATE)


@pytest.mark.parametrize(("rate", "target", "samples"), [(48000, 8000, 1), (8000, 44100, 1), (44101, 44100, 7), (3, 2, 100)])
def test_resampling_takes_any_rates_and_lengths(rate: int, target: int, samples: int) -> None:
    """Each new sample stands inside the old ones, rounded up; a constant stays one in the middle."""
    flat = resample(np.full(samples, 0.5, np.float32), rate, target)
    assert len(flat) == -(-samples * target // rate)
    if samples == 100:
        assert np.abs(flat[20:-20] - 0.5).max() < 1e-3


def test_resampling_in_blocks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = resample(TONE, RATE, 44100)
    monkeypatch.setattr("fishrt.audio._BLOCK", 1000)
    np.testing.assert_array_equal(resample(TONE, RATE, 44100), whole)
