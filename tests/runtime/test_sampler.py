"""Times, guidance, rescaling and the factor on the voice, on cases with calculated results."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fishrt.diffusion.denoising import Denoising
from fishrt.diffusion.sampler import Block, SeededNoise, rescaled, times
from fishrt.errors import GraphError
from helpers_diffusion import diffusion_model

MODEL = diffusion_model()
SHAPE = (4, MODEL.channels)


def block(*, voiced: bool = True, factor: float = 1.0, noise: np.ndarray | None = None, **settings: Any) -> Block:
    denoising = Denoising(**{"steps": 4, **settings}).resolve(MODEL)
    noise = SeededNoise(0).draw(*SHAPE) if noise is None else noise
    at = times(denoising.steps, denoising.init_scale)
    return Block(noise, at, denoising, denoising.truncation, voiced=voiced, factor=factor)


def run(made: Block) -> list[tuple[tuple[str, ...], float]]:
    """Take all steps with velocities of 0; return the rows and the voice's factor of each."""
    seen = []
    while not made.done:
        seen.append((made.rows, made.voice_factor))
        made.accept(np.zeros((len(made.rows), *made.latents.shape), np.float32))
    return seen


@given(st.integers(1, 200), st.floats(0.01, 1))
def test_times_go_from_the_first_to_zero(steps: int, init_scale: float) -> None:
    found = times(steps, init_scale)
    assert found.dtype == np.float32
    assert (found[0], found[-1], len(found)) == (np.float32(init_scale), 0, steps + 1)
    np.testing.assert_allclose(found, init_scale * np.linspace(1, 0, steps + 1), atol=1e-7)
    assert np.all(np.diff(found) < 0)


def test_the_true_velocity_leads_from_noise_to_the_target() -> None:
    """Rectified flow: x at t is (1 − t) target + t noise, so that v = (x − target) ÷ t, and every step is exact."""
    target = SeededNoise(1).draw(*SHAPE)
    made = block(cfg_text=0.0, cfg_speaker=0.0, steps=7)
    while not made.done:
        made.accept(((made.latents - target) / made.t)[None])
    np.testing.assert_allclose(made.latents, target, atol=1e-6)


def test_guidance_adds_weighted_differences() -> None:
    made = block(cfg_text=3.0, cfg_speaker=8.0, steps=1, init_scale=1.0)
    assert made.rows == ("all", "no_text", "no_voice")
    velocity = SeededNoise(2).draw(3 * 4, MODEL.channels).reshape(3, *SHAPE)
    before = made.latents
    made.accept(velocity)
    guided = velocity[0] + 3 * (velocity[0] - velocity[1]) + 8 * (velocity[0] - velocity[2])
    np.testing.assert_allclose(made.latents, before - guided, atol=1e-5)


def test_guided_times_include_both_limits() -> None:
    rows = [rows for rows, _ in run(block(steps=4, init_scale=1.0, cfg_min_t=0.5, cfg_max_t=0.75))]
    assert [len(found) for found in rows] == [1, 3, 3, 1]
    assert [len(found) for found, _ in run(block(steps=2, cfg_max_t=0.999))] == [3, 1]  # 0.999 in float32 is more than in float64


def test_a_row_that_changes_nothing_is_not_computed() -> None:
    assert block(voiced=False).rows == ("all", "no_text")
    assert block(cfg_text=0.0).rows == ("all", "no_voice")
    assert block(cfg_text=0.0, voiced=False).rows == ("all",)


def test_truncation_makes_the_noise_smaller() -> None:
    np.testing.assert_array_equal(block(truncation=0.5).latents, np.float32(0.5) * block().latents)


@given(st.floats(0.01, 0.999), st.floats(0.5, 2), st.floats(0.5, 5))
def test_rescaling_is_that_of_its_definition(t: float, k: float, sigma: float) -> None:
    v, x = (SeededNoise(n).draw(*SHAPE).astype(np.float64) for n in (3, 4))
    snr = ((1 - t) / t) ** 2
    ratio = (snr * sigma**2 + 1) / (snr * sigma**2 / k + 1)
    exact = (ratio * ((1 - t) * v + x) - x) / (1 - t)
    np.testing.assert_allclose(rescaled(v, x, t, k, sigma), exact, atol=1e-8)


def test_rescaling_changes_nothing_with_k_of_one_or_at_the_start() -> None:
    v, x = (SeededNoise(n).draw(*SHAPE) for n in (3, 4))
    np.testing.assert_array_equal(rescaled(v, x, 0.5, 1.0, 3.0), v)
    np.testing.assert_array_equal(rescaled(v, x, 1.0, 1.2, 3.0), v)


def test_the_voice_is_forced_until_the_step_that_crosses_the_time_is_taken() -> None:
    """Times 0.999, 0.749, 0.4995, 0.250: the step from 0.749 crosses 0.6, and is still forced."""
    made = block(force_speaker=1.5, force_min_t=0.6)
    assert [factor for _, factor in run(made)] == pytest.approx([1.5, 1.5, 1.0, 1.0])
    assert made.voice_factor == pytest.approx(1.0)


def test_a_time_that_is_never_crossed_leaves_the_voice_forced_and_blocks_add_to_it() -> None:
    first = block(force_speaker=1.5, force_min_t=0.0)
    assert {factor for _, factor in run(first)} == {1.5}
    second = block(force_speaker=1.5, force_min_t=0.0, factor=first.voice_factor)
    assert {factor for _, factor in run(second)} == {2.25}
    assert {factor for _, factor in run(block(force_speaker=1.5, force_min_t=1.0))} == {1.5}


def test_without_force_speaker_the_voice_is_as_it_is() -> None:
    assert {factor for _, factor in run(block())} == {1.0}


def test_velocities_that_are_not_numbers_are_an_error() -> None:
    made = block()
    wrong = np.zeros((3, *SHAPE), np.float32)
    wrong[1, 2, 3] = np.nan
    with pytest.raises(GraphError, match="not numbers"):
        made.accept(wrong)


def test_steps_change_neither_the_noise_nor_the_velocities_that_are_given() -> None:
    noise, velocity = SeededNoise(0).draw(*SHAPE), np.ones((3, *SHAPE), np.float32)
    kept = noise.copy()
    made = block(noise=noise)
    made.accept(velocity)
    np.testing.assert_array_equal(noise, kept)
    np.testing.assert_array_equal(velocity, 1)


def test_noise_of_blocks_is_that_of_one_block() -> None:
    one, parts = SeededNoise(5), SeededNoise(5)
    whole = one.draw(12, 8)
    assert whole.dtype == np.float32
    np.testing.assert_array_equal(np.concatenate([parts.draw(3, 8), parts.draw(9, 8)]), whole)
    assert abs(float(whole.mean())) < 0.4
    assert not np.array_equal(SeededNoise(6).draw(12, 8), whole)
