"""The slow AR does not read a known context again, and gives the same results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from fakes import FakeEngine, FakeState, specs
from fishrt.language_model import context
from fishrt.language_model.context import ContextStore, SlowContext
from fishrt_engines import Array, Engine
from fishrt_engines.engine import Traits
from helpers_text import language_model, manifest
from tiny import GoldenModel
from tolerances import TOLERANCES

LM = language_model()
ROWS = 1 + LM.num_codebooks


@pytest.fixture
def engine() -> FakeEngine:
    """Return an engine that caches main tokens. `hidden` is their sum, weighted sum and number up to the last column."""
    spec = specs(LM, manifest().codec)["slow_ar"]

    def run(feeds: Mapping[str, Array], state: FakeState) -> dict[str, Array]:
        assert len(feeds["prompt"]) == 1
        start, length = int(feeds["write_index"][0]), feeds["prompt"].shape[2]
        assert feeds["position_ids"].tolist() == [list(range(start, start + length))]
        kept: Any = state.arrays["key_cache.0"]
        kept[0, 0, start : start + length, 0] = feeds["prompt"][0, 0]
        seen = kept[0, 0, : start + length, 0]
        hidden = np.array([[seen.sum(), (seen * np.arange(len(seen))).sum(), len(seen)]], np.float32)
        return {"logits": np.zeros((1, int(spec.outputs[0].shape[1])), np.float32), "hidden": hidden}

    return FakeEngine(spec, run)


def columns(*main: int) -> np.ndarray:
    made = np.zeros((ROWS, len(main)), np.int64)
    made[0] = main
    return made


def context_of(store: ContextStore, engine: Engine, head: np.ndarray) -> SlowContext:
    made = SlowContext(engine, len(head) - 1)
    store.load(made, head)
    return made


def fresh(engine: Engine, prompt: np.ndarray) -> np.ndarray:
    made = SlowContext(engine, LM.num_codebooks)
    return np.array(made.read(made.rewind(prompt))["hidden"])


def test_only_what_differs_is_read(engine: FakeEngine) -> None:
    made = SlowContext(engine, LM.num_codebooks)
    made.read(columns(3, 1, 4, 1, 5))
    for prompt, start in (((3, 1, 4, 1, 5, 9), 5), ((3, 1, 4, 2), 3), ((3, 1), 1), ((7, 7, 7), 0), ((7,), 0)):
        rest = made.rewind(columns(*prompt))
        assert rest.shape[1] == len(prompt) - start
        np.testing.assert_array_equal(made.read(rest)["hidden"], fresh(engine, columns(*prompt)))
        np.testing.assert_array_equal(made.columns(), columns(*prompt))


def test_codes_count_as_much_as_main_tokens(engine: FakeEngine) -> None:
    made = SlowContext(engine, LM.num_codebooks)
    made.read(columns(3, 1, 4))
    other = columns(3, 1, 4, 1)
    other[-1, 1] = 2
    assert made.rewind(other).shape[1] == 3


def test_a_head_is_read_once_and_gives_the_same(engine: FakeEngine) -> None:
    store, head = ContextStore(), columns(2, 7, 1, 8)
    prompt = np.concatenate([head, columns(2, 8)], axis=1)
    given = []
    for _ in range(2):
        made = context_of(store, engine, head)
        given.append(made.read(made.rewind(prompt))["hidden"])
    assert [call["prompt"].shape[2] for call in engine.calls] == [4, 2, 2]
    np.testing.assert_array_equal(given[0], given[1])
    np.testing.assert_array_equal(given[0], fresh(engine, prompt))


def test_where_states_have_no_parts_a_known_head_is_read_again(engine: FakeEngine) -> None:
    engine.traits = Traits(parts_states=False)
    store, head = ContextStore(), columns(2, 7, 1, 8)
    assert [context_of(store, engine, head).columns().shape[1] for _ in range(2)] == [4, 4]
    assert [call["prompt"].shape[2] for call in engine.calls] == [4, 4]


def test_caches_have_few_sizes_where_each_costs_much(engine: FakeEngine) -> None:
    engine.traits = Traits(few_sizes=True)
    made, state = SlowContext(engine, LM.num_codebooks), engine.states[-1]
    sizes = []
    for length in (20, 300, 900):
        made.reserve(length, 1500)
        sizes.append(state.dims["cache"])
    assert sizes == [1024, 1024, 1500]


def test_what_one_request_adds_is_not_in_the_next(engine: FakeEngine) -> None:
    store, head = ContextStore(), columns(2, 7)
    first = context_of(store, engine, head)
    first.read(columns(5, 5, 5))
    second = context_of(store, engine, head)
    np.testing.assert_array_equal(second.columns(), head)
    np.testing.assert_array_equal(second.read(columns(1))["hidden"], fresh(engine, columns(2, 7, 1)))


def test_an_empty_head_reads_nothing(engine: FakeEngine) -> None:
    assert context_of(ContextStore(), engine, columns()).columns().shape == (ROWS, 0)
    assert not engine.calls


def test_the_least_recently_used_goes_first(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    heads = [columns(1, 2), columns(3, 4), columns(5, 6)]
    size = 2 * 2 * 2 * 4  # keys and values of two columns, two floats each
    monkeypatch.setattr(context, "KEPT_BYTES", 2 * size)
    store = ContextStore()
    for n in (0, 1, 0, 2, 0, 1):
        context_of(store, engine, heads[n])
    read = [call["prompt"][0, 0].tolist() for call in engine.calls]
    assert read == [[1, 2], [3, 4], [5, 6], [3, 4]]


def test_keys_and_values_of_another_graph_are_refused(engine: FakeEngine) -> None:
    other = FakeState(specs(LM, manifest().codec)["fast_ar"], {"batch": 1})
    with pytest.raises(ValueError, match="another graph"):
        SlowContext(engine, LM.num_codebooks).restore(columns(1), other)


def test_real_keys_and_values_are_restored(s2_model: GoldenModel) -> None:
    """Results equal those after reading the head bit for bit, and those of reading all at once up to rounding."""
    engine, codebooks = s2_model.engine("slow_ar", fast=True), s2_model.lm.config.num_codebooks
    rng = np.random.default_rng(5)
    head, rest = (np.zeros((1 + codebooks, length), np.int64) for length in (9, 4))
    head[0], rest[0] = rng.integers(0, 20, 9), rng.integers(0, 20, 4)
    store = ContextStore()
    cold, warm = (np.array(context_of(store, engine, head).read(rest)["logits"]) for _ in range(2))
    np.testing.assert_array_equal(cold, warm)
    whole = SlowContext(engine, codebooks).read(np.concatenate([head, rest], axis=1))["logits"]
    assert np.abs(whole - cold).max() <= TOLERANCES["lm"]
