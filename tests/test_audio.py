"""Audio files of every format and their errors; nothing half-written."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from fishrt.audio import check_writable, pcm16, read_audio, resample, write_audio
from fishrt.errors import AudioError, OutputError

RATE = 16000
TONE = (0.5 * np.sin(np.arange(RATE // 2) * 2 * np.pi * 440 / RATE)).astype(np.float32)


@pytest.mark.parametrize(("suffix", "error"), [(".wav", 2e-5), (".flac", 2e-5), (".WAV", 2e-5), (".ogg", 0.05), (".mp3", 0.05)])
def test_what_is_written_can_be_read(tmp_path: Path, suffix: str, error: float) -> None:
    path = tmp_path / f"tone{suffix}"
    write_audio(path, TONE, RATE)
    pcm, rate = read_audio(path)
    assert (rate, pcm.dtype, pcm.ndim) == (RATE, np.float32, 1)
    assert np.abs(pcm[: len(TONE)] - TONE).max() < error  # mp3 and ogg are lossy
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_long_ogg_is_written(tmp_path: Path) -> None:
    """libsndfile crashes when it is given minutes of Vorbis in one write."""
    write_audio(tmp_path / "long.ogg", np.zeros(RATE * 180, np.float32), RATE)
    assert len(read_audio(tmp_path / "long.ogg")[0]) == RATE * 180


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


def test_pcm16_rounds_and_clips() -> None:
    given = np.array([0, 1, -1, 2, -2, 0.5, 0.6 / 32768, -0.6 / 32768], np.float32)
    assert pcm16(given).tolist() == [0, 32767, -32768, 32767, -32768, 16384, 1, -1]
    assert pcm16(given).dtype == np.int16


def test_standard_output_gets_wav(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(buffer=buffer))
    write_audio("-", TONE, RATE)
    buffer.seek(0)
    pcm, rate = soundfile.read(buffer)
    assert (len(pcm), rate) == (len(TONE), RATE)
    assert buffer.getvalue()[:4] == b"RIFF"


@pytest.mark.parametrize(("name", "says"), [("a.xyz", r"unknown format '\.xyz'"), ("a", "no ending"), (".wav", "no ending")])
def test_an_unknown_ending_names_the_known_ones(tmp_path: Path, name: str, says: str) -> None:
    with pytest.raises(AudioError, match=says) as caught:
        write_audio(tmp_path / name, TONE, RATE)
    assert ".flac" in (caught.value.hint or "")


def test_a_format_that_is_named_counts_and_not_the_ending(tmp_path: Path) -> None:
    write_audio(tmp_path / "a.xyz", TONE, RATE, "flac")
    assert soundfile.info(tmp_path / "a.xyz").format == "FLAC"
    with pytest.raises(AudioError, match="unknown format 'FLAC!'"):
        write_audio(tmp_path / "a.flac", TONE, RATE, "FLAC!")


def test_an_unwritable_place_is_told_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no folder"):
        check_writable(tmp_path / "missing" / "a.wav")


def test_a_rate_that_a_format_lacks_is_told(tmp_path: Path) -> None:
    with pytest.raises(AudioError, match="mp3 at 12345 Hz"):
        write_audio(tmp_path / "a.mp3", TONE, 12345)
    assert not list(tmp_path.iterdir())
