"""Voices of latents: made of recordings without their words, stored, and refused where they do not fit."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import soundfile

from fishrt import Bundle, Voice, VoiceStore
from fishrt.errors import AudioError, PromptError, VoiceError
from fishrt.voices.loudness import Loudness
from helpers_diffusion import diffusion_manifest, diffusion_model, latent_codec
from helpers_text import manifest, voice

CODEC = latent_codec(sample_rate=800, hop=20, sample_multiple=20)
RATE = CODEC.sample_rate


class FakeTts:
    """A TTS of a diffusion model: a frame of a recording encodes to its first sample."""

    def __init__(self, **model) -> None:
        content = diffusion_manifest(model=diffusion_model(max_voice_frames=400, voice_seconds=(1.0, 5.0), **model), codec=CODEC)
        self.bundle = Bundle(Path("some bundle"), content)
        self.heard = []

    def encode(self, pcm, rate):
        assert rate == RATE
        self.heard.append(pcm)
        frames = len(pcm) // CODEC.hop // 4 * 4
        return np.repeat(pcm[: frames * CODEC.hop : CODEC.hop, None], 8, axis=1)

    def loudness(self, sound):
        return Loudness(-20.0 - len(sound) / 100, 0.5)

    def check_transcript(self, text, what):
        """It needs no words."""


class SpeakingTts(FakeTts):
    """A TTS of a language model."""

    def __init__(self) -> None:
        super().__init__()
        self.bundle = Bundle(Path("another bundle"), manifest())

    def encode(self, pcm, rate):
        return np.full((4, 20), 5)

    def check_transcript(self, text, what):
        if not text:
            raise PromptError("no words")


def tone(seconds: float) -> np.ndarray:
    """Noise with most of its power in the deep."""
    walk = np.cumsum(np.random.default_rng(0).standard_normal(int(seconds * RATE)))
    return (0.5 * walk / np.abs(walk).max()).astype(np.float32)


@pytest.fixture
def store(tmp_path: Path) -> VoiceStore:
    return VoiceStore(tmp_path / "voices")


def test_a_recording_alone_is_a_voice() -> None:
    made = Voice.from_audio(FakeTts(), (tone(2), RATE), name="anna")
    assert made.latents is not None
    assert made.sound is made.latents
    assert (made.latents.shape, made.codes.shape, made.transcript) == ((80, 8), (0, 80), "")
    assert made.loudness == Loudness(-20.8, 0.5)
    assert Voice.from_audio(FakeTts(), (tone(2), RATE), " What Anna says. ").transcript == "What Anna says."


def test_only_the_recording_is_doubted(caplog: pytest.LogCaptureFixture) -> None:
    Voice.from_audio(FakeTts(), (tone(2), RATE), "?")
    assert not caplog.messages
    Voice.from_audio(FakeTts(), (tone(6), RATE))
    assert "6.0 s long; 1 to 5 s is best" in caplog.text


@pytest.mark.parametrize(("seconds", "message"), [(0.1, "too short"), (10.1, "too long: 10.10 s; a voice takes 0.2 s to 10.0 s")])
def test_a_recording_has_the_length_that_the_model_takes(seconds: float, message: str) -> None:
    with pytest.raises(AudioError, match=message):
        Voice.from_audio(FakeTts(), (tone(seconds), RATE))


def test_a_store_keeps_latents(store: VoiceStore) -> None:
    made = Voice.from_audio(FakeTts(), (tone(2), RATE), name="anna")
    store.add(made)
    assert sorted(path.name for path in store.place("anna").iterdir()) == ["latents.npy", "recording.wav", "voice.json"]
    tts = FakeTts()
    again = store.load("anna", tts)
    np.testing.assert_array_equal(again.latents, made.latents)
    assert (again.loudness, again.transcript, again.codes.shape) == (made.loudness, "", (0, 80))
    assert not tts.heard


def test_each_codec_has_its_own_from_the_recording(store: VoiceStore) -> None:
    said = "Please call my brother."
    store.add(Voice.from_audio(SpeakingTts(), (tone(2), RATE), said, name="anna"))
    other = FakeTts()
    codec = dataclasses.replace(CODEC, fingerprint="e5f6" * 16)
    other.bundle = Bundle(Path("b"), dataclasses.replace(other.bundle.manifest, codec=codec))
    for _ in range(2):
        assert store.load("anna", other).latents is not None
    assert len(other.heard) == 1, "the latents are kept"
    assert (store.place("anna") / f"latents-{4 * 'e5f6'}.npy").is_file()
    assert store.load("anna", SpeakingTts()).latents is None


def test_a_voice_without_words_is_for_diffusion_models_only(store: VoiceStore) -> None:
    store.add(Voice.from_audio(FakeTts(), (tone(2), RATE), name="anna"))
    speaking = SpeakingTts()
    codec = dataclasses.replace(speaking.bundle.manifest.codec, fingerprint="another")
    speaking.bundle = Bundle(Path("b"), dataclasses.replace(speaking.bundle.manifest, codec=codec))
    with pytest.raises(VoiceError, match="it has no transcript"):
        store.load("anna", speaking)
    with pytest.raises(VoiceError, match="it has no transcript"):
        Voice.from_audio(SpeakingTts(), (tone(2), RATE))


def test_recordings_of_another_program_follow_each_other_after_a_second(store: VoiceStore) -> None:
    folder = store.folder / "anna"
    folder.mkdir(parents=True)
    for name, level in (("b", 0.25), ("a", 0.5)):
        soundfile.write(folder / f"{name}.wav", np.full(RATE, level, np.float32), RATE, "FLOAT")
    tts = FakeTts()
    made = store.load("anna", tts)
    np.testing.assert_array_equal(tts.heard[0], np.concatenate([np.full(RATE, 0.5), np.zeros(RATE), np.full(RATE, 0.25)]))
    assert (made.transcript, made.recording, made.sound.shape) == ("", None, (120, 8))
    with pytest.raises(VoiceError, match=r"no transcript a.lab"):
        store.load("anna", SpeakingTts())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latents": np.zeros((4, 7), np.float32)}, r"the latents of voice 'anna' have shape \[4, 7\]"),
        ({"latents": np.zeros((404, 8), np.float32)}, "1 to 400 frames"),
        ({"latents": np.full((4, 8), np.inf, np.float32)}, "not numbers"),
        ({"latents": None}, "the codes of voice 'anna' are int64; this codec takes latents"),
        ({"fingerprint": "of another"}, "made with the codec"),
    ],
)
def test_a_voice_that_does_not_fit_is_refused(changes: dict, message: str) -> None:
    good = Voice.of("anna", np.zeros((4, 8), np.float32), "", CODEC.fingerprint)
    good.check(FakeTts().bundle)
    with pytest.raises(VoiceError, match=message):
        dataclasses.replace(good, **changes).check(FakeTts().bundle)


def test_latents_are_no_voice_of_a_language_model() -> None:
    made = dataclasses.replace(voice(), latents=np.zeros((4, 8), np.float32), codes=np.zeros((0, 4), np.int64))
    with pytest.raises(VoiceError, match=r"codes of shape \[0, 4\]"):
        made.check(manifest())
