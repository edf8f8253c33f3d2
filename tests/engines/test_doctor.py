"""`fishrt doctor` on machines of several kinds, which are simulated; see fake_machine."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import onnxruntime
import pytest
from click.testing import CliRunner

from fake_machine import FakeMachine
from fishrt.cli import main
from fishrt_engines.doctor import examine
from fishrt_engines.machine import default_threads


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeMachine:
    monkeypatch.setenv("FISHRT_CACHE", str(tmp_path / "cache"))
    return FakeMachine(monkeypatch, tmp_path / "site-packages")


def text() -> str:
    return "\n".join(examine().lines())


def test_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FISHRT_CACHE", str(tmp_path))
    told = text()
    assert "provider cpu: ready" in told
    assert onnxruntime.__version__ in told
    assert f"cores: {default_threads()} used by default" in told
    assert f"cache: {tmp_path} can be written to" in told


def test_a_machine_without_devices(fake: FakeMachine) -> None:
    told = text()
    assert "nvidia driver: none (libcuda.so.1: no such file)" in told
    assert "nvidia device" not in told
    assert "libcudnn" not in told
    assert "tensorrt: no binding, no library (No module named 'tensorrt')" in told
    assert 'provider tensorrt: tensorrt is not installed; pip install "fishrt[trt]"' in told
    assert "provider coreml: it exists only on macOS" in told
    assert "provider auto: cpu (no cuda here: the installed ONNX Runtime" in told
    assert "provider auto: never tensorrt, since its plans must be built first" in told
    assert "provider auto: never coreml" in told


def test_devices_without_a_driver(fake: FakeMachine) -> None:
    fake.gpu(driver=False)
    told = text()
    assert "provider cuda: NVIDIA's driver cannot be loaded" in told
    assert "libcudnn.so.9: loads" in told
    assert "provider auto: cpu" in told


def test_a_wheel_for_devices_without_cudnn(fake: FakeMachine) -> None:
    fake.gpu(lacking=("libcudnn.so.9", "libcurand.so.10"))
    told = text()
    assert "nvidia device: NVIDIA H200, compute capability 9.0, driver 580.65.06, 139.6 GiB of 140.4 GiB free" in told
    assert "libcudart.so.13: loads" in told
    assert "libcudnn.so.9: cannot be loaded (libcudnn.so.9: no such file)" in told
    assert "provider cuda: the CUDA provider needs libcurand.so.10, libcudnn.so.9" in told
    assert 'pip install "onnxruntime-gpu[cuda,cudnn]"' in told


def test_a_machine_with_everything(fake: FakeMachine) -> None:
    fake.gpu()
    fake.tensorrt()
    fake.wheels |= {"tensorrt-cu13": Path("elsewhere")}
    told = text()
    assert "provider cuda: ready" in told
    assert "provider tensorrt: ready" in told
    assert "tensorrt: binding 1.31.1, library 11.4.0.106" in told
    assert "provider auto: cuda (ONNX Runtime has its CUDA provider" in told


def test_both_wheels(fake: FakeMachine, tmp_path: Path) -> None:
    fake.gpu()
    fake.wheels = {"onnxruntime": tmp_path, "onnxruntime-gpu": tmp_path}
    told = text()
    assert "provider cpu: onnxruntime and onnxruntime-gpu are installed into one folder" in told
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in told
    assert "provider auto: none" in told


def test_a_mac(fake: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    fake.onnxruntime("CoreMLExecutionProvider", "CPUExecutionProvider")
    told = text()
    assert "provider coreml: ready" in told
    assert "provider cuda: it exists only on Linux and Windows" in told
    assert "provider auto: cpu" in told


def test_a_cache_that_cannot_be_written_to(fake: FakeMachine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FISHRT_CACHE", str(tmp_path / "file" / "cache"))
    assert f"cache: {tmp_path}/file/cache cannot be written to (Not a directory)" in text()


def test_json_holds_the_same(fake: FakeMachine) -> None:
    fake.gpu()
    done = CliRunner().invoke(main, ["doctor", "--json"])
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    assert data["ok"]
    assert data["gpus"][0]["compute_capability"] == [9, 0]
    expected = json.loads(json.dumps(asdict(examine())))
    for figure in ("providers", "auto", "gpus", "cuda_libraries", "cache", "driver_error"):
        assert data[figure] == expected[figure]


def test_what_it_tells_of_privacy(fake: FakeMachine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "graph").write_bytes(bytes(3_000_000))
    monkeypatch.setenv("FISHRT_VOICE_DIR", str(tmp_path / "voices"))
    told = CliRunner().invoke(main, ["doctor"]).stdout
    assert f"cache: {tmp_path}/cache can be written to; it holds 3 MB, of graphs 20 GB at most (FISHRT_CACHE_GB)\n" in told
    assert f"voices: {tmp_path}/voices\n" in told
    assert "telemetry: off\n" in told
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "0")
    assert "telemetry: on, by ORT_DISABLE_TELEMETRY" in text()
    data = json.loads(CliRunner().invoke(main, ["doctor", "--json"]).stdout)
    assert data["telemetry"] is True
    assert data["cache"] == {"folder": str(tmp_path / "cache"), "bytes": 3_000_000, "limit_bytes": 20_000_000_000, "error": None}
