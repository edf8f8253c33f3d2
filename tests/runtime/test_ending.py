"""The end of speech: what blocks give out is what the search in all frames finds, however they are cut."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fishrt.diffusion.denoising import Denoising
from fishrt.diffusion.ending import Ending, ends_quiet, first_flat, last_flat
from helpers_diffusion import diffusion_model

CHANNELS = 8
SECTIONS = st.lists(
    st.tuples(
        st.integers(1, 45), st.sampled_from([0.0, 0.005, 0.03, 0.049, 0.051, 0.08, 0.3, 1.0]), st.sampled_from([0.0, 0.09, 0.2])
    ),
    min_size=1,
    max_size=8,
)


def latents_of(sections: list[tuple[int, float, float]], seed: int = 0) -> np.ndarray:
    """Frames of each section: their number, standard deviation and mean."""
    noise = np.random.default_rng(seed)
    return np.concatenate([noise.normal(mean, std, (n, CHANNELS)) for n, std, mean in sections]).astype(np.float32)


def ending(**changes: Any) -> Ending:
    return Ending(Denoising(**changes).resolve(diffusion_model()))


def given_out(made: Ending, latents: np.ndarray, cuts: list[int]) -> list[np.ndarray]:
    """Push the blocks between the cuts until no more are wanted."""
    bounds = [0, *sorted({cut for cut in cuts if 0 < cut < len(latents)}), len(latents)]
    found = []
    for begin, end in pairwise(bounds):
        found.append(made.push(latents[begin:end], last=end == len(latents)))
        if made.stopped:
            break
    return found


@settings(max_examples=300)
@given(SECTIONS, st.lists(st.integers(1, 300), max_size=6), st.booleans())
@example([(1, 0.0, 0.0), (45, 1.0, 0.0)], [1], True)
def test_any_blocks_give_the_speech_of_the_whole(sections: Any, cuts: list[int], early_stop: bool) -> None:
    latents = latents_of(sections)
    made = ending(early_stop=early_stop)
    found = np.concatenate(given_out(made, latents, cuts))
    end = first_flat(latents, ended=True)
    np.testing.assert_array_equal(found, latents[:end])
    assert (made.end, made.given) == (end, end)


@given(SECTIONS, st.lists(st.integers(1, 300), max_size=6))
def test_the_search_is_that_of_its_definition(sections: Any, cuts: list[int]) -> None:
    latents = latents_of(sections)
    padded = np.concatenate([latents, np.zeros((20, CHANNELS))]).astype(np.float64)
    flat = (n for n in range(len(latents)) if padded[n : n + 20].std(ddof=1) < 0.05 and abs(padded[n : n + 20].mean()) < 0.1)
    assert first_flat(latents, ended=True) == next(flat, len(latents))


def test_frames_that_are_loud_are_given_at_once_and_quiet_ones_wait() -> None:
    made = ending()
    loud, quiet = latents_of([(32, 1.0, 0.0)]), latents_of([(6, 0.01, 0.0)])
    assert len(made.push(loud, last=False)) == 32
    assert len(made.push(quiet, last=False)) == 0
    more = made.push(loud, last=False)  # a pause, and not the end
    np.testing.assert_array_equal(more, np.concatenate([quiet, loud]))
    assert made.end is None


def test_speech_that_ends_in_a_block_stops_the_blocks() -> None:
    made = ending()
    assert len(made.push(latents_of([(10, 1.0, 0.0), (22, 0.01, 0.0)]), last=False)) == 10
    assert (made.stopped, made.end, made.resumes) == (True, 10, False)


def test_without_an_early_stop_all_blocks_are_made_and_the_rest_is_left_out() -> None:
    made = ending(early_stop=False)
    assert len(made.push(latents_of([(10, 1.0, 0.0), (22, 0.0, 0.0)]), last=False)) == 10
    assert not made.stopped
    assert len(made.push(latents_of([(10, 1.0, 0.0)]), last=True)) == 0
    assert (made.stopped, made.end) == (True, 10)


def test_speech_after_the_pause_that_ended_it_is_told() -> None:
    made = ending()
    made.push(latents_of([(30, 1.0, 0.0), (25, 0.01, 0.0), (30, 0.9, 0.0)]), last=True)
    assert (made.end, made.resumes) == (30, True)
    silent = ending()
    silent.push(latents_of([(30, 1.0, 0.0), (25, 0.01, 0.0), (30, 0.2, 0.0)]), last=True)
    assert (silent.end, silent.resumes) == (30, False)


def test_a_quiet_end_of_a_block_stops_the_next() -> None:
    quiet = latents_of([(10, 1.0, 0.0), (6, 0.001, 0.0)])
    made = ending(zero_tail_frames=6)
    found = made.push(quiet, last=False)
    assert (made.stopped, made.end, len(found)) == (True, 10, 10)
    assert not ends_quiet(quiet, 7, 0.012)
    assert not ends_quiet(quiet[10:], 7, 0.012)
    assert not ends_quiet(latents_of([(32, 0.02, 0.0)]), 32, 0.012)


def test_silence_alone_gives_nothing() -> None:
    made = ending()
    assert len(made.push(np.zeros((40, CHANNELS), np.float32), last=True)) == 0
    assert (made.end, made.resumes) == (0, False)


def test_the_streaming_variant_takes_nothing_back() -> None:
    made = ending(variant="streaming", zero_tail_frames=4)
    speech, silence = latents_of([(8, 1.0, 0.0)]), np.zeros((40, CHANNELS), np.float32)
    block = np.concatenate([speech[:6], silence[:2]])
    assert len(made.push(block, last=False)) == 8
    assert len(made.push(silence, last=False)) == 0
    assert (made.stopped, made.end, made.given) == (True, 8, 8)


@pytest.mark.parametrize("frames", [0, 1, 19, 20])
def test_few_frames(frames: int) -> None:
    latents = np.ones((frames, CHANNELS), np.float32)
    assert first_flat(latents, ended=True) == last_flat(latents) == frames
