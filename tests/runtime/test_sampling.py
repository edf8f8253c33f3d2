"""Filters, draws and the second draw, on small cases with calculated results."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fishrt.bundle.features import LanguageModel, RepetitionAware, RepetitionPenalty, SamplingDefaults
from fishrt.errors import GraphError, SamplingError
from fishrt.language_model.sampling import (
    PenaltyWindow,
    Sampling,
    SeededNoise,
    audio_ids,
    main_ids,
    penalised,
    sample,
    sample_main,
)
from helpers_text import filtered, language_model

P = np.array([0.1, 0.5, 0.15, 0.25], np.float32)
LOGITS = np.log(P)
PLAIN = Sampling(1.0, 1.0)


def kept(*arguments: Any) -> list[int]:
    return np.flatnonzero(filtered(LOGITS, *arguments)).tolist()


def test_without_filters_it_is_softmax() -> None:
    np.testing.assert_allclose(filtered(LOGITS, 1.0, 1.0, None), P, atol=1e-7)


def test_temperature_divides_the_logits() -> None:
    np.testing.assert_allclose(filtered(LOGITS, 0.5, 1.0, None), P**2 / (P**2).sum(), atol=1e-7)


def test_top_p_removes_the_entry_that_crosses_it() -> None:
    assert kept(1.0, 0.74, None) == [1]
    assert kept(1.0, 0.76, None) == [1, 3]


def test_top_p_looks_at_logits_before_the_temperature() -> None:
    """At temperature 0.5 the likeliest entry alone has 0.72 and the first two 0.91, which top_p = 0.8 would separate."""
    assert kept(0.5, 0.8, None) == [1, 3]


def test_what_top_k_removes_still_counts_for_top_p() -> None:
    """Of the two that top-k leaves the first has 0.67; if top-p saw only those, top_p = 0.6 would remove nothing more."""
    assert kept(1.0, 0.6, 2) == [1]
    assert kept(1.0, 1.0, 2) == [1, 3]


def test_the_likeliest_always_stays() -> None:
    assert kept(1.0, 1e-6, None) == [1]
    assert kept(1.0, 0.9, 1) == [1]


def test_of_equal_logits_the_first_rank_first() -> None:
    assert np.flatnonzero(filtered(np.zeros(100, np.float32), 1.0, 1.0, 7)).tolist() == list(range(7))


@pytest.mark.parametrize("width", [1, 2, 3, 7, 49, 1000])
def test_top_p_of_one_keeps_everything(width: int) -> None:
    assert np.all(filtered(np.zeros(width, np.float32), 1.0, 1.0, None) > 0)
    for seed in range(20):  # sums of so many are rounded now up, now down
        logits = np.random.default_rng(seed).normal(size=width).astype(np.float32)
        assert np.all(filtered(logits, 1.0, 1.0, None) > 0)


@given(st.lists(st.floats(-25, 25, width=32), min_size=1, max_size=60), st.floats(0.01, 1), st.integers(1, 70))
def test_filters_agree_with_their_definition(values: list[float], top_p: float, top_k: int) -> None:
    logits = np.array(values, np.float32)
    order = np.argsort(-logits, kind="stable")
    exact = np.exp(logits.astype(np.float64) - logits.max())
    cumulative = np.cumsum(exact[order]) / exact.sum()
    probs = filtered(logits, 0.7, top_p, top_k)
    assert probs.sum() == pytest.approx(1, abs=1e-6)
    for rank, index in enumerate(order):
        if rank and abs(cumulative[rank] - top_p) < 1e-6:
            continue  # rounding decides
        assert (probs[index] > 0) == (rank == 0 or (rank < top_k and cumulative[rank] <= top_p))


def test_forbidden_entries_are_never_drawn() -> None:
    probs = filtered(np.array([-np.inf, 1, -np.inf], np.float32), 1.0, 1.0, None)
    assert probs.tolist() == [0, 1, 0]


@pytest.mark.parametrize("bad", [[np.nan, 1], [np.inf, 1], [-np.inf, -np.inf]])
def test_logits_that_are_not_numbers_are_an_error(bad: list[float]) -> None:
    with pytest.raises(GraphError, match="not numbers"):
        filtered(np.array(bad, np.float32), 1.0, 0.9, 30)


@pytest.mark.parametrize("top_k", [1, 30, None])
@pytest.mark.parametrize("count", [1, 50])
def test_one_that_is_not_a_number_among_many_is_an_error(count: int, top_k: int | None) -> None:
    logits = np.zeros(50, np.float32)
    logits[:count] = np.nan
    with pytest.raises(GraphError, match="not numbers"):
        filtered(logits, 1.0, 0.9, top_k)


@pytest.mark.parametrize("top_k", [None, 1, 40])
@pytest.mark.parametrize("top_p", [0.3, 0.9, 1.0])
@pytest.mark.parametrize("scale", [0.01, 1, 5])
def test_what_is_kept_is_what_a_stable_ranking_keeps(scale: float, top_p: float, top_k: int | None) -> None:
    """With many equal logits, of which those of lower index rank first."""
    logits = (np.random.default_rng(7).standard_normal(1000) * scale).round(1).astype(np.float32)
    order = np.argsort(-logits, kind="stable")
    mass = np.exp((logits[order] - logits.max()).astype(np.float64))
    count = max(1, int((np.cumsum(mass) <= top_p * mass.sum()).sum()))
    kept = np.sort(order[: count if top_k is None else min(count, top_k)])
    found = np.flatnonzero(filtered(logits, 0.7, top_p, top_k))
    assert abs(len(found) - len(kept)) <= (1 if top_k is None else 0)  # float32 may decide otherwise about the last
    np.testing.assert_array_equal(found[np.isin(found, kept)], kept[np.isin(kept, found)])


def test_a_draw_divides_by_the_noise() -> None:
    assert sample(np.log([0.5, 0.3, 0.2]).astype(np.float32), PLAIN, np.array([1.0, 0.2, 1.0], np.float32)) == 1


def test_draws_follow_the_probabilities() -> None:
    """20,000 draws: a count is more than five standard deviations off with a probability of 1e-6."""
    noise, n = SeededNoise(1), 20_000
    for sampling, expected in ((PLAIN, P), (Sampling(0.5, 0.8), np.array([0, 0.8, 0, 0.2]))):
        counts = np.bincount([sample(LOGITS, sampling, noise.fast(4)) for _ in range(n)], minlength=4)
        assert np.all(np.abs(counts - n * expected) <= 5 * np.sqrt(n * expected * (1 - expected)))


@given(st.integers(0, 2**32), st.floats(0.05, 1.9), st.floats(0.01, 1), st.integers(1, 70), st.sampled_from([0.1, 1, 4]))
def test_the_winner_is_that_among_what_the_filters_leave(
    seed: int, temperature: float, top_p: float, top_k: int, scale: float
) -> None:
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal(60) * scale).round(1).astype(np.float32)
    noise = rng.standard_exponential(60).astype(np.float32)
    left = filtered(logits, temperature, top_p, top_k) > 0
    divisor = np.float32(temperature)
    race = np.where(left, np.exp(logits / divisor - logits.max() / divisor) / noise, -1)
    assert sample(logits, Sampling(temperature, top_p, top_k), noise) == race.argmax()


def test_noise_is_the_seeds() -> None:
    first, again, other = SeededNoise(7), SeededNoise(7), SeededNoise(8)
    a = [first.slow(5), first.fast(3)]
    np.testing.assert_array_equal(np.concatenate(a), np.concatenate([again.slow(5), again.fast(3)]))
    assert not np.array_equal(a[0], other.slow(5))
    assert a[0].dtype == np.float32
    assert np.all(a[0] > 0)


def test_a_uniform_zero_forbids_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = SeededNoise(0)
    monkeypatch.setattr(noise, "_generator", type("Zeros", (), {"random": lambda self, n: np.zeros(n)})())
    assert sample(np.array([-np.inf, -np.inf, 0], np.float32), PLAIN, noise.slow(3)) == 2


LM = replace(
    language_model(semantic_begin_id=10, semantic_end_id=13, end_id=5), sampling=SamplingDefaults(1, 1, None, None, None)
)
RAS = replace(LM, sampling=replace(LM.sampling, repetition_aware=RepetitionAware(3, 1.0, 1.0)))
IDS = audio_ids(LM)
ONE = np.ones(5, np.float32)


def favour(index: int) -> np.ndarray:
    """Return noise with which the entry is drawn from equal probabilities."""
    noise = ONE.copy()
    noise[index] = 0.01
    return noise


def main_token(lm: Any, recent: Any, first: int, second: int, logits: Any = None, **sampling: Any) -> int:
    options = {"temperature": 1.0, "top_p": 1.0, "top_k": None, **sampling}
    logits = np.zeros(5, np.float32) if logits is None else np.array(logits, np.float32)
    return sample_main(logits, IDS, Sampling(**options), lm, recent, [favour(first), favour(second)])


def test_audio_ids_are_ascending_wherever_the_end_token_is() -> None:
    assert IDS.tolist() == [5, 10, 11, 12, 13]
    assert audio_ids(replace(LM, end_id=20)).tolist() == [10, 11, 12, 13, 20]


def test_main_ids_are_what_may_be_drawn() -> None:
    assert main_ids(LM).tolist() == IDS.tolist()
    assert main_ids(replace(LM, main_tokens="any")).tolist() == list(range(LM.vocab_size))


def test_a_penalty_makes_less_likely_and_counts_once() -> None:
    logits = np.array([3, -3, 3, 0], np.float32)
    np.testing.assert_array_equal(penalised(logits, np.array([0, 1, 1, 3]), 1.5), [2, -4.5, 3, 0])
    assert logits.tolist() == [3, -3, 3, 0]


def window(main: str, *columns: list[int]) -> PenaltyWindow:
    """Return a penalty window of three columns, each a main token and two codes, with a penalty of 2."""
    result = PenaltyWindow(RepetitionPenalty(penalty=1.1, window=3, main=main), 2.0, 2)
    for column in columns:
        result.add(np.array(column))
    return result


def halved(logits: np.ndarray) -> list[int]:
    """Return the indices of logits that were halved from 8 to 4."""
    assert set(logits.tolist()) <= {8, 4}
    return np.flatnonzero(logits == 4).tolist()


EIGHTS = np.full(20, 8, np.float32)
COLUMNS = ([11, 1, 2], [12, 3, 4], [10, 5, 6], [13, 7, 8])
ALL = np.arange(20)


def test_the_window_holds_rows_and_zeros_for_what_is_not_there_yet() -> None:
    assert halved(window("row").main(EIGHTS, ALL)) == [0]
    assert halved(window("row", *COLUMNS[:2]).main(EIGHTS, ALL)) == [0, 11, 12]
    assert halved(window("row", *COLUMNS).main(EIGHTS, ALL)) == [10, 12, 13]
    assert halved(window("row", *COLUMNS[:2]).code(EIGHTS, 1)) == [0, 2, 4]
    assert halved(window("row", *COLUMNS).code(EIGHTS, 0)) == [3, 5, 7]


def test_the_oldest_column_is_the_first_until_the_window_has_passed_it() -> None:
    expected = [[0], [1, 2, 11], [1, 2, 11], [1, 2, 11], [3, 4, 12]]
    assert [halved(window("oldest_column", *COLUMNS[:n]).main(EIGHTS, ALL)) for n in range(5)] == expected


def test_no_penalty_on_main_tokens_leaves_that_on_codes() -> None:
    quiet = window("none", *COLUMNS)
    assert halved(quiet.main(EIGHTS, ALL)) == []
    assert halved(quiet.code(EIGHTS, 0)) == [3, 5, 7]


def test_tokens_of_the_window_that_the_head_lacks_do_nothing() -> None:
    """Codes and zeros count as token ids here, below and between the five of the head; 19 is above them."""
    assert halved(window("row", *COLUMNS[:2]).main(EIGHTS[:5], IDS)) == [2, 3]
    assert halved(window("oldest_column", [19, 5, 6]).main(EIGHTS[:5], IDS)) == [0]
    assert halved(window("oldest_column", [9, 0, 7]).main(EIGHTS[:5], IDS)) == []


def test_a_repeated_token_is_drawn_again() -> None:
    assert main_token(RAS, [11], 2, 4) == 13
    assert main_token(RAS, [12], 2, 4) == 11


def test_the_second_draw_may_repeat_the_token() -> None:
    assert main_token(RAS, [11], 2, 2) == 11


def test_the_end_token_is_never_drawn_again() -> None:
    assert main_token(RAS, [5], 0, 4) == 5


def test_no_second_draw_without_a_window_or_a_rule() -> None:
    assert main_token(RAS, [], 2, 4) == 11
    assert main_token(LM, [11], 2, 4) == 11


def test_the_second_draw_has_the_rules_temperature_and_top_p_but_the_requests_top_k() -> None:
    logits = [0, 3, 2, 1, 0]
    assert main_token(RAS, [10], 1, 3, logits, top_p=0.1) == 12  # 12 is open to the rule's top_p = 1 only
    assert main_token(RAS, [10], 1, 4, logits, top_k=3) != 13
    cold = replace(RAS, sampling=replace(RAS.sampling, repetition_aware=RepetitionAware(3, 0.01, 1.0)))
    assert main_token(cold, [10], 1, 3, logits) == 10


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1e-9},
        {"temperature": 2},
        {"temperature": float("nan")},
        {"temperature": -1},
        {"top_p": 0},
        {"top_p": 1.01},
        {"top_p": float("nan")},
        {"top_k": 0},
        {"top_k": -3},
        {"top_k": 1.5},
        {"repetition_penalty": 0},
        {"repetition_penalty": 2.1},
        {"repetition_penalty": "some"},
        {"temperature": "warm"},
        {"top_p": "all"},
    ],
)
def test_values_outside_their_range_are_named(bad: dict[str, Any]) -> None:
    with pytest.raises(SamplingError, match=next(iter(bad))) as caught:
        Sampling(**{"temperature": 1.0, "top_p": 0.9, "top_k": 30, **bad})
    assert caught.value.hint


def test_defaults_are_the_bundles_where_nothing_is_given() -> None:
    defaults = SamplingDefaults(0.8, 0.7, 30, None, None)
    assert Sampling().resolve(defaults) == Sampling(0.8, 0.7, 30)
    assert Sampling(top_p=0.5, top_k=None).resolve(defaults) == Sampling(0.8, 0.5, 30)
    assert Sampling(0.6, 0.5, 10**9).resolve(defaults) == Sampling(0.6, 0.5, 10**9)


@pytest.mark.parametrize("lm", [LM, RAS], ids=["plain", "repetition-aware"])
def test_temperature_0_draws_the_likeliest_and_of_equals_the_first(lm: LanguageModel) -> None:
    greedy = Sampling(temperature=0, top_p=1.0).resolve(lm.sampling)
    assert (greedy.temperature, greedy.top_k) == (0, 1)
    rng, ids = np.random.default_rng(0), main_ids(lm)
    for n in range(200):
        logits = rng.integers(-3, 4, len(ids)).astype(np.float32) * (1e-6 if n % 2 else 30)
        noise = [rng.exponential(size=len(ids)).astype(np.float32) for _ in range(2)]
        likeliest = int(logits.argmax())
        assert sample(logits, greedy, noise[0]) == likeliest
        assert sample_main(logits, ids, greedy, lm, [int(ids[likeliest])], noise) == ids[likeliest]


def test_a_repetition_penalty_is_for_models_that_have_one() -> None:
    rules = RepetitionPenalty(penalty=1.2, window=16, main="row")
    defaults = SamplingDefaults(0.8, 0.7, None, None, rules)
    assert Sampling().resolve(defaults) == Sampling(0.8, 0.7, None, 1.2)
    assert Sampling(repetition_penalty=1.0).resolve(defaults) == Sampling(0.8, 0.7, None, 1.0)
    with pytest.raises(SamplingError, match="no repetition penalty"):
        Sampling(repetition_penalty=1.2).resolve(replace(defaults, repetition_penalty=None))
