"""Rows that share a batch: each gives what it gives alone, whenever the others come and go, and idle slots keep their voices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes import FakeEngine, FakeState, specs
from fishrt import TTS
from fishrt.bench.setup import bench_prompt
from fishrt.bundle.features import LanguageModel, RepetitionAware, RepetitionPenalty, SamplingDefaults
from fishrt.errors import GraphError
from fishrt.language_model.batch import Batch, DualAR, Row
from fishrt.language_model.context import ContextStore, SlowContext
from fishrt.language_model.sampling import Sampling, SeededNoise
from fishrt_engines import Array
from helpers_lm import spoken
from helpers_text import language_model, manifest
from tolerances import TOLERANCES

LM = language_model(
    num_codebooks=3,
    max_seq_len=40,
    sampling=SamplingDefaults(1.0, 0.95, None, RepetitionAware(3, 1.0, 0.9), RepetitionPenalty(1.2, 4, "row")),
)
SAMPLING = Sampling().resolve(LM.sampling)
HEADS = [np.zeros((4, 0), np.int64), np.array([[7, 8, 9], [1, 0, 2], [0, 0, 3], [4, 5, 6]]), np.full((4, 5), 3)]


def logits(*seen: float, width: int, end: int | None = None) -> Array:
    """Return logits that depend on all that was seen. The end token is likely enough that rows end at different times."""
    key = np.frombuffer(np.array(seen, np.float64).tobytes(), np.uint32)
    drawn = np.random.default_rng(key).standard_normal(width).astype(np.float32)
    if end is not None:
        drawn[end] += 4
    return drawn


def remembering_model(lm: LanguageModel = LM) -> DualAR:
    """Return a model whose logits depend on every column in the cache and every code of the frame, and on nothing else.

    A column that another row, or an idle slot, writes to the wrong place therefore changes all that follows.
    """
    graphs = specs(lm, manifest().codec)
    weights = np.array([1, 3, 7, 11][: 1 + lm.num_codebooks])

    def slow(feeds: Mapping[str, Array], state: FakeState) -> dict[str, Array]:
        found = []
        for n, (start, prompt) in enumerate(zip(feeds["write_index"], feeds["prompt"], strict=True)):
            cache: Any = state.arrays["key_cache.0"][n, 0, :, 0]
            end = int(start) + prompt.shape[1]
            assert end <= len(cache)
            assert feeds["position_ids"][n].tolist() == list(range(int(start), end))
            cache[start:end] = weights @ prompt
            found.append(logits(*cache[:end], width=161, end=0))
        made = np.stack(found)
        return {"logits": made, "hidden": made[:, -3:].copy()}

    def fast(feeds: Mapping[str, Array], state: FakeState) -> dict[str, Array]:
        found = []
        for n, (start, codes) in enumerate(zip(feeds["write_index"], feeds["codes"], strict=True)):
            cache: Any = state.arrays["key_cache.0"][n, 0, :, 0]
            cache[start : int(start) + len(codes)] = codes
            found.append(logits(*feeds["hidden"][n], *cache[: int(start) + len(codes)], width=lm.codebook_width))
        return {"logits": np.stack(found)}

    return DualAR(FakeEngine(graphs["slow_ar"], slow), FakeEngine(graphs["fast_ar"], fast), lm)


MODEL = remembering_model()


def row(seed: int, head: int = 0, text: int = 4, limit: int | None = None, before: Array | None = None) -> Row:
    """Return a row whose prompt has a head, what came `before`, and `text` columns of its own."""
    rng = np.random.default_rng(seed)
    own = np.concatenate([rng.integers(0, 200, (1, text)), rng.integers(0, 160, (3, text))])
    parts = [HEADS[head], *([] if before is None else [before]), own]
    prompt = np.concatenate(parts, axis=1).astype(np.int64)
    return Row(LM, prompt, SAMPLING, SeededNoise(seed), head=HEADS[head].shape[1], max_columns=limit)


def alone(made: Row) -> Array:
    """Return the columns that a row like this draws in a batch of one."""
    spoken(MODEL, made)
    return made.drawn


def finish(batch: Batch, rows: Sequence[Row]) -> None:
    while any(r.stop_reason is None for r in rows):
        batch.step()


def test_rows_that_join_and_leave_at_every_step() -> None:
    batch, rows = Batch(MODEL, 3), []
    for seed in range(20):
        rows.append(row(seed, seed % 3, 1 + seed % 5, limit=3))  # the first of a batch leaves when the fourth joins
        batch.admit(rows[-1])
        going = {r for r in rows if r.stop_reason is None}
        assert {r for r, _ in batch.step()} == going
    finish(batch, rows)
    for seed, made in enumerate(rows):
        np.testing.assert_array_equal(made.drawn, alone(row(seed, seed % 3, 1 + seed % 5, limit=3)))
    assert len({made.drawn.shape[1] for made in rows}) > 1


ACTIONS = st.one_of(
    st.tuples(st.just("step"), st.integers(1, 4)),
    st.tuples(st.just("admit"), st.tuples(st.integers(0, 99), st.integers(0, 2), st.integers(1, 6), st.integers(1, 12))),
    st.tuples(st.just("leave"), st.integers(0, 5)),
)


@given(st.integers(1, 5), st.lists(ACTIONS, max_size=25))
def test_any_schedule_gives_what_single_rows_give(slots: int, actions: list[tuple[str, Any]]) -> None:
    batch, running, admitted = Batch(MODEL, slots), list[Row](), list[tuple[Row, tuple[int, int, int, int]]]()
    for verb, what in actions:
        if verb == "step":
            for _ in range(what):
                drawn = batch.step()
                assert {id(r) for r, _ in drawn} == {id(r) for r in running}
                running = [r for r in running if r.stop_reason is None]
        elif verb == "admit" and len(running) < slots:
            running.append(row(*what))
            admitted.append((running[-1], what))
            batch.admit(running[-1])
        elif verb == "leave" and what < len(running):
            batch.leave(running.pop(what))
    finish(batch, running)
    for made, what in admitted:
        whole = alone(row(*what))
        np.testing.assert_array_equal(made.drawn, whole[:, : made.drawn.shape[1]])
        assert made.stop_reason is None or made.drawn.shape == whole.shape


def test_what_is_heard_is_told_with_its_row() -> None:
    batch, rows = Batch(MODEL, 2), [row(1), row(2)]
    heard: dict[int, list[Array]] = {id(r): [] for r in rows}
    for made in rows:
        batch.admit(made)
    while any(r.stop_reason is None for r in rows):
        for made, column in batch.step():
            if column is not None:
                heard[id(made)].append(column)
    for made in rows:
        assert made.stop_reason in ("end", "max_seq_len")
        np.testing.assert_array_equal(np.reshape(heard[id(made)], (-1, 4)).T, made.drawn[:, made.drawn[0] != LM.end_id])


def read_by(model: DualAR) -> list[list[int]]:
    """Return the number of columns that each call of the slow AR read, for each row of the call."""
    return [[call["prompt"].shape[2]] * len(call["prompt"]) for call in model.slow.calls]  # type: ignore[attr-defined]


def test_an_idle_slot_keeps_its_voice() -> None:
    """While others speak, and while the cache grows; the next row with this voice reads its text only."""
    model = remembering_model()
    batch, first = Batch(model, 3), row(1, head=1, limit=1)
    other = row(3, limit=30)
    assert [batch.admit(made) for made in (first, row(2, head=2, limit=1), other)] == [0, 1, 2]
    finish(batch, [other])
    model.slow.calls.clear()  # type: ignore[attr-defined]
    again = [row(4, head=2, text=6, limit=5), row(5, head=1, text=6, limit=5)]
    assert [batch.admit(made) for made in again] == [1, 0]
    batch.step()
    assert read_by(model) == [[6], [6]]
    finish(batch, again)
    for made, seed, head in zip(again, (4, 5), (2, 1), strict=True):
        np.testing.assert_array_equal(made.drawn, alone(row(seed, head, 6, 5)))


def test_a_voice_read_together_with_others_is_not_one_read_alone() -> None:
    """Keys and values depend by rounding on how many columns are read at once, so that the head is read again."""
    model = remembering_model()
    store, context = ContextStore(), SlowContext(model.slow, 3)
    both = np.concatenate([HEADS[1], HEADS[2]], axis=1)
    store.load(context, both)
    assert context.holds(both)
    assert not context.holds(HEADS[1])
    store.load(context, HEADS[1])
    assert read_by(model) == [[8], [3]]


def test_a_full_idle_slot_gives_up_one_column() -> None:
    context = SlowContext(MODEL.slow, 3, 2)
    context.reserve(4, 4)
    context.read(row(1).prompt)
    context.step({1: row(2).prompt[:, :1]})
    assert [context.columns(slot).shape[1] for slot in range(2)] == [3, 1]
    np.testing.assert_array_equal(context.columns(), row(1).prompt[:, :3])


def test_the_next_piece_reads_on_in_its_slot() -> None:
    model = remembering_model()
    batch, first = Batch(model, 2), row(1, head=1, limit=4)
    batch.admit(row(9, limit=30))
    slot = batch.admit(first)
    finish(batch, [first])
    model.slow.calls.clear()  # type: ignore[attr-defined]
    said = np.concatenate([first.prompt[:, 3:], first.drawn], axis=1)
    second = row(2, head=1, before=said)
    batch.admit(second, slot)
    batch.step()
    assert read_by(model)[-1] == [1 + 4]  # the last column that was drawn had not been read
    finish(batch, [second])
    np.testing.assert_array_equal(second.drawn, alone(row(2, head=1, before=said)))


def test_a_batch_has_a_row_for_each_slot() -> None:
    batch, made = Batch(MODEL, 1), row(1)
    batch.admit(made)
    for slot in (None, 0, 1):
        with pytest.raises(ValueError, match="no idle slot"):
            batch.admit(row(2), slot)
    batch.leave(made)
    assert batch.step() == []
    with pytest.raises(ValueError, match="no idle slot"):
        batch.admit(row(2), 1)
    assert batch.admit(row(2), 0) == 0


@pytest.mark.parametrize("part", [1, 2, 3, 100])
def test_a_prompt_is_read_in_parts_while_others_speak(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fishrt.language_model.context.PART", part)
    model = remembering_model()
    batch, first, second = Batch(model, 2), row(12, limit=30), row(2, head=2, text=6, limit=5)
    batch.admit(first)
    batch.step()
    batch.admit(second)
    reads = list[int]()
    while not second.begun:
        batch.read(second)
        reads.append(model.slow.calls[-1]["prompt"].shape[2])  # type: ignore[attr-defined]
        batch.advance([first])
    assert reads == {1: [1] * 11, 2: [2, 2, 1, 2, 2, 2], 3: [3, 2, 3, 3], 100: [5, 6]}[part]
    finish(batch, [first, second])
    np.testing.assert_array_equal(second.drawn, alone(row(2, head=2, text=6, limit=5)))
    np.testing.assert_array_equal(first.drawn, alone(row(12, limit=30)))


def test_rows_that_wait_stay_as_they_are() -> None:
    batch, rows = Batch(MODEL, 3), [row(seed, limit=9) for seed in (2, 6, 12)]
    for made in rows:
        batch.admit(made)
    batch.step()
    for turn in range(40):
        batch.advance([made for n, made in enumerate(rows) if made.goes_on and (turn + n) % 3])
    for seed, made in zip((2, 6, 12), rows, strict=True):
        np.testing.assert_array_equal(made.drawn, alone(row(seed, limit=9)))


def test_an_error_ends_its_own_row_only() -> None:
    model = remembering_model()
    whole, broken = model.slow._function, row(6, limit=9)  # type: ignore[attr-defined]

    def slow(feeds: Mapping[str, Array], state: FakeState) -> dict[str, Array]:
        results = whole(feeds, state)
        if len(broken.drawn[0]) == 3 and len(results["logits"]) == 2:
            results["logits"][1] = np.nan
        return results  # type: ignore[no-any-return]

    model.slow._function = slow  # type: ignore[attr-defined]
    batch, first = Batch(model, 2), row(12, limit=9)
    for made in (first, broken):
        batch.admit(made)
    finish(batch, [first])
    np.testing.assert_array_equal(first.drawn, alone(row(12, limit=9)))
    assert isinstance(broken.error, GraphError)
    assert broken.stop_reason is None
    np.testing.assert_array_equal(broken.drawn, alone(row(6, limit=9))[:, :3])
    assert batch.admit(row(3)) == 0
    assert batch.admit(row(4)) == 1


# --- real kernels --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def minnow() -> tuple[DualAR, Array]:
    """The embedded model, in float32, and a prompt."""
    tts = TTS.load(provider="cpu", threads=1)
    model = DualAR(tts.engines["slow_ar"], tts.engines["fast_ar"], tts.bundle.manifest.model)
    return model, bench_prompt(tts.bundle, "The birch canoe slid on the smooth planks.")


def test_logits_of_a_batch_are_those_of_each_row(minnow: tuple[DualAR, Array]) -> None:
    """Rows of other lengths, with an idle slot between them that must not change."""
    model, prompt = minnow
    codebooks, rng = model.language_model.num_codebooks, np.random.default_rng(0)
    together, single = SlowContext(model.slow, codebooks, 4), [SlowContext(model.slow, codebooks) for _ in range(4)]
    for n, context in enumerate(single):
        for made, slot in ((together, n), (context, 0)):
            made.read(prompt[:, : prompt.shape[1] - n], slot=slot)
    for step in range(6):
        count = prompt.shape[1] + step
        columns = {n: prompt[:, [rng.integers(0, prompt.shape[1])]] for n in (0, 1, 3)}
        whole = {name: value.copy() for name, value in together.step(columns).items()}
        for n, column in columns.items():
            for name, value in single[n].step({0: column}).items():
                np.testing.assert_allclose(whole[name][n], value[0], atol=TOLERANCES["lm"], err_msg=f"{name} at {count}")
    last = prompt[:, -1:]
    expected = single[2].read(last)["logits"].copy()
    np.testing.assert_allclose(together.read(last, slot=2)["logits"], expected, atol=TOLERANCES["lm"])


def test_codes_of_a_batch_are_those_of_each_row(minnow: tuple[DualAR, Array]) -> None:
    """In float32, the products of ONNX Runtime give a row the same bits in a batch of any size. If not here, codes may differ."""
    model, prompt = minnow
    lm, count = model.language_model, 6

    def made(seed: int) -> Row:
        sampling = Sampling(temperature=1.0, top_p=0.95).resolve(lm.sampling)
        return Row(lm, prompt[:, : prompt.shape[1] - seed % 3], sampling, SeededNoise(seed), head=20, max_columns=4 + 3 * seed)

    singles = [made(seed) for seed in range(count)]
    for single in singles:
        spoken(model, single)
    batch, waiting, rows = Batch(model, 3), list(range(count)), list[Row]()
    while waiting or any(r.stop_reason is None for r in rows):
        if waiting and sum(r.stop_reason is None for r in rows) < 3:
            rows.append(made(waiting.pop(0)))
            batch.admit(rows[-1])
        batch.step()
    if not row_independent(model):
        pytest.skip("on this CPU, a row of a batch is rounded otherwise than a row alone")
    for single, together in zip(singles, rows, strict=True):
        np.testing.assert_array_equal(together.drawn, single.drawn)


def row_independent(model: DualAR) -> bool:
    """Return whether steps of a batch give each row the bits that it gets alone."""
    codebooks, rng = model.language_model.num_codebooks, np.random.default_rng(1)
    for rows in (2, 3):
        contexts = [SlowContext(model.slow, codebooks, rows), *(SlowContext(model.slow, codebooks) for _ in range(rows))]
        for _ in range(4):
            columns = {n: rng.integers(0, 200, (1 + codebooks, 1)) for n in range(rows)}
            whole = contexts[0].step(columns)["logits"].copy()
            if any((whole[n] != contexts[1 + n].step({0: columns[n]})["logits"][0]).any() for n in range(rows)):
                return False
    return True
