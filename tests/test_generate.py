"""The loop over fake engines, which check position, write index and cache themselves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fakes import expected_codes, fake_dual_ar
from fishrt import generate
from fishrt.bundle import RepetitionAware
from fishrt.errors import PromptError, SamplingError
from fishrt.generate import Columns, DualAR, generate_frames
from fishrt.sampling import Sampling, SeededNoise
from helpers_text import language_model

LM = language_model()
BEGIN, END = LM.semantic_begin_id, LM.end_id
SPOKEN = [BEGIN + 3, BEGIN + 159, BEGIN, BEGIN + 7, BEGIN + 42]
SAMPLING = Sampling(0.7, 0.9, 30)


def with_rules(**changes: Any) -> Any:
    return replace(LM, sampling=replace(LM.sampling, repetition_aware=RepetitionAware(3, 1.0, 0.9)), **changes)


def prompt(length: int = 6, lm: Any = LM) -> np.ndarray:
    columns = np.zeros((1 + lm.num_codebooks, length), np.int64)
    columns[0] = np.arange(length)
    return columns


def frames(model: DualAR, **options: Any) -> tuple[list[list[int]], str | None]:
    lm = model.language_model
    generation = generate_frames(model, prompt(lm=lm), SAMPLING, SeededNoise(1), **options)
    drawn = [frame.tolist() for frame in generation]
    return drawn, generation.stop_reason


@pytest.mark.parametrize("codebooks", [1, 2, 3, 10])
@pytest.mark.parametrize("head", ["audio", "full"])
def test_frames_are_those_the_model_gives(codebooks: int, head: str) -> None:
    lm = with_rules(num_codebooks=codebooks, head=head)
    drawn, reason = frames(fake_dual_ar(lm, SPOKEN))
    assert drawn == [expected_codes(lm, main) for main in SPOKEN]
    assert reason == "end"


@pytest.mark.parametrize("codebooks", [1, 2, 3, 10])
def test_the_fast_graph_runs_once_less_than_there_are_codebooks(codebooks: int) -> None:
    model = fake_dual_ar(language_model(num_codebooks=codebooks), SPOKEN[:1])
    columns = Columns(model, prompt(lm=model.language_model), SAMPLING, SeededNoise(1), max_columns=1)
    next(columns)
    lengths = [call["codes"].shape[1] for call in model.fast.calls]  # type: ignore[attr-defined]
    assert lengths == [2, *[1] * (codebooks - 2)][: codebooks - 1]


def test_code_0_stays_within_the_table() -> None:
    lm = language_model(codebook_width=100)
    drawn, _ = frames(fake_dual_ar(lm, [BEGIN + 159]))
    assert drawn[0][0] == 99


def test_columns_are_fed_back_as_drawn() -> None:
    model = fake_dual_ar(LM, SPOKEN)
    columns = list(Columns(model, prompt(), SAMPLING, SeededNoise(1)))
    fed = [call["prompt"][0] for call in model.slow.calls]  # type: ignore[attr-defined]
    np.testing.assert_array_equal(fed[0], prompt())
    assert len(fed) == len(columns) == 1 + len(SPOKEN)
    for column, call in zip(columns, fed[1:], strict=False):
        np.testing.assert_array_equal(call[:, 0], column)
    assert [column[0] for column in columns] == [*SPOKEN, END]
    assert columns[-1].shape == (1 + LM.num_codebooks,)


def test_the_cache_grows_with_what_is_said_up_to_prompt_and_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "FIRST_FRAMES", 2)
    model = fake_dual_ar(LM, SPOKEN)
    sizes = []
    for limit in (1, len(SPOKEN), 100_000):
        frames(model, max_frames=limit)
        state = model.slow.states[-1]  # type: ignore[attr-defined]
        sizes.append(state.dims["cache"])
        assert state.read("key_cache.0").shape[2] == sizes[-1]
    # The prompt has 6 columns; the fake refuses a call that goes past its cache.
    assert sizes == [6 + 1, min(16, 6 + len(SPOKEN)), 16]


def test_an_end_in_the_first_column_says_nothing() -> None:
    assert frames(fake_dual_ar(LM, [])) == ([], "end")


def test_the_limit_counts_frames() -> None:
    drawn, reason = frames(fake_dual_ar(LM, SPOKEN), max_frames=3)
    assert (len(drawn), reason) == (3, "max_frames")
    drawn, reason = frames(fake_dual_ar(LM, SPOKEN), max_frames=len(SPOKEN))
    assert (len(drawn), reason) == (5, "max_frames")
    drawn, reason = frames(fake_dual_ar(LM, SPOKEN), max_frames=1 + len(SPOKEN))
    assert (len(drawn), reason) == (5, "end")


@pytest.mark.parametrize("limit", [None, 5])
def test_the_end_of_the_context_is_told_from_the_limit(limit: int | None) -> None:
    drawn, reason = frames(fake_dual_ar(language_model(max_seq_len=10), SPOKEN), max_frames=limit)
    assert (len(drawn), reason) == (4, "max_seq_len")


def test_a_limit_that_fills_the_context_is_a_limit() -> None:
    assert frames(fake_dual_ar(language_model(max_seq_len=10), SPOKEN), max_frames=4)[1] == "max_frames"


def test_upstream_drops_the_last_column_whatever_it_is() -> None:
    ended, reason = frames(fake_dual_ar(LM, SPOKEN), upstream_compat=True)
    assert (len(ended), reason) == (len(SPOKEN), "end")
    cut, reason = frames(fake_dual_ar(LM, SPOKEN), upstream_compat=True, max_frames=3)
    assert (len(cut), reason) == (2, "max_frames")


def test_upstream_does_not_test_the_first_column_for_the_end() -> None:
    drawn, reason = frames(fake_dual_ar(LM, [END, *SPOKEN]), upstream_compat=True)
    assert drawn == [expected_codes(LM, main) for main in [END, *SPOKEN]]
    assert reason == "end"
    assert frames(fake_dual_ar(LM, [END, *SPOKEN])) == ([], "end")


def test_the_same_seed_gives_the_same_frames() -> None:
    def run(seed: int) -> list[list[int]]:
        model = fake_dual_ar(with_rules())
        return [f.tolist() for f in generate_frames(model, prompt(), Sampling(1, 1, None), SeededNoise(seed), max_frames=8)]

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_both_heads_give_the_same_frames_from_a_seed() -> None:
    def run(head: str) -> list[list[int]]:
        model = fake_dual_ar(with_rules(head=head))
        return [f.tolist() for f in generate_frames(model, prompt(), Sampling(1, 1, None), SeededNoise(3), max_frames=8)]

    assert run("audio") == run("full")


def test_more_frames_leave_earlier_ones_alone() -> None:
    def run(n: int) -> list[list[int]]:
        model = fake_dual_ar(with_rules())
        return [f.tolist() for f in generate_frames(model, prompt(), Sampling(1, 1, None), SeededNoise(3), max_frames=n)]

    assert run(9)[:4] == run(4)


class RecordedNoise:
    """Favours one entry in each slow draw, and remembers the order of all draws."""

    def __init__(self, favoured: list[int]) -> None:
        self.favoured = favoured
        self.asked: list[str] = []

    def slow(self, width: int) -> np.ndarray:
        noise = np.ones(width, np.float32)
        noise[self.favoured[sum(a == "slow" for a in self.asked)]] = 1e-3
        self.asked.append("slow")
        return noise

    def fast(self, width: int) -> np.ndarray:
        self.asked.append("fast")
        return np.ones(width, np.float32)


def main_tokens(lm: Any, favoured: list[int]) -> tuple[list[int], RecordedNoise]:
    """Semantic codes drawn from equally likely ones. In the head the end token comes first, so code n is entry n + 1."""
    assert lm.end_id < lm.semantic_begin_id
    noise = RecordedNoise([n + 1 for n in favoured])
    columns = Columns(fake_dual_ar(lm), prompt(lm=lm), Sampling(1, 1, None), noise, max_columns=len(favoured) // 2)
    return [int(column[0]) - lm.semantic_begin_id for column in columns], noise


def test_the_window_holds_the_last_tokens_but_not_the_prefills() -> None:
    # The normal and the second draw of each frame. Frame 0 is the prefill's, so frame 1 may repeat it; frame 2 repeats frame 1;
    # for frame 5 that one has left the window of three; frame 7 repeats frame 5.
    draws = [5, 50, 5, 51, 5, 52, 6, 53, 7, 54, 5, 55, 8, 56, 5, 57]
    drawn, _ = main_tokens(with_rules(), draws)
    assert drawn == [5, 5, 52, 6, 7, 5, 8, 57]


def test_draws_are_asked_for_in_order_whether_they_are_needed_or_not() -> None:
    _, noise = main_tokens(with_rules(num_codebooks=3), [1, 2, 3, 4])
    assert noise.asked == ["slow", "slow", "fast", "fast"] * 2


def test_a_model_without_the_rule_draws_once() -> None:
    noise = RecordedNoise([1, 2])
    list(Columns(fake_dual_ar(LM), prompt(), Sampling(1, 1, None), noise, max_columns=2))
    assert noise.asked.count("slow") == 2


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (prompt().astype(np.int32), "int32"),
        (prompt()[1:], r"\[4, 6\]"),
        (prompt()[0], r"\[6\]"),
        (prompt(0), r"\[5, 0\]"),
        (prompt(LM.max_seq_len), "positions"),
        (prompt() - 1, "token -1"),
        (prompt() + np.array([[LM.vocab_size]] + [[0]] * 4), f"token {LM.vocab_size + 5}"),
        (prompt() - np.array([[0], [0], [1], [0], [0]]), "code -1"),
        (prompt() + np.array([[0], [0], [0], [0], [LM.codebook_width]]), f"code {LM.codebook_width}"),
    ],
)
def test_a_prompt_that_is_not_the_models_is_refused(bad: np.ndarray, says: str) -> None:
    model = fake_dual_ar(LM, SPOKEN)
    with pytest.raises(PromptError, match=says):
        generate_frames(model, bad, SAMPLING, SeededNoise(1))
    assert not model.slow.calls  # type: ignore[attr-defined]


def test_a_limit_below_one_is_refused() -> None:
    with pytest.raises(SamplingError, match="0"):
        frames(fake_dual_ar(LM, SPOKEN), max_frames=0)
