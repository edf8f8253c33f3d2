"""Helpers for tests of commands: a TTS that records its requests, and a runner that separates stdout and stderr."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner

import fishrt.tts
from fishrt.cli import main
from fishrt.errors import PromptError
from fishrt.speaking.stream import SpeechStream
from fishrt.speaking.warnings import piece_warnings
from fishrt.speech import AudioChunk, PieceInfo, Progress, Speech, SpeechInfo, Timings
from fishrt.voices.loudness import Loudness
from fishrt.voices.prepared import prepared_path
from fishrt.voices.store import VoiceStore, find_voice, user_folder
from helpers_text import bundle_folder, voice

RATE, HOP = 16000, 640


class FakeTts:
    """A TTS that speaks a second of tone, and records its requests."""

    def __init__(self, bundle):
        self.bundle = bundle
        self.asked = None
        self.texts = []
        self.failure = None
        self.failures = {}
        self.stop_reason = "end"

        self.prepared = []

    sample_rate = RATE

    def prepared_path(self, folder):
        return prepared_path(folder, self.bundle.manifest.specs["slow_ar"].identity)

    def prepare(self, voice, folder=None):
        self.prepared.append((voice.name, folder))
        self.prepared_path(folder).touch()

    def speak(self, text, *, voice, seed, sampling, progress=None, **request):
        voice = voice and [self.voice(v) if isinstance(v, str) else v for v in voice]
        self.texts.append(text)
        self.asked = {"text": text, "voice": voice, "seed": seed, "sampling": sampling, **request}
        if progress:
            progress(Progress(piece=0, pieces=1, frames=25, audio_s=1.0, elapsed_s=0.5))
        if failure := self.failures.get(text, self.failure):
            raise failure
        pieces = (PieceInfo(text, 25, self.stop_reason),)
        info = SpeechInfo(
            seed=seed if seed is not None else 99,
            sampling=sampling.resolve(self.bundle.manifest.model.sampling),
            voices=tuple(v.name for v in voice) if voice else ("minna",),
            pieces=pieces,
            frames=25,
            audio_s=1.0,
            timings=Timings(0.1, 0.4, 0.1, None),
            rtf=0.5,
            provider="cpu",
            bundle="test",
            bundle_sha256="00",
            warnings=tuple(piece_warnings(pieces, 1)),
        )
        return Speech(tone(1.0), RATE, np.zeros((4, 25), np.int64), info)

    def stream(self, text, **request):
        """Yield the tone in chunks of a quarter; `given` counts them."""
        speech = self.speak(text, **request)

        def chunks():
            for n, pcm in enumerate(np.split(speech.pcm, 4)):
                self.given = n + 1
                reason, timings = self.stop_reason if n == 3 else None, Timings(0.0, 0.1, 0.02, 0.2 if n == 0 else None)
                yield AudioChunk(pcm, RATE, speech.codes[:, : 25 * (n == 3)], 0, text, reason, 1, timings)

        job = SimpleNamespace(task=SimpleNamespace(warnings=[]), closed=threading.Event(), done=False, error=None)
        made = chunks()

        def pop():
            chunk = next(made, None)
            job.done = chunk is None
            return chunk

        job.pop, job.close = pop, job.closed.set
        job.warnings = lambda pieces: tuple(piece_warnings(pieces, 1))
        job.describe = lambda pieces, samples, timings: replace(
            speech.info, pieces=pieces, frames=sum(p.frames for p in pieces), audio_s=samples / RATE, timings=timings
        )
        return SpeechStream(job, lambda: None)

    def voice(self, name):
        return find_voice(name, self.own, self.bundle).load(name, self)

    def loudness(self, codes):
        return Loudness(-20.0, 0.5)

    def check_transcript(self, text, what):
        if "<|" in text:
            raise PromptError(f"{what} contains a control token")

    def encode(self, pcm, rate):
        return np.full((4, -(-len(pcm) * RATE // rate // HOP)), 5, np.int64)

    def decode(self, codes):
        return tone(codes.shape[1] * HOP / RATE)


def tone(seconds: float) -> np.ndarray:
    return np.sin(np.arange(int(seconds * RATE)) * 0.1).astype(np.float32) * 0.5


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A FakeTts that replaces every TTS; `loads` records the arguments of each load."""
    bundle = bundle_folder(tmp_path / "bundle", voices=[voice("minna"), voice("otto")])
    made = FakeTts(bundle)
    made.loads = []

    def load(path, *, voices, **options):
        made.loads.append((path, options))
        made.own = VoiceStore(user_folder() if voices is None else voices)
        return made

    monkeypatch.setattr(fishrt.tts.TTS, "load", load)
    monkeypatch.setattr("fishrt.cli.base.options.embedded_bundle", lambda: bundle.path)
    monkeypatch.setenv("FISHRT_VOICE_DIR", str(tmp_path / "own voices"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return made


@pytest.fixture
def recording(tmp_path):
    soundfile.write(tmp_path / "me.wav", tone(1.0), RATE)
    return str(tmp_path / "me.wav")


def run(*arguments, stdin=None):
    return CliRunner().invoke(main, [str(a) for a in arguments], input=stdin)


def files() -> list[str]:
    return sorted(p.name for p in Path().iterdir())


def refused(result, *words, kind=2) -> str:
    """Check that a command failed with an exit status, an error line and no traceback. Return stderr."""
    assert result.exit_code == kind, result.output
    assert "error: " in result.stderr.lower()
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr
    return result.stderr
