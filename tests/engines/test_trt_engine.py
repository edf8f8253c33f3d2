"""The TensorRT engine, compared with ONNX Runtime. TensorRT and CUDA are simulated; see fake_tensorrt."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fishrt_engines import Engine, FishrtError, GraphError, open_engine
from fishrt_engines.trt.device import open_device
from fishrt_engines.trt.engine import TrtEngine, open_plan
from fishrt_export.targets.tensorrt.build import build_plan
from helpers_trt import SPEC, STATELESS, Simulated, profiles, request_for, simulated, write_double, write_small


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Simulated]:
    with simulated(tmp_path / "cache", monkeypatch) as there:
        yield there


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write_small(tmp_path / "bundle")


def engines(path: Path, **changes: Any) -> tuple[TrtEngine, Engine]:
    """Return engines of the same graph on TensorRT and on the CPU."""
    spec = request_for(path).spec
    build_plan(request_for(path, **changes))
    made = open_engine(path, spec, provider="tensorrt")
    assert isinstance(made, TrtEngine)
    return made, open_engine(path, spec, provider="cpu")


def feeds(tokens: list[list[int]], at: int) -> dict[str, np.ndarray]:
    return {"tokens": np.array(tokens, np.int64), "write_index": np.full(len(tokens), at, np.int64)}


def speak(engine: Engine, state: Any, tokens: list[int], at: int = 0) -> list[np.ndarray]:
    """Run a prompt of the first three tokens, then the others one by one."""
    totals = [engine.run(feeds([tokens[:3]], at), state)["total"].copy()]
    for n, token in enumerate(tokens[3:], at + 3):
        totals.append(engine.run(feeds([[token]], n), state)["total"].copy())
    return totals


def test_prefill_and_steps_are_those_of_the_cpu(gpu, small):
    ours, cpu = engines(small)
    states = [engine.new_state(batch=1, cache=9) for engine in (ours, cpu)]
    totals = [speak(engine, state, [3, 1, 4, 1, 5, 9, 2], 2) for engine, state in zip((ours, cpu), states, strict=True)]
    np.testing.assert_allclose(*totals, rtol=1e-6)
    for name in ("key_cache.0", "columns.0"):
        np.testing.assert_allclose(*(state.read(name) for state in states), rtol=1e-6)
        assert states[0].read(name).any()
    assert ours.provider == "tensorrt"


def test_the_step_is_captured_after_one_plain_run_for_each_half_of_the_state(gpu, small):
    ours, _ = engines(small)
    state = ours.new_state(batch=1, cache=9)
    counts = []
    for at, token in enumerate([3, 1, 4, 1, 5]):
        ours.run(feeds([[token]], at), state)
        counts.append((gpu.cuda.captures, gpu.cuda.launches))
    assert counts == [(0, 0), (1, 1), (2, 2), (2, 3), (2, 4)]  # `columns` alternates: two sets of addresses


def test_prompts_between_steps_do_not_void_the_captured_step(gpu, small):
    ours, cpu = engines(small)
    states = [engine.new_state(batch=1, cache=12) for engine in (ours, cpu)]
    for engine, state in zip((ours, cpu), states, strict=True):
        speak(engine, state, [3, 1, 4, 1, 5, 9])
        engine.run(feeds([[2, 6]], 6), state)
    captures = gpu.cuda.captures
    pairs = zip((ours, cpu), states, strict=True)
    totals = [[engine.run(feeds([[5]], at), state)["total"].copy() for at in (8, 9, 10)] for engine, state in pairs]
    np.testing.assert_allclose(*totals, rtol=1e-6)
    assert gpu.cuda.captures == captures > 0


def test_a_constant_is_copied_to_the_device_once(gpu, small):
    ours, cpu = engines(small)
    states = [engine.new_state(batch=1, cache=9) for engine in (ours, cpu)]
    two, five = (np.array([[token]]) for token in (2, 5))
    two.flags.writeable = False
    uploads = []
    for at, tokens in enumerate((two, two, five, two, two)):
        before = gpu.cuda.uploads
        given = {"tokens": tokens, "write_index": np.array([at])}
        np.testing.assert_allclose(*(e.run(given, s)["total"] for e, s in zip((ours, cpu), states, strict=True)), rtol=1e-6)
        uploads.append(gpu.cuda.uploads - before)
    assert uploads == [2, 1, 2, 2, 1]


def test_states_are_used_whole(gpu, small):
    ours, cpu = engines(small, profiles=profiles(batch=2))
    one, two = ours.new_state(batch=1, cache=12), ours.new_state(batch=2, cache=12)
    assert one.row(0) is one.rows(1) is one
    assert two.rows(2) is two
    for refused in (lambda: two.row(0), lambda: two.row(1), lambda: two.rows(1)):
        with pytest.raises(ValueError, match="cannot be parted into rows"):
            refused()
    totals = []
    for engine in (ours, cpu):
        source, kept = engine.new_state(batch=1, cache=12), engine.new_state(batch=1, cache=2)
        engine.run(feeds([[3, 4, 5]], 0), source)
        kept.copy_rows(source, 0, 2)
        np.testing.assert_array_equal(kept.read("key_cache.0"), source.read("key_cache.0")[:, :, :2])
        totals.append(engine.run(feeds([[6]], 1), kept)["total"].copy())
    np.testing.assert_allclose(*totals, rtol=1e-6)


def test_states_do_not_disturb_each_other(gpu, small):
    """States share contexts but not captured graphs; another batch changes the shapes of a context, which ends its captures."""
    ours, cpu = engines(small, profiles=profiles(batch=2))
    captures = []

    def totals(engine: Engine) -> list[np.ndarray]:
        one, two = engine.new_state(batch=1, cache=12), engine.new_state(batch=2, cache=12)
        found = []
        for at in range(12):
            found.append(engine.run(feeds([[at + 1]], at), one)["total"].copy())
            if at in (5, 8):
                found.append(engine.run(feeds([[2], [at]], at), two)["total"].copy())
            captures.append(gpu.cuda.captures)
        return found

    for mine, theirs in zip(totals(ours), totals(cpu), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-6)
    # Twice two graphs, and again after every change of the batch, after a run without capture.
    assert captures[:12] == [0, 1, 2, 2, 2, 2, 2, 3, 4, 4, 5, 6]


def test_a_state_is_read_written_and_grown(gpu, small):
    ours, cpu = engines(small)
    rng = np.random.default_rng(1)
    keys = rng.normal(size=(1, 1, 3, 4)).astype(np.float32)
    totals = []
    for engine in (ours, cpu):
        state = engine.new_state(batch=1, cache=4)
        state.write("key_cache.0", keys)
        assert state.read("key_cache.0").shape == (1, 1, 4, 4)
        np.testing.assert_array_equal(state.read("key_cache.0")[:, :, :3], keys)
        state.grow(cache=8)
        assert state.dims == {"batch": 1, "cache": 8}
        np.testing.assert_array_equal(state.read("key_cache.0")[:, :, :3], keys)
        assert not state.read("key_cache.0")[:, :, 3:].any()
        totals.append(np.stack(speak(engine, state, [3, 1, 4, 1, 5], 3)))
    np.testing.assert_allclose(*totals, rtol=1e-6)


def test_more_rows_than_the_plan_has_are_refused(gpu, small):
    ours, _ = engines(small, max_len=10)
    with pytest.raises(FishrtError, match="too small: cache of 11, built for 10") as refused:
        ours.new_state(batch=1, cache=11)
    assert "a plan for more positions" in (refused.value.hint or "")
    state = ours.new_state(batch=1, cache=4)
    ours.run(feeds([[1, 2]], 0), state)
    with pytest.raises(FishrtError, match="cache of 20, built for 10"):
        state.grow(cache=20)
    assert state.dims == {"batch": 1, "cache": 4}
    state.grow(cache=10)
    with pytest.raises(FishrtError, match="batch of 2, built for 1"):
        ours.new_state(batch=2, cache=4)
    assert dict(ours.limits) == {"batch": 1, "length": 8, "cache": 10}


def test_of_plans_of_several_lengths_a_state_takes_the_shortest(gpu, small):
    """It moves to a longer one as it grows, and for a prompt that is too long for the shorter."""
    build_plan(request_for(small, max_len=8, profiles=profiles(longest=4)))
    ours, cpu = engines(small, max_len=16, profiles=profiles(longest=8))
    assert dict(ours.limits) == {"batch": 1, "length": 8, "cache": 16}
    states, totals = [engine.new_state(batch=1, cache=6) for engine in (ours, cpu)], ([], [])

    def run(tokens: list[int], at: int) -> int:
        for engine, state, found in zip((ours, cpu), states, totals, strict=True):
            found.append(engine.run(feeds([tokens], at), state)["total"].copy())
        return states[0].loaded.plan.key.lowering.max_len

    assert [run([3, 1, 4], 0), *(run([n], n) for n in (3, 4, 5))] == [8] * 4
    for state in states:
        state.grow(cache=12)
    assert [run([n], n) for n in (6, 7, 8)] == [16] * 3
    other = [engine.new_state(batch=1, cache=8) for engine in (ours, cpu)]
    states[:] = other
    assert [run([1], 0), run([2, 3, 4, 5, 6], 1), run([7], 6)] == [8, 16, 16]
    np.testing.assert_allclose(*totals, rtol=1e-6)
    np.testing.assert_allclose(*(state.read("key_cache.0") for state in states), rtol=1e-6)


def test_a_shorter_plan_that_would_leave_too_little_memory_is_not_loaded(gpu, small):
    build_plan(request_for(small, max_len=8))
    build_plan(request_for(small, max_len=16))
    gpu.cuda.reserved = gpu.cuda.total * 3 // 4
    ours = open_plan(small, SPEC)
    assert ours.new_state(batch=1, cache=4).loaded.plan.key.lowering.max_len == 16


def test_columns_beyond_the_cache_are_refused_before_anything_is_written(gpu, small):
    ours, _ = engines(small)
    state = ours.new_state(batch=1, cache=4)
    for tokens, at in (([[1, 2]], 3), ([[1]], 4), ([[1]], -1)):
        with pytest.raises(ValueError, match="do not fit into a cache of 4 rows"):
            ours.run(feeds(tokens, at), state)
    assert not state.read("key_cache.0").any()


def test_shapes_outside_of_the_profiles_are_refused(gpu, small):
    ours, _ = engines(small)
    state = ours.new_state(batch=1, cache=12)
    with pytest.raises(FishrtError, match=r"length of 2 to 8; or batch of 1 to 1, length of 1 to 1; this call has .*length of 9"):
        ours.run(feeds([[1] * 9], 0), state)


def test_wrong_feeds_and_states_are_refused(gpu, small):
    ours, cpu = engines(small)
    state = ours.new_state(batch=1, cache=4)
    with pytest.raises(ValueError, match="feeds are tokens;"):
        ours.run({"tokens": np.zeros((1, 1), np.int64)}, state)
    with pytest.raises(ValueError, match="tokens is int32"):
        ours.run({**feeds([[1]], 0), "tokens": np.zeros((1, 1), np.int32)}, state)
    with pytest.raises(ValueError, match="own new_state"):
        ours.run(feeds([[1]], 0), cpu.new_state(batch=1, cache=4))
    with pytest.raises(ValueError, match=r"tokens of small\.onnx must be arrays"):
        ours.run({**feeds([[1]], 0), "tokens": "abc"}, state)
    with pytest.raises(ValueError, match="nothing cannot stay"):
        ours.run(feeds([[1]], 0), state, ["nothing"])
    with pytest.raises(ValueError, match="state dimensions"):
        ours.new_state(cache=4)
    with pytest.raises(ValueError, match="cannot become cache = 2"):
        state.grow(cache=2)
    with pytest.raises(ValueError, match="does not fit into it"):
        state.write("key_cache.0", np.zeros((1, 1, 5, 4), np.float32))


def test_results_stay_on_the_device_and_are_fed_to_another_graph(gpu, small, tmp_path):
    ours, cpu = engines(small)
    double, _ = engines(write_double(tmp_path / "other"))
    state, expected = ours.new_state(batch=1, cache=12), cpu.new_state(batch=1, cache=12)
    kept = []
    for at in range(6):
        results = ours.run(feeds([[at + 1]], at), state, resident=["total"])
        assert results["total"].shape == (1, 4)
        assert results["total"].dtype == np.float32
        kept.append(double.run({"x": results["total"]})["y"])
        want = cpu.run(feeds([[at + 1]], at), expected)["total"]
        np.testing.assert_allclose(kept[-1], 2 * want, rtol=1e-6)
        np.testing.assert_allclose(results["total"].numpy(), want, rtol=1e-6)
    assert len({array.tobytes() for array in kept}) == 6  # a graph without state returns new arrays


def test_residents_of_a_graph_without_state_are_their_own(gpu, tmp_path):
    double, _ = engines(write_double(tmp_path / "other"))
    first, second = (double.run({"x": np.full((1, 4), n, np.float32)}, resident=["y"])["y"] for n in (1, 2))
    assert (first.numpy()[0, 0], second.numpy()[0, 0]) == (2, 4)
    with pytest.raises(ValueError, match="carries no state"):
        double.run({"x": first}, object())


def test_feeds_may_change_as_soon_as_a_run_returns(gpu, small):
    """Also without synchronisation: copies of the previous run may be unfinished."""
    ours, cpu = engines(small)
    states = [engine.new_state(batch=1, cache=12) for engine in (ours, cpu)]
    fed = feeds([[0]], 0)
    for at in range(5):
        fed["tokens"][0, 0], fed["write_index"][0] = at + 1, at
        ours.run(fed, states[0], resident=["total", "each"])
        cpu.run(fed, states[1])
    np.testing.assert_allclose(*(state.read("key_cache.0") for state in states), rtol=1e-6)


def test_without_captures_it_runs_all_the_same_and_says_so_once(gpu, small, caplog):
    ours, cpu = engines(small)
    gpu.cuda.refuse_capture = True
    totals = [speak(engine, engine.new_state(batch=1, cache=9), [3, 1, 4, 1, 5, 9, 2]) for engine in (ours, cpu)]
    np.testing.assert_allclose(*totals, rtol=1e-6)
    assert [record.message for record in caplog.records if "without a CUDA graph" in record.message] != []
    assert sum("without a CUDA graph" in record.message for record in caplog.records) == 1
    assert gpu.cuda.launches == 0


def test_float16_keeps_caches_in_half_the_memory(gpu, small):
    ours, cpu = engines(small, precision="fp16")
    states = [engine.new_state(batch=1, cache=9) for engine in (ours, cpu)]
    totals = [speak(engine, state, [3, 1, 4, 1, 5], 2) for engine, state in zip((ours, cpu), states, strict=True)]
    np.testing.assert_allclose(*totals, atol=0.02)
    read = states[0].read("key_cache.0")
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, read.astype(np.float16))
    values = np.random.default_rng(1).normal(size=(1, 1, 2, 4)).astype(np.float32)
    states[0].write("key_cache.0", values)
    np.testing.assert_array_equal(states[0].read("key_cache.0")[:, :, :2], values.astype(np.float16))


@pytest.mark.parametrize("call", ["execute_async_v3", "set_tensor_address"])
def test_what_tensorrt_says_is_told(gpu, small, call):
    ours, _ = engines(small)
    state = ours.new_state(batch=1, cache=4)
    gpu.trt.faults[call] = "the device is on fire"
    with pytest.raises(GraphError, match="the device is on fire"):
        ours.run(feeds([[1]], 0), state)


@pytest.mark.parametrize(
    "call", ["Runtime", "deserialize_cuda_engine", "create_execution_context", "set_optimization_profile_async"]
)
def test_a_plan_that_cannot_be_loaded_is_an_error(gpu, small, call):
    build_plan(request_for(small))
    gpu.trt.faults[call] = "no"
    with pytest.raises(GraphError, match=r"TensorRT .* failed: no"):
        open_plan(small, SPEC)


def test_a_plan_of_other_tensors_is_refused(gpu, small, tmp_path):
    """The plan is compared with its description, and its description with the bundle's."""
    build_plan(request_for(small))
    other = replace(SPEC, inputs=SPEC.inputs[::-1])
    with pytest.raises(GraphError, match="its tensors are not those of the bundle"):
        open_plan(small, other)
    assert STATELESS.states == ()


def test_memory_is_looked_at_before_it_is_taken(gpu, small):
    ours, _ = engines(small)
    gpu.cuda.reserved += gpu.cuda.free - 100
    with pytest.raises(
        FishrtError, match=r"the state of small.onnx needs about 0.00 GB of device memory; 0.00 of 8.59 GB are free"
    ):
        ours.new_state(batch=1, cache=4)
    with pytest.raises(FishrtError, match=r"the plan of small\.onnx needs about"):
        open_plan(small, SPEC)


def test_the_whole_of_a_state_is_looked_at(gpu, small):
    """The check precedes the allocation of the first tensor."""
    ours, _ = engines(small, max_len=1_000_000)
    gpu.cuda.reserved += gpu.cuda.free - 16_000_010
    with pytest.raises(FishrtError, match=r"the state of small\.onnx needs about 0\.02 GB"):
        ours.new_state(batch=1, cache=4)


def test_buffers_are_freed_with_what_owns_them(gpu, small):
    ours, _ = engines(small)
    free = gpu.cuda.free
    state = ours.new_state(batch=1, cache=4)
    for at in range(4):
        ours.run(feeds([[1]], at), state)
    assert gpu.cuda.free < free
    del state
    assert gpu.cuda.free == free


def test_a_broken_device_is_an_error(gpu, small):
    ours, _ = engines(small)
    device = open_device()
    device.copy(1, 2, 3)
    with pytest.raises(FishrtError, match="cudaErrorIllegalAddress"):
        device.synchronize()
    assert ours.spec is SPEC
