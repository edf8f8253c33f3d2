"""The loop over fake engines, which check position, write index and cache themselves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fakes import expected_codes, fake_dual_ar
from fishrt.bundle.features import RepetitionAware, RepetitionPenalty
from fishrt.errors import FishrtError, PromptError, SamplingError
from fishrt.kinds.columns import spoken_codes
from fishrt.language_model import context
from fishrt.language_model.batch import DualAR
from fishrt.language_model.sampling import Sampling, SeededNoise
from helpers_lm import columns_of, frames_of, row_of, spoken
from helpers_text import language_model, manifest

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
    row = row_of(model, prompt(lm=lm), SAMPLING, SeededNoise(1), **options)
    return [frame.tolist() for frame in spoken(model, row)], row.stop_reason


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
    columns_of(model, prompt(lm=model.language_model), SAMPLING, SeededNoise(1), 1)
    lengths = [call["codes"].shape[1] for call in model.fast.calls]  # type: ignore[attr-defined]
    assert lengths == [2, *[1] * (codebooks - 2)][: codebooks - 1]


def test_code_0_stays_within_the_table() -> None:
    lm = language_model(codebook_width=100)
    drawn, _ = frames(fake_dual_ar(lm, [BEGIN + 159]))
    assert drawn[0][0] == 99


@pytest.mark.parametrize("lm", [LM, language_model(code_zero="fast", code_offset=1)], ids=["codes", "codes + 1"])
def test_columns_are_fed_back_as_drawn(lm: Any) -> None:
    model = fake_dual_ar(lm, SPOKEN)
    columns = columns_of(model, prompt(), SAMPLING, SeededNoise(1))
    assert [(column[1:] - lm.code_offset).tolist() for column in columns[:-1]] == [expected_codes(lm, main) for main in SPOKEN]
    fed = [call["prompt"][0] for call in model.slow.calls]  # type: ignore[attr-defined]
    np.testing.assert_array_equal(fed[0], prompt())
    assert len(fed) == len(columns) == 1 + len(SPOKEN)
    for column, call in zip(columns, fed[1:], strict=False):
        np.testing.assert_array_equal(call[:, 0], column)
    assert [column[0] for column in columns] == [*SPOKEN, END]
    assert columns[-1].shape == (1 + LM.num_codebooks,)


def test_the_cache_grows_with_what_is_said_up_to_prompt_and_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context, "FIRST_FRAMES", 2)
    model = fake_dual_ar(LM, SPOKEN)
    sizes = []
    for limit in (1, len(SPOKEN), 100_000):
        frames(model, limit=limit)
        state = model.slow.states[-1]  # type: ignore[attr-defined]
        sizes.append(state.dims["cache"])
        assert state.read("key_cache.0").shape[2] == sizes[-1]
    # The prompt has 6 columns; the fake refuses a call that goes past its cache.
    assert sizes == [6 + 1, min(16, 6 + len(SPOKEN)), 16]


def test_an_end_in_the_first_column_says_nothing() -> None:
    assert frames(fake_dual_ar(LM, [])) == ([], "end")


def test_the_limit_counts_frames() -> None:
    drawn, reason = frames(fake_dual_ar(LM, SPOKEN), limit=3)
    assert (len(drawn), reason) == (3, "max_frames")
    drawn, reason = frames(fake_dual_ar(LM, SPOKEN), limit=len(SPOKEN))
    assert (len(drawn), reason) == (5, "max_frames")
    drawn, reason = frames(fake_dual_ar(LM, SPOKEN), limit=1 + len(SPOKEN))
    assert (len(drawn), reason) == (5, "end")


@pytest.mark.parametrize("limit", [None, 5])
def test_the_end_of_the_context_is_told_from_the_limit(limit: int | None) -> None:
    drawn, reason = frames(fake_dual_ar(language_model(max_seq_len=10), SPOKEN), limit=limit)
    assert (len(drawn), reason) == (4, "max_seq_len")


def test_a_limit_that_fills_the_context_is_a_limit() -> None:
    assert frames(fake_dual_ar(language_model(max_seq_len=10), SPOKEN), limit=4)[1] == "max_frames"


def test_upstream_drops_the_last_column_whatever_it_is() -> None:
    ended, reason = frames(fake_dual_ar(LM, SPOKEN), upstream=True)
    assert (len(ended), reason) == (len(SPOKEN), "end")
    cut, reason = frames(fake_dual_ar(LM, SPOKEN), upstream=True, limit=3)
    assert (len(cut), reason) == (2, "max_frames")


def test_upstream_does_not_test_the_first_column_for_the_end() -> None:
    drawn, reason = frames(fake_dual_ar(LM, [END, *SPOKEN]), upstream=True)
    assert drawn == [expected_codes(LM, main) for main in [END, *SPOKEN]]
    assert reason == "end"
    assert frames(fake_dual_ar(LM, [END, *SPOKEN])) == ([], "end")


def test_the_same_seed_gives_the_same_frames() -> None:
    def run(seed: int) -> list[list[int]]:
        model = fake_dual_ar(with_rules())
        return [f.tolist() for f in frames_of(model, prompt(), Sampling(1, 1, None), SeededNoise(seed), limit=8)]

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_both_heads_give_the_same_frames_from_a_seed() -> None:
    def run(head: str) -> list[list[int]]:
        model = fake_dual_ar(with_rules(head=head))
        return [f.tolist() for f in frames_of(model, prompt(), Sampling(1, 1, None), SeededNoise(3), limit=8)]

    assert run("audio") == run("full")


def test_more_frames_leave_earlier_ones_alone() -> None:
    def run(n: int) -> list[list[int]]:
        model = fake_dual_ar(with_rules())
        return [f.tolist() for f in frames_of(model, prompt(), Sampling(1, 1, None), SeededNoise(3), limit=n)]

    assert run(9)[:4] == run(4)


class RecordedNoise:
    """Noise that favours one entry in each slow draw and the first in each fast one, and records order and width of draws."""

    def __init__(self, favoured: list[int]) -> None:
        self.favoured = favoured
        self.asked: list[str] = []
        self.widths: set[tuple[str, int]] = set()

    def slow(self, width: int) -> np.ndarray:
        noise = np.ones(width, np.float32)
        noise[self.favoured[sum(a == "slow" for a in self.asked)]] = 1e-3
        self.asked.append("slow")
        self.widths.add(("slow", width))
        return noise

    def fast(self, width: int) -> np.ndarray:
        self.asked.append("fast")
        self.widths.add(("fast", width))
        return np.ones(width, np.float32)


def main_tokens(lm: Any, favoured: list[int]) -> tuple[list[int], RecordedNoise]:
    """Semantic codes drawn from equally likely ones. In the head the end token comes first, so code n is entry n + 1."""
    assert lm.end_id < lm.semantic_begin_id
    noise = RecordedNoise([n + 1 for n in favoured])
    columns = columns_of(fake_dual_ar(lm), prompt(lm=lm), Sampling(1, 1, None), noise, limit=len(favoured) // 2)
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
    columns_of(fake_dual_ar(LM), prompt(), Sampling(1, 1, None), noise, limit=2)
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
        frames_of(model, bad, SAMPLING, SeededNoise(1))
    assert not model.slow.calls  # type: ignore[attr-defined]


def test_a_limit_below_one_is_refused() -> None:
    with pytest.raises(SamplingError, match="0"):
        frames(fake_dual_ar(LM, SPOKEN), limit=0)


OWN_CODES = language_model(code_zero="fast", code_offset=1, semantic_end_id=BEGIN)
"""One token for every frame; all codes are the fast AR's, and 0 is padding."""


@pytest.mark.parametrize("codebooks", [1, 2, 10])
@pytest.mark.parametrize("offset", [0, 1])
def test_all_codes_may_be_the_fast_graphs(codebooks: int, offset: int) -> None:
    lm = replace(OWN_CODES, num_codebooks=codebooks, code_offset=offset)
    model = fake_dual_ar(lm, [BEGIN] * 3)
    assert frames(model)[0] == [expected_codes(lm, BEGIN)] * 3
    # No codes are drawn for the end token's column.
    assert [call["codes"].shape[1] for call in model.fast.calls] == [1] * 3 * codebooks  # type: ignore[attr-defined]


def test_padding_is_drawn_in_upstream_only_and_is_an_error() -> None:
    """All codes are equally likely, and of those the first is drawn."""

    def run(compat: bool) -> list[list[int]]:
        noise = RecordedNoise([1, 1, 1])
        columns = columns_of(fake_dual_ar(OWN_CODES), prompt(), Sampling(1, 1, None), noise, limit=3, upstream=compat)
        return spoken_codes(columns, OWN_CODES, manifest().codec).T.tolist()

    assert run(False) == [[0, 0, 0, 0]] * 3
    with pytest.raises(FishrtError, match="padding"):
        run(True)


def test_only_fast_candidates_are_drawn() -> None:
    noise = RecordedNoise([1])
    model = fake_dual_ar(language_model(fast_candidates=100), [BEGIN])
    model.fast._function = lambda feeds, state: {"logits": np.eye(1, 160, 100, dtype=np.float32) * 50}  # type: ignore[attr-defined]
    (column,) = columns_of(model, prompt(), Sampling(1, 1, None), noise, limit=1)
    assert column[2:].tolist() == [0, 0, 0]
    assert noise.widths == {("slow", 161), ("fast", 100)}


@pytest.mark.parametrize("zeroed", [False, True])
def test_any_token_may_be_the_main_one(zeroed: bool) -> None:
    lm = replace(OWN_CODES, head="full", main_tokens="any", zero_codes_off_audio=zeroed)
    noise = RecordedNoise([7, BEGIN])
    model = fake_dual_ar(lm)
    off, on = columns_of(model, prompt(), Sampling(1, 1, None), noise, limit=2)
    assert off.tolist() == [7, 0, 0, 0, 0] if zeroed else [7, 1, 1, 1, 1]
    assert on.tolist() == [BEGIN, 1, 1, 1, 1]
    assert model.slow.calls[1]["prompt"][0, :, 0].tolist() == off.tolist()  # type: ignore[attr-defined]
    assert noise.widths == {("slow", lm.vocab_size), ("fast", 160)}
    assert noise.asked == ["slow", *["fast"] * 4] * 2
    if zeroed:  # a frame without codes must not reach the codec
        with pytest.raises(FishrtError, match="padding"):
            spoken_codes([off], lm, manifest().codec)


@pytest.mark.parametrize(("main", "code"), [(7, 0), (BEGIN - 1, 0), (BEGIN + 159, 159), (BEGIN + 160, 159)])
def test_code_0_of_a_token_without_one_is_the_nearest(main: int, code: int) -> None:
    lm = language_model(head="full", main_tokens="any")
    (column,) = columns_of(fake_dual_ar(lm, [main]), prompt(), SAMPLING, SeededNoise(1), limit=1)
    assert column[:2].tolist() == [main, code]


def test_upstream_may_drop_the_first_column_and_keep_the_last() -> None:
    lm = replace(LM, upstream_trim="first")
    drawn, reason = frames(fake_dual_ar(lm, SPOKEN), upstream=True)
    assert drawn == [expected_codes(lm, main) for main in [*SPOKEN[1:], END]]
    assert reason == "end"
    assert frames(fake_dual_ar(lm, SPOKEN))[0] == [expected_codes(lm, main) for main in SPOKEN]
    assert len(frames(fake_dual_ar(lm, SPOKEN), upstream=True, limit=3)[0]) == 2


@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize("trim", ["first", "last"])
def test_all_columns_can_be_had(trim: str, compat: bool) -> None:
    lm = replace(LM, upstream_trim=trim)
    model = fake_dual_ar(lm, SPOKEN)
    row = row_of(model, prompt(), SAMPLING, SeededNoise(1), upstream=compat)
    assert row.drawn.shape == (5, 0)
    spoken(model, row)
    assert row.drawn[0].tolist() == [*SPOKEN, END]


def penalised_run(main: str, penalty: float | None, head: str = "audio", **changes: Any) -> np.ndarray:
    """Greedy columns of a model that always prefers semantic token 2 to token 3 and code 12 to code 13, by as much."""
    rules = RepetitionPenalty(penalty=1.5, window=2, main=main)
    lm = language_model(num_codebooks=2, head=head, **changes)
    lm = replace(lm, sampling=replace(lm.sampling, repetition_penalty=rules, top_k=1))
    model = fake_dual_ar(lm)

    def preferring(first: int, width: int) -> dict[str, np.ndarray]:
        logits = np.full((1, width), -50, np.float32)
        logits[0, first : first + 2] = 10, 9
        return {"logits": logits, "hidden": np.zeros((1, 3), np.float32)}

    first = {"audio": 1 + 2, "full": BEGIN + 2}[head]  # in the audio head, the end token comes first
    width = lm.vocab_size if head == "full" else 161
    model.slow._function = lambda feeds, state: preferring(first, width)  # type: ignore[attr-defined]
    model.fast._function = lambda feeds, state: {"logits": preferring(12, 160)["logits"]}  # type: ignore[attr-defined]
    sampling = Sampling(repetition_penalty=penalty).resolve(lm.sampling)
    return np.stack(columns_of(model, prompt(lm=lm), sampling, SeededNoise(0), limit=8), axis=1)


@pytest.mark.parametrize(("head", "main_tokens"), [("audio", "audio"), ("full", "audio"), ("full", "any")])
def test_what_was_drawn_becomes_less_likely_except_in_the_prefill(head: str, main_tokens: str) -> None:
    columns = penalised_run("row", None, head, main_tokens=main_tokens)
    # Frame 0 is the prefill's and counts for nothing. Token 2 wins with 6.67 to 6 where both are in the window.
    assert (columns[0] - BEGIN).tolist() == [2, 2, 3, 2, 2, 3, 2, 2]
    assert columns[2].tolist() == [12, 12, 13, 12, 12, 13, 12, 12]


def test_main_tokens_may_go_without_penalty() -> None:
    columns = penalised_run("none", None)
    assert (columns[0] - BEGIN).tolist() == [2] * 8
    assert columns[2].tolist() == [12, 12, 13, 12, 12, 13, 12, 12]


def test_the_oldest_column_counts_alone() -> None:
    """The first of the window's columns until it is full, then the one drawn `window` frames before."""
    columns = penalised_run("oldest_column", None)
    assert (columns[0] - BEGIN).tolist() == [2, 2, 3, 3, 2, 2, 3, 3]


def test_a_penalty_of_one_changes_nothing() -> None:
    assert (penalised_run("row", 1.0)[0] - BEGIN).tolist() == [2] * 8
    assert (penalised_run("row", 1.05)[0] - BEGIN).tolist() == [2] * 8
