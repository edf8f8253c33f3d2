"""Sessions on a simulated CUDA device: options, captures, and errors."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper
from test_engine import SUMS, WIDTH, feeds, sums
from test_ort_device import DOUBLE, double

from fake_cuda import GB, OLD, FakeCuda, FakeSession
from fishrt_engines import FishrtError, GraphError, ProviderError, open_engine
from fishrt_engines.ort import cuda as ort_cuda
from fishrt_engines.ort.tensors import DeviceTensor
from fishrt_engines.providers import Obstacle


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda(monkeypatch)


def test_the_provider_is_told_all_that_matters(cuda: FakeCuda, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = open_engine(sums(tmp_path), SUMS, provider="cuda")
    (session,) = cuda.graphs
    assert session.providers == {
        "CUDAExecutionProvider": {
            "arena_extend_strategy": "kSameAsRequested",
            "cudnn_conv_algo_search": "HEURISTIC",
            "do_copy_in_default_stream": "1",
            "use_tf32": "1",
            "sdpa_kernel": "19",
            "enable_cuda_graph": "0",
        },
        "CPUExecutionProvider": {},
    }
    assert (session.asked_for, session.falls_back) == ({"enable_fallback": 0}, False)
    assert engine.provider == "cuda"
    assert cuda.preloaded == 1
    assert capsys.readouterr().out == "", "audio may be written to standard output"


def test_a_graph_of_standard_operators_is_run_node_by_node(cuda: FakeCuda, tmp_path: Path) -> None:
    engine = open_engine(sums(tmp_path), SUMS, provider="cuda")
    state = engine.new_state(batch=1, cache=4)
    engine.run(feeds([1, 2], 0), state)
    state.grow(cache=9)
    assert engine.run(feeds([4], 2), state)["total"].tolist() == [[7.0] * WIDTH]
    assert cuda.graphs[0].runs == [None, None]
    assert cuda.graphs[0].model == (tmp_path / SUMS.file).read_bytes()


def test_a_graph_of_which_only_the_batch_is_open_is_captured_in_every_call(cuda: FakeCuda, tmp_path: Path) -> None:
    """It has no state, and one plan for all callers of the same shapes, who may leave their results on the device."""
    engine = open_engine(double(tmp_path), DOUBLE, provider="cuda")
    for value in (1, 2, 3):
        total = np.full((1, WIDTH), value, np.float32)
        twice = engine.run({"total": total}, resident=["twice"])["twice"]
        assert isinstance(twice, DeviceTensor)
        assert engine.run({"total": twice})["twice"].tolist() == [[4.0 * value] * WIDTH]
    engine.run({"total": np.ones((2, WIDTH), np.float32)})
    assert cuda.graphs[0].runs == [1] * 6 + [2]


REFUSED = "This session cannot use the graph capture feature as requested by the user as the model has control flow nodes"


def test_a_graph_that_cannot_be_captured_is_run_and_said_to_be_slower(
    cuda: FakeCuda, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cuda.refuses_capture = REFUSED
    engine = open_engine(double(tmp_path), DOUBLE, provider="cuda")
    assert engine.run({"total": np.ones((1, WIDTH), np.float32)})["twice"].tolist() == [[2.0] * WIDTH]
    assert cuda.graphs[-1].providers["CUDAExecutionProvider"]["enable_cuda_graph"] == "0"
    assert "double.onnx runs node by node, which is slower" in caplog.text
    assert "control flow" in caplog.text


def test_a_capture_that_fails_is_tried_once_more(cuda: FakeCuda, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cuda.fails_capture = "Graph capture did not complete after 3 runs"
    engine = open_engine(double(tmp_path), DOUBLE, provider="cuda")
    for rows in (1, 1, 2):
        assert engine.run({"total": np.ones((rows, WIDTH), np.float32)})["twice"].tolist() == [[2.0] * WIDTH] * rows
    assert cuda.graphs[0].runs == [1, 2, -1, -1, -1]
    assert caplog.text.count("it cannot be captured (Graph capture did not complete after 3 runs)") == 1


def test_a_second_attempt_may_succeed(cuda: FakeCuda, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = open_engine(double(tmp_path), DOUBLE, provider="cuda")
    cuda.fails_capture, cuda.failures = "an allocation of another thread", 1
    for _ in range(2):
        assert engine.run({"total": np.ones((1, WIDTH), np.float32)})["twice"].tolist() == [[2.0] * WIDTH]
    assert cuda.graphs[0].runs == [1, 2, 2]
    assert not caplog.records


def test_all_sessions_of_a_device_share_one_lock(cuda: FakeCuda, tmp_path: Path) -> None:
    """A capture breaks if another thread allocates, whichever session it runs."""
    one, other = (open_engine(make(tmp_path), spec, provider="cuda") for make, spec in ((double, DOUBLE), (sums, SUMS)))
    with one._memory.lock:
        waiting = Thread(target=other.new_state, kwargs={"batch": 1, "cache": 4})
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive()
    waiting.join()


def test_memory_that_lacks_in_a_capture_is_not_taken_for_a_refused_one(cuda: FakeCuda, tmp_path: Path) -> None:
    engine = open_engine(double(tmp_path), DOUBLE, provider="cuda")
    cuda.fails_capture = "CUDA failure 2: out of memory"
    with pytest.raises(FishrtError, match=r"not enough memory .*double\.onnx"):
        engine.run({"total": np.ones((1, WIDTH), np.float32)})
    cuda.fails_capture = None
    engine.run({"total": np.ones((1, WIDTH), np.float32)})
    assert -1 not in cuda.graphs[0].runs


def test_another_failure_of_a_session_is_not_taken_for_a_refused_capture(cuda: FakeCuda, tmp_path: Path) -> None:
    cuda.refuses_capture = "NOT_IMPLEMENTED : Could not find an implementation for Twice(1) node with name 'n'"
    with pytest.raises(GraphError, match=r"double\.onnx cannot be loaded: NOT_IMPLEMENTED .* node with name 'n'"):
        open_engine(double(tmp_path), DOUBLE, provider="cuda")


@pytest.mark.parametrize("known", [True, False])
def test_a_session_that_starts_without_the_device_is_an_error(
    cuda: FakeCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    """ONNX Runtime itself only logs a line and uses the CPU."""
    cuda.starts = False
    if known:
        monkeypatch.setattr(ort_cuda, "find_obstacle", lambda name: Obstacle("libcublas.so.13 is missing", "install it"))
    with pytest.raises(ProviderError, match=r"could not start its CUDA provider for sums\.onnx: ") as caught:
        open_engine(sums(tmp_path), SUMS, provider="cuda")
    assert ("libcublas.so.13 is missing" in str(caught.value)) == known
    assert caught.value.hint == ("install it" if known else None)


def test_weights_that_do_not_fit_are_refused_before_loading(cuda: FakeCuda, tmp_path: Path) -> None:
    cuda.devices = (replace(OLD, free_bytes=3 * GB // 4),)
    with pytest.raises(FishrtError) as caught:
        open_engine(sums(tmp_path), SUMS, provider="cuda")
    assert str(caught.value) == (
        "sums.onnx needs about 1.0 GB of the device's memory, 0.0 GB of it for weights; an old device has 0.8 GB of 8.0 GB free"
    )
    assert "nvidia-smi" in (caught.value.hint or "")
    assert not cuda.sessions


def test_the_files_of_weights_are_counted(tmp_path: Path) -> None:
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xy"]
    model = helper.make_model(helper.make_graph([helper.make_node("Abs", ["x"], ["y"])], "g", tensors[:1], tensors[1:]))
    for name, file in (("v", "a.data"), ("w", "b.data"), ("x", "b.data")):
        weight = model.graph.initializer.add(name=name, dims=[4], data_type=TensorProto.INT8, data_location=TensorProto.EXTERNAL)
        weight.external_data.add(key="location", value=file)
    for file, size in (("a.data", GB), ("b.data", 3 * GB)):
        with (tmp_path / file).open("wb") as weights:
            weights.truncate(size)
    path = tmp_path / "g.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(FishrtError, match=r"4\.0 GB of it for weights"):
        ort_cuda._check_room(path, replace(OLD, free_bytes=0))
    ort_cuda._check_room(path, replace(OLD, free_bytes=10 * GB))


def test_where_nothing_tells_of_memory_it_is_said(cuda: FakeCuda, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cuda.devices = None
    with caplog.at_level(logging.INFO, "fishrt_engines"):
        open_engine(sums(tmp_path), SUMS, provider="cuda")
    assert "the free memory of the device is unknown" in caplog.text


@pytest.mark.parametrize(
    "says",
    ["Available memory of 5 is smaller than requested bytes of 9", "CUDA failure 2: out of memory", "Failed to allocate memory"],
)
def test_a_state_beyond_the_devices_memory_is_an_error_for_users(cuda: FakeCuda, tmp_path: Path, says: str) -> None:
    engine = open_engine(sums(tmp_path), SUMS, provider="cuda")
    cuda.allocation_error = RuntimeError(says)
    text = r"not enough memory of the device for the state of sums\.onnx at batch = 1, cache = 1000000 \(12 MB\)"
    with pytest.raises(FishrtError, match=text) as caught:
        engine.new_state(batch=1, cache=1_000_000)
    assert "a device with more memory" in (caught.value.hint or "")


def test_nodes_on_the_cpu_are_told(
    cuda: FakeCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    listed = ["Shape", "Gather"]
    monkeypatch.setattr(FakeSession, "get_provider_graph_assignment_info", assignments(lambda: listed))
    open_engine(sums(tmp_path), SUMS, provider="cuda")
    assert not caplog.text
    listed += ["Sin", "CumSum", "Sin"]
    open_engine(sums(tmp_path), SUMS, provider="cuda")
    assert "sums.onnx: ONNX Runtime has no CUDA kernel for some nodes and runs them on the CPU: 1 CumSum, 2 Sin" in caplog.text


def assignments(operators: Callable[[], list[str]]) -> Callable[[FakeSession], list[Any]]:
    def told(session: FakeSession) -> list[Any]:
        session.cpu_nodes = operators()
        return plain(session)

    plain = FakeSession.get_provider_graph_assignment_info
    return told
