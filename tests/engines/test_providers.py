"""The choice of providers, their obstacles, and the facts about devices. Machines are simulated; see fake_machine."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from uuid import UUID

import pytest

from fake_machine import UUIDS, FakeDriver, FakeMachine
from fishrt_engines import ProviderError, machine
from fishrt_engines.machine import Gpu
from fishrt_engines.providers import PROVIDERS, choose_provider, import_onnxruntime, resolve_provider


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeMachine:
    return FakeMachine(monkeypatch, tmp_path / "site-packages")


def refusal(name: str) -> tuple[str, str]:
    """Return message and hint of the error."""
    with pytest.raises(ProviderError) as caught:
        resolve_provider(name)
    return str(caught.value), caught.value.hint or ""


def test_an_unknown_provider_is_refused_with_the_known_ones(fake: FakeMachine) -> None:
    assert refusal("gpu") == ("unknown provider 'gpu'", "known providers: auto, cpu, cuda, tensorrt, coreml")


@pytest.mark.parametrize("name", ["cuda", "tensorrt"])
def test_nvidia_is_not_looked_for_on_macos(fake: FakeMachine, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    fake.gpu()
    fake.tensorrt()
    assert resolve_provider(name) == name
    monkeypatch.setattr("fishrt_engines.providers._usable", set())
    monkeypatch.setattr("sys.platform", "darwin")
    assert "exists only on Linux and Windows" in refusal(name)[0]


def test_coreml_is_of_macos_only(fake: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.onnxruntime("CoreMLExecutionProvider", "CPUExecutionProvider")
    assert "exists only on macOS" in refusal("coreml")[0]
    monkeypatch.setattr("sys.platform", "darwin")
    assert resolve_provider("coreml") == "coreml"
    assert choose_provider().name == "cpu"


def test_cuda_without_its_wheel_names_the_extra(fake: FakeMachine) -> None:
    message, hint = refusal("cuda")
    assert "no CUDAExecutionProvider" in message
    assert hint == 'pip uninstall -y onnxruntime, then pip install "fishrt[cuda]"'
    fake.wheels = {}
    assert refusal("cuda")[1] == 'pip install "fishrt[cuda]"'


def test_cuda_without_a_driver(fake: FakeMachine) -> None:
    fake.gpu(driver=False)
    message, hint = refusal("cuda")
    assert "NVIDIA's driver cannot be loaded (libcuda.so.1: no such file)" in message
    assert "install the driver" in hint
    assert choose_provider().name == "cpu"
    assert "driver cannot be loaded" in choose_provider().reason


def test_cuda_without_a_device(fake: FakeMachine) -> None:
    fake.gpu()
    fake.driver = FakeDriver()
    assert "shows no device" in refusal("cuda")[0]


def test_cuda_without_cudnn(fake: FakeMachine, capsys: pytest.CaptureFixture[str]) -> None:
    fake.gpu(lacking=("libcudnn.so.9",))
    message, hint = refusal("cuda")
    assert "needs libcudnn.so.9, which cannot be loaded (libcudnn.so.9: no such file)" in message
    assert hint == 'pip install "onnxruntime-gpu[cuda,cudnn]"'
    assert capsys.readouterr().out == ""
    assert choose_provider().name == "cpu"


def test_cuda_is_chosen_where_all_is_there_and_nothing_else_ever(fake: FakeMachine, caplog: pytest.LogCaptureFixture) -> None:
    fake.gpu()
    fake.tensorrt()
    fake.onnxruntime("CoreMLExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider", cuda="13.0")
    with caplog.at_level(logging.INFO, "fishrt_engines"):
        assert resolve_provider("auto") == "cuda"
    assert 'provider "auto" chose "cuda" (ONNX Runtime has its CUDA provider' in caplog.text
    assert resolve_provider("cuda") == "cuda"
    assert resolve_provider("tensorrt") == "tensorrt"


def test_a_driver_of_which_nothing_tells_more_is_believed(fake: FakeMachine) -> None:
    fake.gpu()
    fake.smi = None
    assert machine.gpus() is None
    assert resolve_provider("cuda") == "cuda"


def test_auto_says_why_it_is_the_cpu(fake: FakeMachine, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "fishrt_engines"):
        assert resolve_provider("auto") == "cpu"
    assert 'provider "auto" chose "cpu" (no cuda here: the installed ONNX Runtime' in caplog.text


@pytest.mark.parametrize("name", ["auto", "cpu", "cuda"])
def test_two_wheels_over_each_other_are_refused(fake: FakeMachine, tmp_path: Path, name: str) -> None:
    fake.gpu()
    fake.wheels = {"onnxruntime": tmp_path, "onnxruntime-gpu": tmp_path}
    message, hint = refusal(name)
    assert "onnxruntime and onnxruntime-gpu are installed into one folder" in message
    assert hint.startswith("pip uninstall -y onnxruntime onnxruntime-gpu, and then ")
    assert 'pip install "fishrt[cuda]"' in hint
    with pytest.raises(ProviderError, match="into one folder"):
        import_onnxruntime()
    fake.wheels["onnxruntime-gpu"] = tmp_path / "own"
    assert resolve_provider("cuda") == "cuda"


@pytest.mark.parametrize(("name", "extra"), [("auto", "cpu"), ("cpu", "cpu"), ("cuda", "cuda")])
def test_a_missing_onnxruntime_names_its_extra(fake: FakeMachine, monkeypatch: pytest.MonkeyPatch, name: str, extra: str) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    message, hint = refusal(name)
    assert "ONNX Runtime cannot be loaded" in message
    assert hint == f'pip install "fishrt[{extra}]"'


def test_tensorrt_tells_what_is_missing(fake: FakeMachine) -> None:
    fake.gpu()
    assert refusal("tensorrt") == ("provider 'tensorrt' cannot be used: tensorrt is not installed", 'pip install "fishrt[trt]"')
    fake.tensorrt("10.16.1")
    assert "TensorRT 10.16.1 is too old; 11 is needed" in refusal("tensorrt")[0]
    fake.tensorrt()
    fake.modules["tensorrt"] = ImportError("libnvinfer.so.11: cannot open shared object file")
    assert "tensorrt cannot be loaded: libnvinfer.so.11" in refusal("tensorrt")[0]
    fake.tensorrt()
    del fake.modules["cuda.bindings.runtime"]
    assert "cuda.bindings.runtime is not installed" in refusal("tensorrt")[0]
    fake.tensorrt()
    fake.libraries.remove("libcuda.so.1")
    assert "driver cannot be loaded" in refusal("tensorrt")[0]


def test_a_usable_provider_is_looked_for_once(fake: FakeMachine) -> None:
    fake.gpu()
    assert resolve_provider("cuda") == "cuda"
    fake.libraries.clear()
    assert resolve_provider("cuda") == "cuda"


def test_extras_are_those_of_the_project() -> None:
    listed = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert all(f"\n{provider.extra} = [" in listed for provider in PROVIDERS.values())


H200 = Gpu("NVIDIA H200", (9, 0), "580.65.06", 143771 << 20, 143000 << 20)
A2000 = Gpu("NVIDIA RTX A2000", (8, 6), "580.65.06", 6138 << 20, 512 << 20)


@pytest.mark.parametrize(
    ("driver", "expected"),
    [
        (FakeDriver(*UUIDS), (H200, A2000)),
        (FakeDriver(*reversed(UUIDS)), (A2000, H200)),
        (FakeDriver(UUIDS[1]), (A2000,)),
        (FakeDriver(), ()),
        (FakeDriver(*UUIDS, code=3), None),
        (FakeDriver(UUIDS[0], UUID(int=5)), None),
        (object(), None),
    ],
    ids=["all", "in another order", "one", "none", "an error", "a part of one, which is not listed", "old"],
)
def test_devices_are_those_that_the_driver_shows(fake: FakeMachine, driver: object, expected: tuple[Gpu, ...] | None) -> None:
    fake.gpu()
    fake.driver = driver
    assert machine.gpus() == expected


@pytest.mark.parametrize(
    "text", [f"GPU-{UUIDS[0]}, GH200, 9.0, 580.1, [N/A], [N/A]", "NVIDIA-SMI has failed", f"GPU-{UUIDS[0]}, x, 9, 1, 2, 3"]
)
def test_what_nvidia_smi_does_not_tell_is_not_known(fake: FakeMachine, text: str) -> None:
    fake.gpu(devices=text)
    assert machine.gpus() is None
    assert machine.device_memory() is None


def test_memory_of_a_device(fake: FakeMachine) -> None:
    fake.gpu()
    assert machine.device_memory(1) == (512 << 20, 6138 << 20)
    assert machine.device_memory(2) is None


def test_devices_that_cuda_bindings_list(fake: FakeMachine) -> None:
    """Without nvidia-smi; the names are those of cuda-bindings 13."""
    fake.gpu()
    fake.smi = None
    used = []
    runtime = SimpleNamespace(
        cudaDriverGetVersion=lambda: (0, 13000),
        cudaGetDeviceCount=lambda: (0, 2),
        cudaGetDeviceProperties=lambda index: (0, SimpleNamespace(name=b"NVIDIA X", major=8, minor=index)),
        cudaSetDevice=lambda index: (used.append(index) or 0,),
        cudaMemGetInfo=lambda: (0, 5, 7),
    )
    fake.modules["cuda.bindings.runtime"] = runtime
    assert machine.gpus() == tuple(Gpu("NVIDIA X", (8, n), "for CUDA 13.0", 7, 5) for n in (0, 1))
    assert used == [0, 1]
    runtime.cudaGetDeviceCount = lambda: (100, 0)
    assert machine.gpus() == ()
    runtime.cudaDriverGetVersion = lambda: (35, 0)
    assert machine.gpus() is None
