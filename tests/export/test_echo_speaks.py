"""Speech behind `TTS` with the real graphs of a small diffusion model, as the export writes them.

Its weights are random, so that its speech ends with its window. Texts and their pieces: tests/runtime/test_diffusion_text.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from echo_model import EchoModel
from fishrt import TTS, Denoising, Speech, Voice
from fishrt.diffusion.text import Pace
from helpers_cli import run

TEXT = "Hi all."
WHOLE, BLOCKS = Denoising(steps=2, frames=24), Denoising(steps=2, blocks=(4, 7, 13))
HOP = 2048
SOUND = 2e-5
"""Largest difference of samples: chunks of other lengths round otherwise."""


@pytest.fixture(scope="module")
def tts(echo_model: EchoModel, tmp_path_factory: pytest.TempPathFactory) -> TTS:
    return TTS.load(echo_model.bundle, provider="cpu", threads=1, voices=tmp_path_factory.mktemp("voices"))


@pytest.fixture(scope="module")
def voice(tts: TTS) -> Voice:
    n = np.arange(HOP * 9 + 100)
    recording = (0.3 * np.sin(n * 0.05) * (1 + np.sin(n * 0.0003))).astype(np.float32)
    return Voice.from_audio(tts, (recording, tts.sample_rate), name="anna")


@pytest.fixture(scope="module")
def blocks(tts: TTS, voice: Voice) -> Speech:
    """What they say, with a voice."""
    return tts.speak(TEXT, voice=voice, seed=3, denoising=BLOCKS)


def test_a_text_becomes_sound(tts: TTS, blocks: Speech, voice: Voice) -> None:
    assert voice.sound.shape == (8, 80), "whole patches"
    assert blocks.latents is not None
    assert blocks.latents.shape == (24, 80)
    assert (len(blocks.pcm), blocks.sample_rate) == (24 * HOP, 44100)
    assert np.isfinite(blocks.pcm).all()
    assert blocks.pcm.std() > 0
    assert (blocks.info.stop_reasons, blocks.info.voices) == (("max_frames",), ("anna",))
    other = tts.speak(TEXT, seed=3, denoising=BLOCKS)
    assert not np.allclose(other.latents, blocks.latents, atol=1e-3), "the voice changes nothing"  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["fast", "balanced"])
def test_a_stream_of_blocks_is_the_whole(tts: TTS, voice: Voice, blocks: Speech, mode: str) -> None:
    chunks = list(tts.stream(TEXT, voice=voice, seed=3, denoising=BLOCKS, mode=mode))  # type: ignore[arg-type]
    assert len(chunks) >= 3
    np.testing.assert_array_equal(np.concatenate([chunk.latents for chunk in chunks]), blocks.latents)  # type: ignore[misc]
    np.testing.assert_allclose(np.concatenate([chunk.pcm for chunk in chunks]), blocks.pcm, atol=SOUND)


def test_one_block_is_the_whole(tts: TTS, voice: Voice) -> None:
    whole, block = (tts.speak(TEXT, voice=voice, seed=1, denoising=d) for d in (WHOLE, Denoising(steps=2, blocks=(24,))))
    np.testing.assert_array_equal(block.latents, whole.latents)  # type: ignore[arg-type]
    np.testing.assert_array_equal(block.pcm, whole.pcm)


@pytest.mark.parametrize("frames", [4, 11])
def test_fewer_blocks_are_a_prefix_of_the_sound(tts: TTS, voice: Voice, blocks: Speech, frames: int) -> None:
    """A block does not see later ones, and the codec no later frames."""
    fewer = tts.speak(TEXT, voice=voice, seed=3, denoising=BLOCKS, max_frames=frames)
    np.testing.assert_array_equal(fewer.latents, blocks.latents[:frames])  # type: ignore[index]
    np.testing.assert_allclose(fewer.pcm, blocks.pcm[: frames * HOP], atol=SOUND)


def test_a_window_of_fewer_frames_is_other_speech(tts: TTS, voice: Voice) -> None:
    """Within a block every frame sees all others: a shorter window is no part of a longer one."""
    longer, shorter = (tts.speak(TEXT, voice=voice, seed=3, denoising=Denoising(steps=2, frames=n)) for n in (24, 16))
    assert not np.allclose(longer.latents[:16], shorter.latents, atol=1e-3)  # type: ignore[index, arg-type]


def test_the_same_seed_gives_the_same_latents(echo_model: EchoModel, tts: TTS, voice: Voice, blocks: Speech) -> None:
    """Also beside other requests, and in a process of its own."""
    texts = [TEXT, "Something else.", TEXT]
    first, _, again = (speech.latents for speech in tts.speak_many(texts, voice=voice, seed=3, denoising=BLOCKS))
    with TTS.load(echo_model.bundle, provider="cpu", threads=2) as other:
        anew = other.speak(TEXT, voice=voice, seed=3, denoising=BLOCKS).latents
    for latents in (first, again, anew):
        np.testing.assert_array_equal(latents, blocks.latents)  # type: ignore[arg-type]
    changed = tts.speak(TEXT, voice=voice, seed=4, denoising=BLOCKS)
    assert not np.allclose(changed.latents, blocks.latents, atol=1e-3)  # type: ignore[arg-type]


def test_a_long_text_is_spoken_in_pieces_with_every_word_once(tts: TTS) -> None:
    text = " ".join(f"Sentence {n} has words that nobody else has, w{n}." for n in range(12))
    settings = Denoising(steps=1, blocks=(4,), pace=Pace(target_s=9, min_s=5, max_s=12))
    speech = tts.speak(text, seed=9, denoising=settings)
    pieces = [piece.text for piece in speech.info.pieces]
    assert len(pieces) > 1
    assert " ".join(piece.removeprefix("[S1] ") for piece in pieces) == text
    assert [piece.frames for piece in speech.info.pieces] == [4] * len(pieces)
    alone = tts.speak(pieces[1], seed=10, denoising=settings)
    np.testing.assert_array_equal(alone.latents, speech.latents[4:8])  # type: ignore[index, arg-type]


def test_a_prepared_voice_speaks_as_before(echo_model: EchoModel, tts: TTS, voice: Voice, blocks: Speech, tmp_path: Path) -> None:
    with TTS.load(echo_model.bundle, provider="cpu", threads=1, voices=tmp_path) as other:
        folder = other.store.add(voice)
        other.prepare("anna", folder)
    with TTS.load(echo_model.bundle, provider="cpu", threads=1, voices=tmp_path) as other:
        speech = other.speak(TEXT, voice="anna", seed=3, denoising=BLOCKS)
    np.testing.assert_array_equal(speech.latents, blocks.latents)  # type: ignore[arg-type]


def test_commands(echo_model: EchoModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A voice without words, and a stream."""
    monkeypatch.chdir(tmp_path)
    soundfile.write("anna.wav", 0.3 * np.sin(np.arange(HOP * 9) * 0.05), 44100)
    where = ["--bundle", echo_model.bundle.path, "--voice-dir", "own"]
    done = run("voice", "add", "anna", "--audio", "anna.wav", *where)
    assert done.exit_code == 0, done.output
    shown = json.loads(run("voice", "show", "anna", *where, "--json").stdout)
    assert (shown["channels"], shown["frames"], shown["transcript"]) == (80, 8, "")
    speak = ["speak", "Hi.", *where, "--voice", "anna", "--seed", "1", "--json"]
    whole = json.loads(run(*speak, "--steps", "2", "--max-frames", "8", "-o", "whole.wav").stdout)
    assert (whole["denoising"]["blocks"], whole["denoising"]["steps"], whole["frames"]) == ([8], 2, 8)
    made = json.loads(run(*speak, "--stream", "--max-frames", "40", "-o", "stream.wav").stdout)
    assert (made["denoising"]["blocks"], made["denoising"]["steps"], made["frames"]) == ([32, 8], [8, 15], 40)
    encoded = json.loads(run("codec", "encode", "anna.wav", *where[:2], "-o", "anna.npy", "--json").stdout)
    assert (encoded["channels"], encoded["frames"]) == (80, 8)
    assert run("codec", "decode", "anna.npy", *where[:2], "-o", "again.wav").exit_code == 0
    assert soundfile.info("again.wav").frames == 8 * HOP
    given = run("speak", "Hi.", *where, "--reference", "anna.npy", "--steps", "1", "--max-frames", "4", "--json")
    assert json.loads(given.stdout)["voices"] == ["anna.npy"]
    unknown = run("speak", "Hi.", *where, "--voice", "nobody")
    assert unknown.stderr.splitlines()[-1] == "hint: fishrt voice add NAME --audio FILE"
