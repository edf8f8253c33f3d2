"""Audio files that are written: formats, rates, places; nothing half-written."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from fishrt.audio.encode import check_writable, encode_audio, pcm16, write_audio
from fishrt.audio.files import read_audio, resample
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


def test_pcm16_rounds_and_clips() -> None:
    given = np.array([0, 1, -1, 2, -2, 0.5, 0.6 / 32768, -0.6 / 32768], np.float32)
    assert pcm16(given).tolist() == [0, 32767, -32768, 32767, -32768, 16384, 1, -1]
    assert pcm16(given).dtype == np.int16


def test_standard_output_gets_wav(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer))
    write_audio("-", TONE, RATE)
    pcm, rate = soundfile.read(io.BytesIO(buffer.getvalue()))
    assert (len(pcm), rate) == (len(TONE), RATE)
    assert buffer.getvalue()[:4] == b"RIFF"


@pytest.mark.parametrize(("name", "says"), [("a.xyz", r"unknown format '\.xyz'"), ("a", "no ending"), (".wav", "no ending")])
def test_an_unknown_ending_names_the_known_ones(tmp_path: Path, name: str, says: str) -> None:
    with pytest.raises(AudioError, match=says) as caught:
        write_audio(tmp_path / name, TONE, RATE)
    assert ".flac" in (caught.value.hint or "")


def test_a_format_can_be_named(tmp_path: Path) -> None:
    for name in ("a", "a.xyz", "a.flac"):
        write_audio(tmp_path / name, TONE, RATE, "flac")
        assert soundfile.info(tmp_path / name).format == "FLAC"
    with pytest.raises(AudioError, match="unknown format 'FLAC!'"):
        write_audio(tmp_path / "a.flac", TONE, RATE, "FLAC!")


def test_a_format_and_an_ending_that_disagree_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AudioError, match="its ending says mp3, and wav is asked for"):
        write_audio(tmp_path / "a.mp3", TONE, RATE, "wav")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a.pcm", "a.RAW"])
def test_bare_samples(tmp_path: Path, name: str) -> None:
    write_audio(tmp_path / name, TONE, RATE)
    assert (tmp_path / name).read_bytes() == pcm16(TONE).astype("<i2").tobytes()


@pytest.mark.parametrize(
    ("format", "rate", "expected"),
    [("opus", 44100, 48000), ("opus", 16000, 16000), ("opus", 96000, 48000), ("mp3", 12345, 16000), ("flac", 12345, 12345)],
)
def test_a_rate_that_a_format_lacks_becomes_the_next_higher(format: str, rate: int, expected: int) -> None:
    given = resample(TONE, RATE, rate)
    pcm, read = soundfile.read(io.BytesIO(encode_audio(given, rate, format)), dtype="float32")
    assert read == expected
    back, edge = resample(pcm, expected, RATE), RATE // 20  # lossy codecs are coarse at the edges of a tone
    assert abs(len(back) - len(TONE)) <= 1152 * RATE // expected  # mp3 has whole frames
    assert np.abs(back[edge : len(TONE) - edge] - TONE[edge:-edge]).max() < 0.06


def test_an_unwritable_place_is_told_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no folder"):
        check_writable(tmp_path / "missing" / "a.wav")
