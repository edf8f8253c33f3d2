"""Audio files that are written, whole or bit by bit: formats and rates; `fishrt speak --stream`."""

from __future__ import annotations

import io
import json
import os
import struct
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import soundfile

import helpers_cli
from fishrt.audio.encode import GrowingFile, encode_audio, growing_audio, write_audio
from fishrt.audio.encoders import UNKNOWN, open_encoder, pcm16
from fishrt.audio.files import read_audio
from fishrt.audio.resample import resample
from fishrt.errors import AudioError
from helpers_cli import files, run, tone

fake = helpers_cli.fake

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


# --- files that grow ---------------------------------------------------------------------------------------------------------


def test_a_file_that_grew_is_like_one_that_was_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    with growing_audio(path, RATE) as writer:
        for part in np.split(tone(1.0), 5):
            writer.write(part)
            assert not path.exists()
    soundfile.write(tmp_path / "b.wav", np.rint(tone(1.0) * 32768).clip(-32768, 32767).astype(np.int16), RATE)
    np.testing.assert_array_equal(soundfile.read(path)[0], soundfile.read(tmp_path / "b.wav")[0])
    assert path.read_bytes()[:44] == (tmp_path / "b.wav").read_bytes()[:44]


def test_a_pipe_gets_the_sound_at_once_and_no_length() -> None:
    file = io.BytesIO()
    writer = GrowingFile(file, open_encoder("wav", RATE))
    writer.write(np.array([0, 0.5, 2], np.float32))
    data = file.getvalue()
    assert struct.unpack("<I", data[4:8]) == struct.unpack("<I", data[40:44]) == (UNKNOWN,)
    assert struct.unpack("<3h", data[44:]) == (0, 16384, 32767)
    assert soundfile.read(io.BytesIO(data), dtype="int16")[0].tolist() == [0, 16384, 32767]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes in folders")
def test_a_named_pipe_stays_one(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.wav")
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append((tmp_path / "a.wav").read_bytes()))
    reader.start()
    with growing_audio(tmp_path / "a.wav", RATE) as writer:
        writer.write(tone(0.1))
    reader.join()
    assert len(got[0]) == 44 + 2 * RATE // 10
    assert (tmp_path / "a.wav").is_fifo()


def test_speech_is_written_as_it_comes(fake):
    done = run("speak", "Hi.", "--stream", "-o", "a.wav", "--seed", "3", "--json")
    assert done.exit_code == 0, done.stderr
    assert files() == ["a.wav"]
    assert soundfile.info("a.wav").frames == RATE
    said = json.loads(done.stdout)
    assert (said["ok"], said["seed"], said["frames"], said["timings"]["ttfa_s"]) == (True, 3, 25, 0.2)
    piped = run("speak", "Hi.", "--stream", "-o", "-", "-q")
    assert soundfile.read(io.BytesIO(piped.stdout_bytes))[0].shape == (RATE,)


def test_speech_is_written_as_aac(fake, monkeypatch):
    """In a file, on standard output, and while it is made; without PyAV, it is refused before anything is spoken."""
    for arguments in (["-o", "a.aac"], ["-o", "b.aac", "--stream"], ["-o", "-", "--format", "aac", "-q"]):
        done = run("speak", "Hi.", *arguments)
        assert done.exit_code == 0, done.stderr
    assert done.stdout_bytes[:2] == b"\xff\xf1"
    for name in ("a.aac", "b.aac"):
        pcm, rate = read_audio(name)
        assert rate == RATE
        assert RATE <= len(pcm) <= RATE + 2048
    monkeypatch.setitem(sys.modules, "av", None)
    for arguments in (["-o", "c.aac"], ["-o", "c.flac", "--stream"]):
        refused = run("speak", "Hi.", *arguments)
        assert refused.exit_code == 2
        assert "needs PyAV" in refused.stderr
        assert "fishrt[server]" in refused.stderr
    assert files() == ["a.aac", "b.aac"]


def test_what_was_not_spoken_is_told(fake):
    fake.stop_reason = "max_frames"
    assert "cut off by the limit of its length" in run("speak", "Hi.", "--stream", "-o", "a.wav").stderr


def test_a_listener_who_leaves_ends_the_work(fake, monkeypatch):
    """The model is not called further, and there is no traceback."""
    write = GrowingFile.write

    def leave(self, pcm):
        if fake.given == 2:
            raise BrokenPipeError(32, "Broken pipe")
        write(self, pcm)

    monkeypatch.setattr(GrowingFile, "write", leave)
    done = run("speak", "Hi.", "--stream", "-o", "-", "-q")
    assert (fake.given, done.exit_code) == (2, 1)
    assert "Traceback" not in done.stderr
