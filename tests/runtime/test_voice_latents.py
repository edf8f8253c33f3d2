"""Recordings → the latents of a voice."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fishrt.diffusion.latents import voice_latents
from fishrt.errors import AudioError
from fishrt.voices.recordings import in_turn
from helpers_diffusion import diffusion_model, latent_codec

HOP, CHANNELS = 10, 8
CODEC = latent_codec(sample_rate=40, hop=HOP)
MODEL = diffusion_model(max_voice_frames=48, voice_part_frames=12)


class Encoder:
    """A causal encoder: a frame has its samples' sum and the number of frames before it in the same call."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, pcm: np.ndarray) -> np.ndarray:
        assert len(pcm) % HOP == 0
        self.calls.append(len(pcm) // HOP)
        sums = pcm.reshape(-1, HOP).sum(axis=1)
        return np.stack([sums, np.arange(len(sums)), *np.zeros((CHANNELS - 2, len(sums)))], axis=1).astype(np.float32)


def ramp(samples: int) -> np.ndarray:
    return np.linspace(-0.5, 0.5, samples, dtype=np.float32)


@given(st.integers(4 * HOP, 49 * HOP - 1))
def test_a_recording_gives_its_whole_patches_in_parts(samples: int) -> None:
    encoder, pcm = Encoder(), ramp(samples)
    found = voice_latents(pcm, encoder, MODEL, CODEC)
    frames = samples // HOP // 4 * 4
    assert found.shape == (frames, CHANNELS)
    np.testing.assert_allclose(found[:, 0], pcm[: frames * HOP].reshape(-1, HOP).sum(axis=1), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found[:, 1], np.arange(frames) % MODEL.voice_part_frames)
    assert sum(encoder.calls) == frames


def test_recordings_follow_each_other_after_a_second() -> None:
    one, two = np.full(60, 0.1, np.float32), np.full(100, 0.2, np.float32)
    pcm, rate = in_turn([(one, CODEC.sample_rate), (two, CODEC.sample_rate)], 1.0)
    assert rate == CODEC.sample_rate
    found = voice_latents(pcm, Encoder(), MODEL, CODEC)[:, 0]
    np.testing.assert_allclose(found, [1] * 6 + [0] * 4 + [2] * 10, atol=1e-6)


def test_a_recording_that_is_too_loud_is_made_softer_and_no_other() -> None:
    loud, soft = np.full(80, -2.0, np.float32), np.full(80, 0.5, np.float32)
    pcm, _ = in_turn([(loud, 40), (soft, 40)], 1.0)
    found = voice_latents(pcm, Encoder(), MODEL, CODEC)[:, 0]
    np.testing.assert_allclose(found[:8], -10)
    np.testing.assert_allclose(found[-8:], 5)
    np.testing.assert_allclose(voice_latents(loud, Encoder(), MODEL, CODEC)[:, 0], -10)
    assert loud[0] == -2


@pytest.mark.parametrize(
    ("length", "message"),
    [(39, "0.97 s is too short; the model takes 1.00 to 12.0 s"), (490, "12.25 s is too long")],
)
def test_a_length_that_the_model_does_not_take_is_refused(length: int, message: str) -> None:
    with pytest.raises(AudioError, match=message):
        voice_latents(ramp(length), Encoder(), MODEL, CODEC)
