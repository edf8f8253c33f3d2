"""Streamed wav files, and `fishrt speak --stream`, which writes them."""

from __future__ import annotations

import io
import json
import os
import struct
import threading
from pathlib import Path

import numpy as np
import pytest
import soundfile

from fishrt.audio.encode import UNKNOWN, WavWriter, growing_wav
from fishrt.errors import OutputError
from helpers_cli import RATE, fake, files, refused, run, tone  # noqa: F401


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_that_grew_is_like_one_that_was_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    with growing_wav(path, RATE) as writer:
        for part in np.split(tone(1.0), 5):
            writer.write(part)
            assert not path.exists()
    soundfile.write(tmp_path / "b.wav", np.rint(tone(1.0) * 32768).clip(-32768, 32767).astype(np.int16), RATE)
    np.testing.assert_array_equal(soundfile.read(path)[0], soundfile.read(tmp_path / "b.wav")[0])
    assert path.read_bytes()[:44] == (tmp_path / "b.wav").read_bytes()[:44]
    assert names(tmp_path) == ["a.wav", "b.wav"]


def test_a_pipe_gets_the_sound_at_once_and_no_length() -> None:
    file = io.BytesIO()
    writer = WavWriter(file, RATE)
    writer.write(np.array([0, 0.5, 2], np.float32))
    data = file.getvalue()
    assert struct.unpack("<I", data[4:8]) == struct.unpack("<I", data[40:44]) == (UNKNOWN,)
    assert struct.unpack("<3h", data[44:]) == (0, 16384, 32767)
    assert soundfile.read(io.BytesIO(data), dtype="int16")[0].tolist() == [0, 16384, 32767]


def test_what_fails_half_way_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_text("old")

    def half() -> None:
        with growing_wav(tmp_path / "a.wav", RATE) as writer:
            writer.write(tone(0.1))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        half()
    assert names(tmp_path) == ["a.wav"]
    assert (tmp_path / "a.wav").read_text() == "old"
    with pytest.raises(OutputError, match="no/such"), growing_wav(tmp_path / "no/such/a.wav", RATE):
        pass


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes in folders")
def test_a_named_pipe_stays_one(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.wav")
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append((tmp_path / "a.wav").read_bytes()))
    reader.start()
    with growing_wav(tmp_path / "a.wav", RATE) as writer:
        writer.write(tone(0.1))
    reader.join()
    assert len(got[0]) == 44 + 2 * RATE // 10
    assert (tmp_path / "a.wav").is_fifo()


def test_speech_is_written_as_it_comes(fake):  # noqa: F811
    done = run("speak", "Hi.", "--stream", "-o", "a.wav", "--seed", "3", "--json")
    assert done.exit_code == 0, done.stderr
    assert files() == ["a.wav"]
    assert soundfile.info("a.wav").frames == RATE
    said = json.loads(done.stdout)
    assert (said["ok"], said["seed"], said["frames"], said["timings"]["ttfa_s"]) == (True, 3, 25, 0.2)
    piped = run("speak", "Hi.", "--stream", "-o", "-", "-q")
    assert soundfile.read(io.BytesIO(piped.stdout_bytes))[0].shape == (RATE,)


def test_only_wav_and_bare_samples_can_grow(fake):  # noqa: F811
    refused(run("speak", "Hi.", "--stream", "-o", "a.flac"), "a.flac", "flac cannot grow")
    assert fake.asked is None
    refused(run("speak", "Hi.", "--stream", "-o", "no/such/a.wav"), "no/such")


def test_what_was_not_spoken_is_told(fake):  # noqa: F811
    fake.stop_reason = "max_frames"
    assert "cut off by the limit of its length" in run("speak", "Hi.", "--stream", "-o", "a.wav").stderr


def test_a_listener_who_leaves_ends_the_work(fake, monkeypatch):  # noqa: F811
    """The model is not called further, and there is no traceback."""
    write = WavWriter.write

    def leave(self, pcm):
        if fake.given == 2:
            raise BrokenPipeError(32, "Broken pipe")
        write(self, pcm)

    monkeypatch.setattr(WavWriter, "write", leave)
    done = run("speak", "Hi.", "--stream", "-o", "-", "-q")
    assert (fake.given, done.exit_code) == (2, 1)
    assert "Traceback" not in done.stderr
