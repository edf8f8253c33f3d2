"""Every recorded sampler and RAS case of the original implementations through our sampling functions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fishrt.bundle.features import LanguageModel, RepetitionAware
from fishrt.language_model.sampling import Sampling, audio_ids, penalised, sample, sample_main
from helpers_text import filtered, language_model
from tolerances import TOLERANCES
from vectors import CHOSEN

pytestmark = pytest.mark.parity


def load(golden: Path) -> tuple[dict[str, Any], Any]:
    return json.loads((golden / "lm/meta.json").read_text(encoding="utf-8")), np.load(golden / "lm/vectors.npz")


def model(meta: dict[str, Any]) -> LanguageModel:
    begin, end = meta["semantic_range"]
    plain = language_model(semantic_begin_id=begin, semantic_end_id=end, end_id=meta["im_end_id"], vocab_size=meta["vocab_size"])
    return replace(plain, sampling=replace(plain.sampling, repetition_aware=RepetitionAware(10, 1.0, 0.9)))


def test_penalty_filters_and_draw_equal_the_recorded_ones(golden: Path) -> None:
    meta, arrays = load(golden)
    penalties = []
    for case in meta["sampler_cases"]:
        name = case["prefix"]
        logits, expected, noise = (arrays[f"{name}/{array}"] for array in ("logits", "probs", "q"))
        if "repetition_penalty" in case:
            seen = np.array(case["previous_tokens"] or [], np.int64)
            logits = penalised(logits, seen, case["repetition_penalty"])
            np.testing.assert_array_equal(logits, arrays[f"{name}/penalised_logits"], err_msg=name)
            penalties.append(len(seen))
        probs = filtered(logits, case["temperature"], case["top_p"], case.get("top_k"))
        assert probs.dtype == np.float32
        differ = (probs > 0) != (expected > 0)
        assert np.all(np.abs(inclusive_cumulative(logits) - case["top_p"])[differ] <= TOLERANCES["cumulative"]), name
        at_border = differ & (expected == 0)
        probs = np.where(at_border, np.float32(0), probs)
        np.testing.assert_allclose(probs / probs.sum(), expected, rtol=0, atol=TOLERANCES["probs"], err_msg=name)
        sampling = Sampling(case["temperature"], case["top_p"], case.get("top_k"))
        assert sample(logits, sampling, np.where(at_border, np.float32(1e30), noise)) == case["index"], name
    assert bool(penalties) == any(key.endswith("/penalised_logits") for key in arrays)


def inclusive_cumulative(logits: np.ndarray) -> np.ndarray:
    """Return, for each entry, the sum of the probabilities of itself and all likelier ones, in float64."""
    order = np.argsort(-logits, kind="stable")
    weights = np.exp(logits.astype(np.float64) - logits.max())
    cumulative = np.empty(len(logits))
    cumulative[order] = np.cumsum(weights[order]) / weights.sum()
    return cumulative


def test_repetition_aware_draws_equal_the_recorded_ones(s2_golden: Path) -> None:
    meta, arrays = load(s2_golden)
    lm = model(meta)
    ids = audio_ids(lm)
    for case in meta["ras_cases"]:
        name = f"{case['prefix']}-{case['kind']}"
        logits = arrays[f"{case['prefix']}/logits"][ids]
        noise = [arrays[f"{case['prefix']}/{array}"][ids] for array in ("q_normal", "q_high")]
        recent = arrays[f"{case['prefix']}/window"][0].tolist() if case["has_window"] else []
        sampling = Sampling(case["temperature"], case["top_p"], case["top_k"])
        assert sample_main(logits, ids, sampling, lm, [], noise) == case["first_draw"], name
        assert sample_main(logits, ids, sampling, lm, recent, noise) == case["result"], name
    assert CHOSEN or {case["result"] != case["first_draw"] for case in meta["ras_cases"]} == {True, False}


def test_the_spoken_tokens_are_those_without_bias(s2_golden: Path) -> None:
    meta, arrays = load(s2_golden)
    np.testing.assert_array_equal(audio_ids(model(meta)), np.flatnonzero(arrays["ras/bias"] == 0))
