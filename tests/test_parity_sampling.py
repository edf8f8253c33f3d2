"""Every recorded sampler and RAS case of the original implementation through our sampling functions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fishrt.bundle import LanguageModel, RepetitionAware
from fishrt.sampling import Sampling, audio_ids, draw, filter_probs, sample_main
from helpers_text import golden, language_model
from tolerances import TOLERANCES

pytestmark = pytest.mark.parity
_, META, ARRAYS = golden()


def model() -> LanguageModel:
    begin, end = META["semantic_range"]
    plain = language_model(semantic_begin_id=begin, semantic_end_id=end, end_id=META["im_end_id"], vocab_size=META["vocab_size"])
    return replace(plain, sampling=replace(plain.sampling, repetition_aware=RepetitionAware(10, 1.0, 0.9)))


@pytest.mark.parametrize("case", META["sampler_cases"], ids=lambda case: case["prefix"])
def test_filters_and_draw_equal_the_recorded_ones(case: dict[str, Any]) -> None:
    logits, expected, noise = (ARRAYS[f"{case['prefix']}/{name}"] for name in ("logits", "probs", "q"))
    probs = filter_probs(logits, case["temperature"], case["top_p"], case["top_k"])
    assert probs.dtype == np.float32
    differ = (probs > 0) != (expected > 0)
    assert np.all(np.abs(inclusive_cumulative(logits) - case["top_p"])[differ] <= TOLERANCES["cumulative"])
    probs = np.where(differ & (expected == 0), np.float32(0), probs)
    np.testing.assert_allclose(probs / probs.sum(), expected, rtol=0, atol=TOLERANCES["probs"])
    assert draw(probs, noise) == case["index"]


def inclusive_cumulative(logits: np.ndarray) -> np.ndarray:
    """For each entry, the probability of itself and all likelier ones, in float64."""
    order = np.argsort(-logits, kind="stable")
    weights = np.exp(logits.astype(np.float64) - logits.max())
    cumulative = np.empty(len(logits))
    cumulative[order] = np.cumsum(weights[order]) / weights.sum()
    return cumulative


@pytest.mark.parametrize("case", META["ras_cases"], ids=lambda case: f"{case['prefix']}-{case['kind']}")
def test_repetition_aware_draws_equal_the_recorded_ones(case: dict[str, Any]) -> None:
    lm = model()
    ids = audio_ids(lm)
    logits = ARRAYS[f"{case['prefix']}/logits"][ids]
    noise = [ARRAYS[f"{case['prefix']}/{name}"][ids] for name in ("q_normal", "q_high")]
    recent = ARRAYS[f"{case['prefix']}/window"][0].tolist() if case["has_window"] else []
    sampling = Sampling(case["temperature"], case["top_p"], case["top_k"])
    assert sample_main(logits, ids, sampling, lm, [], noise) == case["first_draw"]
    assert sample_main(logits, ids, sampling, lm, recent, noise) == case["result"]


def test_the_spoken_tokens_are_those_without_bias() -> None:
    np.testing.assert_array_equal(audio_ids(model()), np.flatnonzero(ARRAYS["ras/bias"] == 0))


def test_both_ways_of_repetition_aware_sampling_are_among_the_cases() -> None:
    taken = {case["result"] != case["first_draw"] for case in META["ras_cases"]}
    assert taken == {True, False}
