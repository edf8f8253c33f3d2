"""The three steps of the original's users: a recording to codes, text to codes, codes to audio."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from fishrt.tts import TTS
from helpers_cli import refused, run

REFERENCES = Path(__file__).parents[2] / "export/minnow/references"
WORDS = {name: (REFERENCES / name / "reference.lab").read_text(encoding="utf-8").strip() for name in ("awb", "slt")}
CPU = ("--provider", "cpu", "--threads", "1")


def samples(path: str) -> np.ndarray:
    return soundfile.read(path, dtype="int16")[0].astype(int)


@pytest.fixture
def prompts(tmp_path, monkeypatch):
    """The codes of two recordings: step one."""
    monkeypatch.chdir(tmp_path)
    for name in WORDS:
        done = run("codec", "encode", REFERENCES / name / "reference.flac", "-o", f"{name}.npy", *CPU)
        assert done.exit_code == 0, done.output
    return tmp_path


def reference(*names: str) -> list[str]:
    return [word for name in names for word in ("--reference", f"{name}.npy", "--reference-text", WORDS[name])]


def test_three_steps_give_the_audio_of_one(prompts):
    text = "<|speaker:0|>Good morning.<|speaker:1|>Hello."
    asked = (text, *reference("awb", "slt"), "--seed", "3", *CPU)
    for words in (
        ("speak", *asked, "--codes", "said.npy"),
        ("codec", "decode", "said.npy", "-o", "three.wav", *CPU),
        ("speak", *asked, "-o", "one.wav"),
    ):
        done = run(*words)
        assert done.exit_code == 0, done.output
    assert len(samples("one.wav")) > 16000
    assert (samples("three.wav") == samples("one.wav")).all()


def test_a_single_voice_differs_by_its_level_only(prompts):
    """One step brings it to the common loudness; codes have their own."""
    asked = ("Good morning.", *reference("awb"), "--seed", "3", *CPU)
    for words in (
        ("speak", *asked, "--codes", "said.npy"),
        ("codec", "decode", "said.npy", "-o", "three.wav", *CPU),
        ("speak", *asked, "-o", "one.wav"),
    ):
        assert run(*words).exit_code == 0
    one, three = samples("one.wav"), samples("three.wav")
    factor = (one @ three) / (three @ three)
    assert 0.2 < factor < 5
    assert np.abs(one - factor * three).max() < 2 + factor


def test_several_samples(prompts):
    done = run("speak", "Good morning.", "--codes", "s.npy", "--samples", "3", "--seed", "5", "--json", *CPU)
    data = json.loads(done.stdout)
    assert [(entry["output"], entry["seed"]) for entry in data["files"]] == [(f"s_{n}.npy", 5 + n) for n in range(3)]
    drawn = [np.load(f"s_{n}.npy") for n in range(3)]
    assert all(codes.dtype == np.int64 and len(codes) == 8 for codes in drawn)
    assert len({codes.tobytes() for codes in drawn}) == 3
    with TTS.load(provider="cpu", threads=1) as tts:
        assert (tts.speak("Good morning.", seed=6).codes == drawn[1]).all()
    assert "(" in run("speak", "Good morning.", "--codes", "s.npy", "--seed", "5", *CPU).stderr
    assert (np.load("s.npy") == drawn[0]).all()


def test_codes_are_drawn_without_the_codec(prompts, monkeypatch):
    opened: list[str] = []
    with TTS.load(provider="cpu", threads=1) as tts:
        engines = tts.engines
        find = type(engines).__getitem__
        monkeypatch.setattr(type(engines), "__getitem__", lambda self, role: opened.append(role) or find(self, role))
        speech = tts.draw("Good morning.", voice="slt", seed=1)
        assert set(opened) == {"slow_ar", "fast_ar"}
        assert (len(speech.pcm), speech.codes.shape[0]) == (0, 8)
        assert (tts.speak("Good morning.", voice="slt", seed=1).codes == speech.codes).all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--codes", "a.wav"], "written as .npy"),
        (["--codes", "a.npy", "-o", "b.wav"], "not audio"),
        (["--codes", "a.npy", "--speed", "2"], "not audio"),
        (["--codes", "a.npy", "--lines"], "not audio"),
        (["--codes", "no/a.npy"], "there is no folder"),
        (["--samples", "2"], "--samples is for --codes"),
    ],
)
def test_mistakes(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(run("speak", "Hi.", *arguments), words)
