"""The ONNX Runtime engine on small graphs: binding, state in place, checks of feeds."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from fishrt_engines import FishrtError, GraphError, GraphSpec, ProviderError, StatePair, TensorSpec, open_engine
from fishrt_engines.engine import ColumnInputs
from fishrt_engines.machine import allowed_cpus, default_threads, usable_threads
from fishrt_engines.providers import choose_provider, find_obstacle

WIDTH = 3
CACHE = ("batch", 1, "cache", WIDTH)
SUMS = GraphSpec(
    "sums.onnx",
    inputs=(
        TensorSpec("x", "float32", ("batch", 1, "length", WIDTH)),
        TensorSpec("write_index", "int64", ("batch",)),
        TensorSpec("cache", "float32", CACHE),
    ),
    outputs=(TensorSpec("total", "float32", ("batch", WIDTH)), TensorSpec("cache_out", "float32", CACHE)),
    states=(StatePair("cache", "cache_out"),),
)
"""A graph that writes x into the cache and returns the sum over the whole cache."""


def save(
    path: Path,
    nodes: list[onnx.NodeProto],
    spec: GraphSpec,
    constants: dict[str, np.ndarray] | None = None,
    types: dict[str, int] | None = None,
) -> Path:
    """Write a graph. types: ONNX's element types of tensors for which the description has another."""

    def info(t: TensorSpec) -> onnx.ValueInfoProto:
        described = helper.np_dtype_to_tensor_dtype(np.dtype(t.dtype))
        return helper.make_tensor_value_info(t.name, (types or {}).get(t.name, described), t.shape)

    initializers = [onnx.numpy_helper.from_array(array, name) for name, array in (constants or {}).items()]
    graph = helper.make_graph(nodes, "graph", [info(t) for t in spec.inputs], [info(t) for t in spec.outputs], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=10)
    onnx.save(model, path)
    return path


def sums(folder: Path) -> Path:
    nodes = [
        helper.make_node("TensorScatter", ["cache", "x", "write_index"], ["cache_out"], axis=-2),
        helper.make_node("ReduceSum", ["cache_out", "axes"], ["total"], keepdims=0),
    ]
    return save(folder / SUMS.file, nodes, SUMS, {"axes": np.array([1, 2], np.int64)})


@pytest.fixture
def engine(tmp_path: Path):
    return open_engine(sums(tmp_path), SUMS, provider="cpu", threads=1)


def feeds(values: list[float], index: int, batch: int = 1) -> dict[str, np.ndarray]:
    x = np.repeat(np.array(values, np.float32)[None, None, :, None], WIDTH, axis=3)
    return {"x": np.repeat(x, batch, axis=0), "write_index": np.full(batch, index, np.int64)}


def test_buffers_are_bound_once_for_each_set_of_shapes(engine) -> None:
    state = engine.new_state(batch=1, cache=64)
    first = engine.run(feeds([1], 0), state)["total"]
    plan = next(iter(state.carried.plans.values()))
    for n in range(2, 12):
        engine.run(feeds([1] * n, 0), state)
        engine.run(feeds([1], 0), state)
        assert len(state.carried.plans) <= 4
    assert plan in state.carried.plans.values()
    assert engine.run(feeds([3], 0), state)["total"] is first  # documented: a result may be overwritten


def test_feeds_are_copied(engine) -> None:
    state = engine.new_state(batch=1, cache=4)
    given = feeds([1], 0)
    engine.run(given, state)
    given["x"][:] = 100
    assert engine.run(feeds([2], 1), state)["total"].tolist() == [[3.0] * WIDTH]


BAD = {
    "missing": (lambda f: f.pop("x"), "feeds are write_index"),
    "extra": (lambda f: f.update(y=f["x"]), "feeds are write_index, x, y"),
    "dtype": (lambda f: f.update(x=f["x"].astype(np.float64)), "x is float64; sums.onnx needs float32"),
    "index dtype": (lambda f: f.update(write_index=f["write_index"].astype(np.int32)), "write_index is int32"),
    "rank": (lambda f: f.update(x=f["x"][0]), r"x has shape \[1, 1, 3\]"),
    "fixed size": (lambda f: f.update(x=f["x"][..., :2]), r"x has shape \[1, 1, 1, 2\]; .* \[batch, 1, length, 3\]"),
    "batch of the state": (lambda f: f.update(x=np.repeat(f["x"], 2, axis=0)), "batch = 1"),
    "empty": (lambda f: f.update(x=f["x"][:, :, :0]), r"\[1, 1, 0, 3\]"),
    "list": (lambda f: f.update(write_index=[0]), "write_index is list"),
}


@pytest.mark.parametrize("known_shapes", [False, True], ids=["first call", "later call"])
@pytest.mark.parametrize("case", BAD)
def test_feeds_that_do_not_fit_are_named(engine, case: str, known_shapes: bool) -> None:
    change, says = BAD[case]
    state = engine.new_state(batch=1, cache=4)
    if known_shapes:
        engine.run(feeds([1], 0), state)
    given = feeds([1], 0)
    change(given)
    with pytest.raises(ValueError, match=says):
        engine.run(given, state)


def test_a_state_is_needed_and_must_be_the_engines_own(engine, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs a state"):
        engine.run(feeds([1], 0))
    other = open_engine(sums(tmp_path), SUMS, threads=1)
    with pytest.raises(ValueError, match="its own"):
        engine.run(feeds([1], 0), other.new_state(batch=1, cache=4))


@pytest.mark.parametrize("dims", [{}, {"batch": 1}, {"batch": 1, "cache": 4, "more": 1}])
def test_state_dimensions_are_exactly_the_graphs(engine, dims: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="needs batch, cache"):
        engine.new_state(**dims)


def test_state_dimensions_are_positive(engine) -> None:
    with pytest.raises(ValueError, match="cache = 0"):
        engine.new_state(batch=1, cache=0)


@pytest.mark.parametrize("size", [2**44, 2**62])
def test_a_state_beyond_memory_is_an_error_for_users(engine, size: int) -> None:
    with pytest.raises(FishrtError, match=f"not enough memory for the state of sums.onnx at batch = 1, cache = {size}"):
        engine.new_state(batch=1, cache=size)


def test_a_run_that_fails_is_an_error_for_users(engine) -> None:
    with pytest.raises(GraphError, match="failed"):
        engine.run(feeds([1, 2], 3), engine.new_state(batch=1, cache=4))


def test_a_graph_without_state(tmp_path: Path) -> None:
    spec = GraphSpec("double.onnx", (TensorSpec("x", "float32", ("batch", "n")),), (TensorSpec("y", "float32", ("batch", "n")),))
    path = save(tmp_path / spec.file, [helper.make_node("Add", ["x", "x"], ["y"])], spec)
    engine = open_engine(path, spec, threads=1)
    first = engine.run({"x": np.ones((1, 3), np.float32)})["y"]
    second = engine.run({"x": np.full((2, 2), 4, np.float32)})["y"]
    assert (first.tolist(), second.tolist()) == ([[2, 2, 2]], [[8, 8], [8, 8]])
    with pytest.raises(ValueError, match="carries no state"):
        engine.run({"x": np.ones((1, 3), np.float32)}, open_engine(sums(tmp_path), SUMS).new_state(batch=1, cache=2))
    with pytest.raises(ValueError, match="y"):
        engine.run({"y": np.ones((1, 3), np.float32)})


def test_results_of_a_size_that_no_input_tells(tmp_path: Path) -> None:
    spec = GraphSpec(
        "kept.onnx",
        (TensorSpec("x", "float32", ("n",)), TensorSpec("count", "float32", (1,))),
        (
            TensorSpec("where", "int64", (1, "found")),
            TensorSpec("twice", "float32", ("n",)),
            TensorSpec("count_out", "float32", (1,)),
        ),
        (StatePair("count", "count_out"),),
    )
    nodes = [
        helper.make_node("NonZero", ["x"], ["where"]),
        helper.make_node("Add", ["x", "x"], ["twice"]),
        helper.make_node("Add", ["count", "one"], ["count_out"]),
    ]
    engine = open_engine(save(tmp_path / spec.file, nodes, spec, {"one": np.ones(1, np.float32)}), spec, threads=1)
    state = engine.new_state()
    first = engine.run({"x": np.array([0, 1, 1], np.float32)}, state)["where"]
    second = engine.run({"x": np.array([1, 0, 0], np.float32)}, state)
    assert (first.tolist(), second["where"].tolist(), second["twice"].tolist()) == ([[1, 2]], [[0]], [2, 0, 0])
    assert state.read("count").tolist() == [2]


def renamed(tensors: tuple[TensorSpec, ...], old: str, **changes: object) -> tuple[TensorSpec, ...]:
    return tuple(replace(t, **changes) if t.name == old else t for t in tensors)


DIFFERENT = {
    "name": (replace(SUMS, inputs=renamed(SUMS.inputs, "x", name="z")), ["input z is missing", "input x is not described"]),
    "dtype": (
        replace(SUMS, outputs=renamed(SUMS.outputs, "total", dtype="float16")),
        ["output total is float32 instead of float16"],
    ),
    "size": (replace(SUMS, inputs=renamed(SUMS.inputs, "x", shape=("batch", 1, "length", 4))), ["input x has shape"]),
    "rank": (replace(SUMS, inputs=renamed(SUMS.inputs, "x", shape=("batch", "length", 3))), ["input x has shape"]),
    "fixed in the file": (replace(SUMS, inputs=renamed(SUMS.inputs, "x", shape=("batch", "heads", "length", 3))), ["input x"]),
    "another dimension": (replace(SUMS, inputs=renamed(SUMS.inputs, "x", shape=("rows", 1, "length", 3))), ["'rows', 1"]),
    "columns of nothing": (replace(SUMS, columns=ColumnInputs("write_index", "nothing")), ["nothing cannot place columns"]),
    "columns by another tensor": (replace(SUMS, columns=ColumnInputs("x", "write_index")), ["x cannot", "write_index cannot"]),
    "rows without a cache": (replace(SUMS, columns=ColumnInputs("write_index", "x", "rows")), ["named together"]),
    "state without a tensor": (replace(SUMS, states=(*SUMS.states, StatePair("k", "k_out"))), ["k → k_out"]),
    "state that changes": (
        replace(SUMS, outputs=renamed(SUMS.outputs, "cache_out", shape=("batch", 1, "length", 3))),
        ["cache → "],
    ),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_a_file_that_is_not_what_was_described_is_refused(tmp_path: Path, case: str) -> None:
    spec, says = DIFFERENT[case]
    with pytest.raises(GraphError) as caught:
        open_engine(sums(tmp_path), spec)
    assert all(text in str(caught.value) for text in says), caught.value


def test_an_added_input_that_the_file_lacks_is_missed(tmp_path: Path) -> None:
    positions = TensorSpec("position_ids", "int64", ("batch", "length"))
    spec = replace(SUMS, inputs=(positions, *SUMS.inputs), columns=ColumnInputs("write_index", "position_ids", "rows", "cache"))
    nodes = [
        helper.make_node("TensorScatter", ["cache", "x", "write_index"], ["cache_out"], axis=-2),
        helper.make_node("ReduceSum", ["cache_out", "axes"], ["total"], keepdims=0),
    ]
    path = save(tmp_path / spec.file, nodes, spec, {"axes": np.array([1, 2], np.int64)})
    open_engine(path, replace(spec, columns=ColumnInputs("write_index", "position_ids")), threads=1)
    with pytest.raises(GraphError, match="input rows is missing") as caught:
        open_engine(path, spec, threads=1)
    assert caught.value.hint == "export it again"


@pytest.mark.parametrize("content", [b"", b"not a graph", None])
def test_a_damaged_or_missing_file_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "graph.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(GraphError, match=r"graph\.onnx"):
        open_engine(path, SUMS)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = sums(tmp_path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(GraphError, match=r"sums\.onnx"):
        open_engine(path, SUMS)


@pytest.mark.parametrize("name", ["cuda", "tensorrt", "coreml"])
def test_an_absent_provider_is_refused_and_never_replaced(tmp_path: Path, name: str) -> None:
    if find_obstacle(name) is None:
        pytest.skip(f"{name} can be used here")
    with pytest.raises(ProviderError, match=name):
        open_engine(sums(tmp_path), SUMS, provider=name)


def test_auto_logs_its_choice(engine, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    choice = choose_provider()
    with caplog.at_level(logging.INFO, "fishrt_engines"):
        assert open_engine(sums(tmp_path), SUMS, provider="auto").provider == choice.name
    assert f'provider "auto" chose "{choice.name}" ({choice.reason})' in caplog.text
    assert engine.provider == "cpu"


@pytest.mark.parametrize("threads", [0, -1])
def test_threads_are_at_least_one(tmp_path: Path, threads: int) -> None:
    with pytest.raises(ProviderError, match="threads"):
        open_engine(sums(tmp_path), SUMS, threads=threads)


def test_threads_beyond_the_processors_are_not_used(caplog: pytest.LogCaptureFixture) -> None:
    most = len(allowed_cpus())
    assert [usable_threads(n) for n in (None, 1, most)] == [default_threads(), 1, most]
    assert not caplog.messages
    assert [usable_threads(most + 1000) for _ in range(2)] == [most] * 2
    assert caplog.messages == [
        f"{most + 1000} threads are requested, but this process may use {most} logical CPUs: {most} threads are used"
    ]


def test_threads_without_work_sleep(tmp_path: Path) -> None:
    """They spin only briefly, since spinning takes cores from the loop's other graphs and from other processes."""
    size = 512
    spec = GraphSpec(
        "product.onnx",
        inputs=(TensorSpec("x", "float32", (size, size)),),
        outputs=(TensorSpec("y", "float32", (size, size)),),
        states=(),
    )
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    path = save(tmp_path / spec.file, nodes, spec, {"w": np.ones((size, size), np.float32)})
    engine = open_engine(path, spec, provider="cpu", threads=2)
    x = {"x": np.ones((size, size), np.float32)}
    slept, worked = 0.1, []
    for _ in range(5):
        engine.run(x)
        begun = time.process_time()
        time.sleep(slept)
        worked.append(time.process_time() - begun)
    assert np.median(worked) < slept / 10
