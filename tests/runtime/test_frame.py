"""The frame graph draws the same as the loop, for every rule of sampling, and refuses unsupported rules."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import pytest

from fishrt.bundle.features import USUAL, LanguageModel, RepetitionAware, RepetitionPenalty, SamplingDefaults
from fishrt.errors import GraphError, SamplingError
from fishrt.language_model import drawing, frame
from fishrt.language_model.drawing import Drawer, Draws, FrameDrawer, StepDrawer
from fishrt.language_model.sampling import Sampling, SeededNoise, main_ids
from helpers_lm import draws_of
from tiny import GoldenModel

COLUMNS = 12
SETTINGS = [
    Sampling(0.7, 0.8, None, 1.3),
    Sampling(1.5, 1.0, None, 0.8),
    Sampling(1.0, 0.9, 30, 1.0),
    Sampling(0.01, 1.0, 1, 1.1),
    Sampling(1.9, 1e-6, None, 1.9),
    Sampling(1.0, 0.5, 3, 1.1),
    Sampling(0, 0.9, None, 1.1).resolve(SamplingDefaults(1.0, 0.9, None, None, RepetitionPenalty(1.2, 4, "row"))),  # greedy
]
AWARE = RepetitionAware(window=3, temperature=1.8, top_p=0.99)


def penalty(main: str) -> RepetitionPenalty:
    return RepetitionPenalty(penalty=1.2, window=4, main=main)


RULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "repetition-aware": {"repetition_aware": AWARE},
    "penalty by row": {"repetition_penalty": penalty("row")},
    "penalty by the oldest column": {"repetition_penalty": penalty("oldest_column")},
    "penalty on codes only": {"repetition_penalty": penalty("none")},
    "all at once": {"repetition_aware": AWARE, "repetition_penalty": penalty("row")},
}


def model_of(described: LanguageModel, rules: dict[str, Any], **changes: Any) -> LanguageModel:
    settings = {"repetition_aware": None, "repetition_penalty": None, **rules}
    return replace(described, sampling=SamplingDefaults(temperature=1.0, top_p=0.9, top_k=None, **settings), **changes)


def slow_results(golden_model: GoldenModel, head: str, seed: int = 0) -> Iterator[dict[str, np.ndarray]]:
    """Yield plausible results of a slow AR: a few tokens are likely, so that they repeat; with odd seeds, logits are below 0."""
    rng = np.random.default_rng(seed)
    logits, hidden = golden_model.engine("slow_ar", head).spec.results
    width = (1, int(logits.shape[1]))
    likely = 6 * (rng.random(width) < 4 / width[1]) - 9 * (seed % 2)
    while True:
        draws = rng.standard_normal(width) + likely
        yield {
            "logits": draws.astype(np.float32),
            "hidden": rng.standard_normal((1, int(hidden.shape[1]))).astype(np.float32),
        }


def drawn_by_both(golden_model: GoldenModel, lm: LanguageModel) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield columns [COLUMNS, 1 + C] drawn by steps and by the frame graph from the same noise, for each of the settings."""
    engines = golden_model.engine("fast_ar"), golden_model.frame(lm.head, lm)
    for seed, sampling in enumerate(SETTINGS):
        both = []
        for kind, engine in zip((StepDrawer, FrameDrawer), engines, strict=True):
            drawer: Drawer = kind(engine, lm, 1)
            row, columns = draws_of(lm, sampling, seed), []
            for results in islice(slow_results(golden_model, lm.head, seed), COLUMNS):
                columns.append(drawer.draw(results, [row])[0].copy())
                row.add(columns[-1])
            both.append(np.stack(columns))
        yield both[0], both[1]


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize("head", ["audio", "full"])
def test_both_draw_the_same(s2_model: GoldenModel, rules: dict[str, Any], head: str) -> None:
    lm, repeated = model_of(s2_model.lm.describe(head), rules), 0
    for stepped, fused in drawn_by_both(s2_model, lm):
        assert np.array_equal(stepped, fused)
        repeated += COLUMNS - len(np.unique(stepped[:, 0]))
    assert repeated > 3  # so that penalty windows matter


@pytest.mark.parametrize("changes", [{"main_tokens": "any"}, {"code_zero": "fast"}, {"code_zero": "fast", "code_offset": 1}])
def test_families_that_draw_otherwise(s2_model: GoldenModel, changes: dict[str, Any]) -> None:
    candidates = s2_model.lm.config.codebook_width - 3
    lm = model_of(s2_model.lm.describe("full"), RULES["penalty by row"], fast_candidates=candidates, **changes)
    for stepped, fused in drawn_by_both(s2_model, lm):
        assert np.array_equal(stepped, fused)
        codes = stepped[:, 1 + (lm.code_zero == "main") :]
        assert codes.min() >= lm.code_offset
        assert codes.max() < candidates


def test_the_noise_of_codes_that_nobody_hears_is_drawn_all_the_same(s2_model: GoldenModel) -> None:
    lm = model_of(s2_model.lm.describe("audio"), {})
    likely = int(np.flatnonzero(main_ids(lm) == lm.end_id)[0])
    results = next(slow_results(s2_model, "audio"))
    results["logits"][0, likely] = 100
    left = []
    for kind, graph in ((StepDrawer, s2_model.engine("fast_ar")), (FrameDrawer, s2_model.frame("audio", lm))):
        noise = SeededNoise(5)
        drawer = kind(graph, lm, 1)  # type: ignore[operator]
        assert drawer.draw(results, [Draws(lm, SETTINGS[0], noise, USUAL)])[0, 0] == lm.end_id
        left.append(noise.fast(8))
    assert np.array_equal(*left)


@pytest.mark.parametrize("bad", [[np.nan], [np.inf], [np.nan, np.inf], None], ids=["nan", "inf", "both", "all minus inf"])
def test_logits_that_are_not_numbers_are_an_error(s2_model: GoldenModel, bad: list[float] | None) -> None:
    lm = model_of(s2_model.lm.describe("audio"), {"repetition_aware": AWARE})
    results = next(slow_results(s2_model, "audio"))
    if bad is None:
        results["logits"][:] = -np.inf
    else:
        results["logits"][0, 3 : 3 + len(bad)] = bad
    drawer = FrameDrawer(s2_model.frame("audio", lm), lm, 1)
    with pytest.raises(GraphError, match="not numbers"):
        drawer.draw(results, [draws_of(lm, SETTINGS[0], 0)])


def test_more_candidates_than_are_ranked_are_an_error(s2_model: GoldenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frame, "MOST_RANKED", 8)
    monkeypatch.setattr(drawing, "MOST_RANKED", 8)
    lm = model_of(s2_model.lm.describe("audio"), {})
    engine, results = s2_model.frame("audio", lm), next(slow_results(s2_model, "audio"))
    results["logits"][:] = 0

    def drawn(sampling: Sampling) -> np.ndarray:
        return FrameDrawer(engine, lm, 1).draw(results, [draws_of(lm, sampling, 0)])

    with pytest.raises(SamplingError, match="more than 8 tokens") as caught:
        drawn(Sampling(1.0, 0.99, None))
    assert "top_k of at most 8" in str(caught.value.hint)
    with pytest.raises(SamplingError):
        drawn(Sampling(1.0, 0.99, 9))
    assert drawn(Sampling(1.0, 0.99, 8)).min() >= 0
    # Few enough are within top_p: the result equals that of a full ranking.
    results["logits"][0, :5] = 50
    step = StepDrawer(s2_model.engine("fast_ar"), lm, 1)
    assert np.array_equal(step.draw(results, [draws_of(lm, Sampling(1.0, 0.9, 8), 0)]), drawn(Sampling(1.0, 0.9, 8)))


def test_rows_of_a_batch_are_drawn_alone(s2_model: GoldenModel) -> None:
    lm = model_of(s2_model.lm.describe("audio"), RULES["all at once"])
    engine, rng = s2_model.frame("audio", lm), np.random.default_rng(0)
    feeds: dict[str, np.ndarray] = {}
    for tensor in engine.spec.inputs:
        shape = tensor.resolve({"batch": 3})
        feeds[tensor.name] = rng.integers(0, 5, shape) if tensor.dtype == "int64" else rng.exponential(size=shape).astype("f4")
    feeds["top_k"] += 2
    feeds["top_p"] = np.array([[0.3], [0.8], [1.0]], np.float32)
    together = engine.run(feeds)["column"]
    alone = [engine.run({name: array[n : n + 1] for name, array in feeds.items()})["column"] for n in range(3)]
    assert np.array_equal(together, np.concatenate(alone))
