"""Tensors and engines in the memory of a device: the code that CUDA uses, here with memory that ONNX Runtime calls "cpu".

If there is a device, most tests run on it, too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper
from test_engine import SUMS, WIDTH, feeds, save, sums

from fishrt_engines import Array, GraphSpec, StatePair, TensorSpec, open_engine
from fishrt_engines.ort import cuda as ort_cuda
from fishrt_engines.ort.engine import OrtEngine
from fishrt_engines.ort.session import open_session
from fishrt_engines.ort.tensors import DeviceMemory, DeviceTensor, HostTensor, from_bytes, to_bytes

MEMORY = DeviceMemory(onnxruntime, "cpu", ["CPUExecutionProvider"])
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def on_device(path: Path, spec: GraphSpec) -> OrtEngine:
    opened = open_session(path, spec, threads=1)
    return OrtEngine(replace(opened, memory=MEMORY), spec, "cuda")


@pytest.fixture(params=DEVICES)
def memory(request: pytest.FixtureRequest) -> DeviceMemory:
    if request.param == "cpu":
        return MEMORY
    request.getfixturevalue("cuda_device")
    return ort_cuda.device_memory(onnxruntime)


@pytest.fixture
def open_there(memory: DeviceMemory) -> Callable[[Path, GraphSpec], OrtEngine]:
    """Return a function that opens a graph on the device, without rewriting."""

    def opened(path: Path, spec: GraphSpec) -> OrtEngine:
        if memory is MEMORY:
            return on_device(path, spec)
        engine = open_engine(path, spec, provider="cuda")
        assert isinstance(engine, OrtEngine)
        return engine

    return opened


@pytest.fixture
def engine(open_there: Callable[[Path, GraphSpec], OrtEngine], tmp_path: Path) -> OrtEngine:
    return open_there(sums(tmp_path), SUMS)


def tensor(memory: DeviceMemory, array: Array, element: str | None = None) -> DeviceTensor:
    made = memory.zeros(array.shape, array.dtype.name, element or array.dtype.name)
    made.put(array)
    return made


def test_what_is_put_comes_back(memory: DeviceMemory) -> None:
    rng = np.random.default_rng(0)
    for dtype in ("float32", "int64", "int32", "uint8", "bool", "float16"):
        array = (100 * rng.random((3, 5))).astype(dtype)
        held = tensor(memory, array)
        np.testing.assert_array_equal(held.numpy(), array)
        assert held.numpy().dtype == held.dtype == array.dtype
        assert held.numpy() is not held.numpy()
    assert tensor(memory, np.array(7, np.float32)).numpy() == 7


def test_new_memory_is_zeros(memory: DeviceMemory) -> None:
    """Used memory is allocated again, so that it is not zero by accident."""
    for _ in range(20):
        used = memory.zeros((64, 3), "float32", "bfloat16")
        assert not used.numpy().any()
        used.put(np.ones((64, 3), np.float32))


@pytest.mark.parametrize("element", ["float32", "bfloat16"])
@pytest.mark.parametrize("target_rows", [5, 4, 9])
@pytest.mark.parametrize("source_rows", [4, 7])
@pytest.mark.parametrize("width", [4, 3])
def test_a_leading_part_of_a_tensor_of_any_length_is_copied(
    memory: DeviceMemory, element: str, target_rows: int, source_rows: int, width: int
) -> None:
    """Rows behind it stay as they are, also within a part of a larger tensor. Rows of 3 values in 16 bits are no whole words."""
    rng = np.random.default_rng(1)
    whole, source = (rng.integers(-99, 99, (2, 3, n, width)).astype(np.float32) for n in (target_rows, source_rows))
    target, given = tensor(memory, whole, element), tensor(memory, source, element)
    if (3 * target_rows * width) % 2 == 0 and (3 * source_rows * width) % 2 == 0:  # whole words
        target.part(1, 1).lead(given.part(0, 1), (1, 3, 3, width))
        whole[1, :, :3] = source[0, :, :3]
        np.testing.assert_array_equal(target.numpy(), whole)
    target.lead(given, (2, 3, 4, width))
    whole[:, :, :4] = source[:, :, :4]
    np.testing.assert_array_equal(target.numpy(), whole)


@pytest.mark.parametrize("element", ["float32", "bfloat16"])
@pytest.mark.parametrize("part", [(2, 3, 2, 4), (1, 3, 5, 4), (2, 3, 5, 3), (2, 1, 4, 4), (2, 3, 5, 4)])
@pytest.mark.parametrize("from_host", [True, False])
def test_a_leading_part_is_replaced(memory: DeviceMemory, element: str, part: tuple[int, ...], from_host: bool) -> None:
    """Parts differ in one dimension or several, with sizes in bytes that are multiples of a word or not."""
    rng = np.random.default_rng(1)
    whole, lead = (rng.integers(-99, 99, shape).astype(np.float32) for shape in ((2, 3, 5, 4), part))
    target = tensor(memory, whole, element)
    at = target.place.pointer
    target.lead(lead if from_host else tensor(memory, lead, element))
    whole[tuple(map(slice, part))] = lead
    np.testing.assert_array_equal(target.numpy(), whole)
    assert target.place.pointer == at


def test_bfloat16_is_the_nearest_with_ties_to_even() -> None:
    torch = pytest.importorskip("torch", reason="its bfloat16 is the measure")
    rng = np.random.default_rng(2)
    bits = rng.integers(0, 2**32, 100_000, dtype=np.uint32)
    special = np.array([0, 1, 0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7F800001, 0xFFFFFFFF])
    values = np.concatenate([bits, special.astype(np.uint32)]).view(np.float32)
    rounded = from_bytes(to_bytes(values, "bfloat16"), "bfloat16", np.dtype("float32"), values.shape)
    expected = torch.from_numpy(values).to(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(rounded, expected)  # NaN equals NaN here
    assert np.isnan(rounded[-1])


def test_a_row_lies_within_the_whole() -> None:
    held = tensor(MEMORY, np.arange(12, dtype=np.float32).reshape(3, 4), "bfloat16")
    row = held.place.part(2, 1)
    assert (row.pointer - held.place.pointer, row.shape, row.nbytes) == (16, (1, 4), 8)
    array = HostTensor(np.arange(12, dtype=np.float32).reshape(3, 4))
    assert array.place.part(1, 1).pointer == array.array[1:].ctypes.data


def test_results_are_the_callers_own(engine: OrtEngine) -> None:
    state = engine.new_state(batch=1, cache=4)
    first = engine.run(feeds([1], 0), state)["total"]
    engine.run(feeds([2], 1), state)
    assert first.tolist() == [[1.0] * WIDTH]


LOW = replace(SUMS, file="low.onnx")


def low(folder: Path, element: str) -> OrtEngine:
    """SUMS with a cache of 16 bits."""
    kind = {"bfloat16": TensorProto.BFLOAT16, "float16": TensorProto.FLOAT16}[element]
    nodes = [
        helper.make_node("Cast", ["x"], ["rounded"], to=kind),
        helper.make_node("TensorScatter", ["cache", "rounded", "write_index"], ["cache_out"], axis=-2),
        helper.make_node("Cast", ["cache_out"], ["widened"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["widened", "axes"], ["total"], keepdims=0),
    ]
    path = save(folder / LOW.file, nodes, LOW, {"axes": np.array([1, 2], np.int64)}, {"cache": kind, "cache_out": kind})
    cache = {name: TensorSpec(name, element, LOW.state_tensors[0].shape) for name in ("cache", "cache_out")}
    inputs, outputs = (tuple(cache.get(t.name, t) for t in tensors) for tensors in (LOW.inputs, LOW.outputs))
    return on_device(path, replace(LOW, inputs=inputs, outputs=outputs))


@pytest.mark.parametrize("element", ["bfloat16", "float16"])
def test_a_state_of_16_bits_is_read_and_written_in_float32(tmp_path: Path, element: str) -> None:
    engine = low(tmp_path, element)
    state = engine.new_state(batch=1, cache=4)
    engine.run(feeds([1, 2**-9 + 1], 0), state)
    assert state.read("cache").dtype == np.float32
    assert state.read("cache")[0, 0, :, 0].tolist() == [1, {"bfloat16": 1, "float16": 2**-9 + 1}[element], 0, 0]
    state.grow(cache=6)
    state.write("cache", np.full((1, 1, 3, WIDTH), 3 + 2**-12, np.float32))
    total = engine.run(feeds([5], 3), state)["total"]
    assert total.tolist() == [[14.0] * WIDTH]
    assert state.tensor("cache").place.nbytes == 6 * WIDTH * 2


DOUBLE = GraphSpec(
    "double.onnx", (TensorSpec("total", "float32", ("batch", WIDTH)),), (TensorSpec("twice", "float32", ("batch", WIDTH)),)
)


def double(folder: Path) -> Path:
    return save(folder / DOUBLE.file, [helper.make_node("Add", ["total", "total"], ["twice"])], DOUBLE)


def test_a_result_stays_on_the_device_for_another_engine(
    engine: OrtEngine, open_there: Callable[[Path, GraphSpec], OrtEngine], tmp_path: Path
) -> None:
    second = open_there(double(tmp_path), DOUBLE)
    state = engine.new_state(batch=2, cache=4)
    for n, (value, twice) in enumerate(((1, 2.0), (2, 6.0))):
        total = engine.run(feeds([value], n, batch=2), state, resident=["total"])["total"]
        assert isinstance(total, DeviceTensor)
        assert (total.shape, total.dtype) == ((2, WIDTH), np.float32)
        result = second.run({"total": total}, resident=("twice",))["twice"]
        assert result.numpy().tolist() == [[twice] * WIDTH] * 2
        assert second.run({"total": total})["twice"].tolist() == [[twice] * WIDTH] * 2
    assert len(second._stateless.plans) == 1, "one plan for all that has these shapes, wherever it comes from"


def test_a_constant_is_copied_to_the_device_once(engine: OrtEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other feeds are copied every time, also read-only views of writable memory."""
    copied: list[object] = []
    put = DeviceTensor.put
    monkeypatch.setattr(DeviceTensor, "put", lambda tensor, value: (copied.append(value), put(tensor, value)))
    state, given = engine.new_state(batch=1, cache=8), feeds([1], 0)
    changing, constant, other = (np.full_like(given["x"], value) for value in (1, 2, 4))
    view = changing[:]
    for array in (constant, other, view):
        array.flags.writeable = False
    totals = []
    for n, x in enumerate((changing, view, constant, constant, other, constant, constant, view)):
        changing[...] = n
        totals.append(engine.run({**given, "x": x, "write_index": np.array([n])}, state)["total"][0, 0])
    assert np.diff([0, *totals]).tolist() == [0, 1, 2, 2, 4, 2, 2, 7]
    assert [sum(value is x for value in copied) for x in (changing, view, constant, other)] == [1, 2, 2, 1]


def test_a_resident_result_can_feed_a_call_with_state(engine: OrtEngine, memory: DeviceMemory) -> None:
    x = feeds([3], 0)
    held = {name: memory.upload(array) for name, array in x.items()}
    assert engine.run(held, engine.new_state(batch=1, cache=2))["total"].tolist() == [[3.0] * WIDTH]


def test_what_cannot_stay_or_be_fed_is_named(tmp_path: Path) -> None:
    engine = on_device(sums(tmp_path), SUMS)
    state = engine.new_state(batch=1, cache=2)
    with pytest.raises(ValueError, match="logits cannot stay on the device; the results are total"):
        engine.run(feeds([1], 0), state, resident=["logits"])
    with pytest.raises(ValueError, match="x has shape"):
        engine.run({**feeds([1], 0), "x": MEMORY.upload(np.zeros((1, 1, 1, 9), np.float32))}, state)
    on_host = open_engine(double(tmp_path), DOUBLE, provider="cpu")
    elsewhere = MEMORY.upload(np.zeros((1, WIDTH), np.float32))
    with pytest.raises(ValueError, match=r"total of double\.onnx must be arrays, or results that stayed on the same device"):
        on_host.run({"total": elsewhere})
    other = DeviceMemory(onnxruntime, "another", [])
    elsewhere.memory = other
    with pytest.raises(ValueError, match="must be arrays"):
        on_device(tmp_path / DOUBLE.file, DOUBLE).run({"total": elsewhere})


def test_on_a_cpu_a_resident_result_is_the_array(tmp_path: Path) -> None:
    on_host = open_engine(double(tmp_path), DOUBLE, provider="cpu")
    assert isinstance(on_host.run({"total": np.ones((1, WIDTH), np.float32)}, resident=["twice"])["twice"], np.ndarray)


def test_results_of_a_size_that_no_input_tells(tmp_path: Path) -> None:
    spec = GraphSpec(
        "kept.onnx",
        (TensorSpec("x", "float32", ("n",)), TensorSpec("count", "float32", (1,))),
        (TensorSpec("where", "int64", (1, "found")), TensorSpec("count_out", "float32", (1,))),
        (StatePair("count", "count_out"),),
    )
    nodes = [helper.make_node("NonZero", ["x"], ["where"]), helper.make_node("Add", ["count", "one"], ["count_out"])]
    engine = on_device(save(tmp_path / spec.file, nodes, spec, {"one": np.ones(1, np.float32)}), spec)
    state = engine.new_state()
    first = engine.run({"x": np.array([0, 1, 1], np.float32)}, state, resident=["where"])["where"]
    assert (first.tolist(), engine.run({"x": np.array([1, 0, 0], np.float32)}, state)["where"].tolist()) == ([[1, 2]], [[0]])
    assert state.read("count").tolist() == [2]


def test_threads_may_share_an_engine_without_state(tmp_path: Path) -> None:
    """They share its bound tensors, so one must wait for the other."""
    engine = on_device(double(tmp_path), DOUBLE)
    wrong: list[int] = []

    def work(n: int) -> None:
        for _ in range(300):
            if (engine.run({"total": MEMORY.upload(np.full((1, WIDTH), n, np.float32))})["twice"] != 2 * n).any():
                wrong.append(n)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
