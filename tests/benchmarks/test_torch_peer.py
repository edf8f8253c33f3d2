"""The torch peer that draws whole columns draws the same as the loop, for every rule of sampling, eager and compiled."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the export extra")

import torch

from fishrt.bundle.features import RepetitionAware, RepetitionPenalty, SamplingDefaults
from fishrt.language_model.batch import DualAR
from fishrt.language_model.drawing import Drawer, FrameDrawer, StepDrawer
from fishrt.language_model.sampling import Sampling, SeededNoise
from fishrt_export.sources.cases import random_prompt
from helpers_lm import draws_of, frames_of
from torch_peer import load_torch, open_torch, open_torch_frames

AWARE = RepetitionAware(window=3, temperature=1.8, top_p=0.99)
RULES = {
    "repetition-aware": {"repetition_aware": AWARE},
    "penalty by row": {"repetition_penalty": RepetitionPenalty(1.2, 4, "row")},
    "penalty by the oldest column": {"repetition_penalty": RepetitionPenalty(1.2, 4, "oldest_column")},
    "penalty on codes only": {"repetition_penalty": RepetitionPenalty(1.2, 4, "none")},
}
SETTINGS = (Sampling(0.7, 0.8), Sampling(1.0, 0.9, 30), Sampling(1.9, 1e-6))


def outputs_of_a_slow_ar(spec: Any, seed: int) -> Iterator[dict[str, np.ndarray]]:
    """Yield outputs with few likely tokens, which therefore repeat; with odd seeds, all logits are below 0."""
    rng = np.random.default_rng(seed)
    logits, hidden = ((1, int(t.shape[1])) for t in spec.results)
    likely = 6 * (rng.random(logits) < 4 / logits[1]) - 20 * (seed % 2)
    while True:
        drawn = rng.standard_normal(logits) + likely
        yield {"logits": drawn.astype(np.float32), "hidden": rng.standard_normal(hidden).astype(np.float32)}


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_torch_draws_whole_frames_as_the_loop_does(golden_model, rules):
    if not golden_model.fits:
        pytest.skip("the golden language model and codec have numbers of codebooks that do not fit")
    settings = {"repetition_aware": None, "repetition_penalty": None, **rules}
    lm = replace(golden_model.lm.describe("audio"), sampling=SamplingDefaults(1.0, 0.9, None, **settings))
    model = load_torch(golden_model.checkpoint, torch.float32)
    steps = open_torch(golden_model.checkpoint, torch.float32)["fast_ar"]
    frame = open_torch_frames(model, lm)["fast_ar"]
    for seed, sampling in enumerate(SETTINGS):
        resolved = sampling.resolve(lm.sampling)
        both = []
        for kind, engine in ((StepDrawer, steps), (FrameDrawer, frame)):
            drawer: Drawer = kind(engine, lm, 1)
            row, columns = draws_of(lm, resolved, seed), []
            for results in islice(outputs_of_a_slow_ar(model.slow_spec, seed), 10):
                columns.append(drawer.draw(results, [row])[0].copy())
                row.add(columns[-1])
            both.append(np.stack(columns))
        assert np.array_equal(*both)


def test_compiled_torch_says_the_same(s2_model):
    """Compiled without kernels, with a static cache under a mask and resident results."""
    source = s2_model.lm
    lm, model = source.describe("audio"), load_torch(s2_model.checkpoint, torch.float32)
    prompt = random_prompt(source.config, source.ids, (1, 9), np.random.default_rng(0))[0]
    sampling = Sampling().resolve(lm.sampling)
    spoken = []
    for options in (None, {"backend": "eager"}):
        engines = open_torch_frames(model, lm, options)
        pair = DualAR(engines["slow_ar"], engines["fast_ar"], lm)
        for _ in range(2 if options else 1):  # the second generation finds the first one's caches, cleared
            spoken.append(np.stack(frames_of(pair, prompt, sampling, SeededNoise(0), 6)))
    assert np.array_equal(spoken[0], spoken[1])
    assert np.array_equal(spoken[0], spoken[2])
