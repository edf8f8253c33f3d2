"""States of an engine, as arrays and in the memory of a device: the same calls give the same results."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_engine import SUMS, WIDTH, feeds, sums
from test_ort_device import DEVICES, on_device

from fishrt_engines import Engine, open_engine


@pytest.fixture(params=["arrays", *DEVICES])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Engine:
    if request.param == "arrays":
        return open_engine(sums(tmp_path), SUMS, provider="cpu", threads=1)
    if request.param == "cpu":
        return on_device(sums(tmp_path), SUMS)
    request.getfixturevalue("cuda_device")
    return open_engine(sums(tmp_path), SUMS, provider="cuda")


def test_state_is_updated_in_place_and_carried(engine: Engine) -> None:
    state = engine.new_state(batch=1, cache=8)
    before = state.tensor("cache").place.pointer
    assert engine.run(feeds([1, 2, 3], 0), state)["total"].tolist() == [[6.0] * WIDTH]
    for n, value in enumerate([4, 5, 6]):
        total = engine.run(feeds([value], 3 + n), state)["total"]
    assert total.tolist() == [[21.0] * WIDTH]
    assert state.read("cache")[0, 0, :, 0].tolist() == [1, 2, 3, 4, 5, 6, 0, 0]
    assert state.tensor("cache").place.pointer == before
    assert state.dims == {"batch": 1, "cache": 8}


def test_a_grown_state_keeps_what_it_held(engine: Engine) -> None:
    state = engine.new_state(batch=2, cache=2)
    engine.run(feeds([1, 2], 0, batch=2), state)
    state.grow(cache=5)
    assert state.dims == {"batch": 2, "cache": 5}
    assert engine.run(feeds([4], 2, batch=2), state)["total"].tolist() == [[7.0] * WIDTH] * 2
    assert state.read("cache")[1, 0, :, 0].tolist() == [1, 2, 4, 0, 0]


def test_rows_of_a_state_share_its_memory(engine: Engine) -> None:
    state = engine.new_state(batch=3, cache=2)
    second, front = state.row(1), state.rows(2)
    engine.run(feeds([5, 6], 0), second)
    state.grow(cache=4)  # the rows are those of the grown state
    assert (second.dims, front.dims) == ({"batch": 1, "cache": 4}, {"batch": 2, "cache": 4})
    assert engine.run(feeds([1], 2, batch=2), front)["total"].tolist() == [[1.0] * WIDTH, [12.0] * WIDTH]
    assert engine.run(feeds([2], 3), second.row(0))["total"].tolist() == [[14.0] * WIDTH]
    second.write("cache", np.full((1, 1, 1, WIDTH), 7, np.float32))
    assert state.read("cache")[:, 0, :, 0].tolist() == [[0, 0, 1, 0], [7, 6, 1, 2], [0, 0, 0, 0]]
    np.testing.assert_array_equal(front.row(1).read("cache"), state.read("cache")[1:2])
    assert state.rows(3) is state
    for wrong in (lambda: state.row(3), lambda: state.rows(0), lambda: state.rows(4), lambda: second.row(1)):
        with pytest.raises(ValueError, match="not among the"):
            wrong()
    with pytest.raises(ValueError, match="do not grow by themselves"):
        second.grow(cache=5)


def test_positions_are_copied_into_a_row(engine: Engine) -> None:
    kept, state = engine.new_state(batch=1, cache=3), engine.new_state(batch=2, cache=4)
    engine.run(feeds([1, 2, 4], 0), kept)
    engine.run(feeds([8, 8, 8, 8], 0, batch=2), state)
    state.copy_rows(kept, 1, 2)
    assert state.read("cache")[:, 0, :, 0].tolist() == [[8, 8, 8, 8], [1, 2, 8, 8]]
    kept.copy_rows(kept, 0, 3)
    shorter = engine.new_state(batch=1, cache=3)
    shorter.copy_rows(state.row(1), 0, 3)
    assert shorter.read("cache")[0, 0, :, 0].tolist() == [1, 2, 8]
    shorter.copy_rows(state.row(0), 0, 1)
    assert shorter.read("cache")[0, 0, :, 0].tolist() == [8, 2, 8]
    engine.new_state(batch=1, cache=4).copy_rows(state.row(1), 0, 4)
    for source, row, length in ((state, 0, 1), (kept, 2, 1), (kept, 0, 4)):
        with pytest.raises(ValueError, match=r"of one row|not among|do not fit"):
            state.copy_rows(source, row, length)


def test_what_was_read_can_be_written(engine: Engine) -> None:
    state, other = engine.new_state(batch=1, cache=4), engine.new_state(batch=1, cache=6)
    engine.run(feeds([1, 2], 0), state)
    other.write("cache", state.read("cache")[:, :, :2])
    assert engine.run(feeds([4], 2), other)["total"].tolist() == [[7.0] * WIDTH]


def test_feeds_need_not_be_contiguous(engine: Engine) -> None:
    state = engine.new_state(batch=1, cache=4)
    given = {**feeds([1, 2, 3, 4], 0)}
    given["x"] = given["x"][:, :, ::2]
    assert engine.run(given, state)["total"].tolist() == [[4.0] * WIDTH]


@pytest.mark.parametrize("dims", [{"cache": 3}, {"length": 9}], ids=["smaller", "unknown"])
def test_a_state_cannot_grow_to(engine: Engine, dims: dict[str, int]) -> None:
    state = engine.new_state(batch=1, cache=4)
    with pytest.raises(ValueError, match="cannot become"):
        state.grow(**dims)


@pytest.mark.parametrize("array", [np.zeros((1, 1, 9, WIDTH), np.float32), np.zeros((1, 1, 1, WIDTH)), np.zeros(3, np.float32)])
def test_only_what_fits_can_be_written(engine: Engine, array: np.ndarray) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        engine.new_state(batch=1, cache=4).write("cache", array)


def test_what_read_gives_is_a_copy(engine: Engine) -> None:
    state = engine.new_state(batch=1, cache=4)
    state.read("cache")[:] = 9
    assert engine.run(feeds([1], 0), state)["total"].tolist() == [[1.0] * WIDTH]


def test_states_do_not_touch_each_other(engine: Engine) -> None:
    one, two = engine.new_state(batch=1, cache=4), engine.new_state(batch=2, cache=5)
    engine.run(feeds([1], 0), one)
    engine.run(feeds([10], 0, batch=2), two)
    assert engine.run(feeds([2], 1), one)["total"].tolist() == [[3.0] * WIDTH]
    assert engine.run(feeds([20], 1, batch=2), two)["total"].tolist() == [[30.0] * WIDTH] * 2
