"""A simulation of onnxruntime-gpu and one device by ONNX Runtime's CPU provider.

Sessions and tensors for "cuda" are made on the CPU, and the calls are recorded. A run that is captured runs twice at first, as in
ONNX Runtime, so that a graph that is not idempotent gives other results. The simulation checks fishrt's calls, not the behaviour
of ONNX Runtime on a device.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnxruntime
import pytest

from fishrt_engines import machine
from fishrt_engines import open as one_door
from fishrt_engines.machine import Gpu
from fishrt_engines.ort import cuda as ort_cuda
from helpers_graphs import norms_apart

GB = 10**9
OLD = Gpu("an old device", (7, 5), "580.65", 8 * GB, 8 * GB)
"""A device without bfloat16, in which the CPU provider cannot compute either."""


class FakeCuda:
    """The recorded calls, and the simulated answers."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.devices: tuple[Gpu, ...] | None = (OLD,)
        self.starts = True
        """Whether the CUDA provider can be loaded."""
        self.refuses_capture: str | None = None
        self.fails_capture: str | None = None
        self.failures = 100
        """Captures that fail with `fails_capture`."""
        self.sessions: list[FakeSession] = []
        self.preloaded = 0
        self.OrtValue = SimpleNamespace(ortvalue_from_shape_and_type=self._allocate)
        self.allocation_error: Exception | None = None
        ort_cuda.device_memory.cache_clear()
        ort_cuda._preload.cache_clear()
        patch.setattr(machine, "gpus", lambda: self.devices)
        patch.setattr(one_door, "resolve_provider", lambda name: name)
        patch.setattr(ort_cuda, "import_onnxruntime", lambda extra: self)
        patch.setattr(ort_cuda, "find_obstacle", lambda name: None)

    def __getattr__(self, name: str) -> Any:
        return getattr(onnxruntime, name)

    def InferenceSession(self, model: str | bytes, options: Any, *, providers: list[Any], **more: Any) -> FakeSession:  # noqa: N802
        session = FakeSession(
            self, model, options, dict(entry if isinstance(entry, tuple) else (entry, {}) for entry in providers)
        )
        session.asked_for = more
        self.sessions.append(session)
        return session

    def preload_dlls(self) -> None:
        self.preloaded += 1
        print("Failed to load a library that is not needed")

    def _allocate(self, shape: list[int], dtype: Any, device: str, number: int) -> Any:
        if self.allocation_error is not None:
            raise self.allocation_error
        assert (device, number) == ("cuda", 0)
        return onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, dtype, "cpu", 0)

    @property
    def graphs(self) -> list[FakeSession]:
        """Return the sessions of graphs, without those that move and clear memory."""
        return [session for session in self.sessions if session.asked_for]


class FakeSession:
    """A session on the CPU that reports the CUDA provider."""

    def __init__(self, cuda: FakeCuda, model: str | bytes, options: Any, providers: dict[str, dict[str, str]]) -> None:
        self.cuda, self.options, self.providers = cuda, options, providers
        self.model = model if isinstance(model, bytes) else Path(model).read_bytes()
        self.asked_for: dict[str, Any] = {}
        self.captures = providers.get("CUDAExecutionProvider", {}).get("enable_cuda_graph") == "1"
        self.runs: list[int | None] = []
        """The graph id of each run."""
        self.captured: dict[int, FakeBinding] = {}
        self.released: list[int] = []
        self.falls_back = True
        self.cpu_nodes: list[str] = []
        if self.captures and cuda.refuses_capture:
            raise RuntimeError(cuda.refuses_capture)
        self._session = onnxruntime.InferenceSession(norms_apart(self.model), options, providers=["CPUExecutionProvider"])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def get_providers(self) -> list[str]:
        return [*(["CUDAExecutionProvider"] if self.cuda.starts else []), "CPUExecutionProvider"]

    def disable_fallback(self) -> None:
        self.falls_back = False

    def get_provider_graph_assignment_info(self) -> list[Any]:
        nodes = [SimpleNamespace(op_type=name) for name in self.cpu_nodes]
        return [SimpleNamespace(ep_name="CPUExecutionProvider", get_nodes=lambda: nodes)]

    def io_binding(self) -> FakeBinding:
        return FakeBinding(self._session.io_binding())

    def run_with_iobinding(self, binding: FakeBinding, options: Any = None) -> None:
        graph = None if options is None else int(options.get_run_config_entry("gpu_graph_id"))
        assert (graph is None) != self.captures, "a session that captures takes 0 for the id of a run that has none"
        self.runs.append(graph)
        if graph is not None and graph >= 0:
            if self.cuda.fails_capture and self.cuda.failures:
                self.cuda.failures -= 1
                raise RuntimeError(self.cuda.fails_capture)
            assert self.captured.setdefault(graph, binding) is binding, (
                "a captured graph works on the addresses it was captured with"
            )
            if self.runs.count(graph) == 1:
                self._session.run_with_iobinding(binding.binding)
        self._session.run_with_iobinding(binding.binding)

    def release_captured_graph(self, graph: int) -> None:
        """Release nothing, as ONNX Runtime 1.31."""
        self.released.append(graph)


class FakeBinding:
    """A binding to memory of the CPU that stands for the device's; inputs that are read on the CPU are bound unchanged."""

    def __init__(self, binding: Any) -> None:
        self.binding = binding
        self.on_cpu: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.binding, name)

    def bind_input(self, name: str, device: str, *place: Any) -> None:
        if device == "cpu":
            self.on_cpu.add(name)
        self.binding.bind_input(name, "cpu", *place)

    def bind_output(self, name: str, device: str = "cpu", *place: Any) -> None:
        self.binding.bind_output(name, "cpu", *place)
