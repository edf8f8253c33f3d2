"""A simulated machine: its system, ONNX Runtime build, driver, devices, libraries and installed wheels.

It shows how fishrt treats such a machine, not that one behaves so.
"""

# ruff: noqa: N802 - the names are CUDA's
from __future__ import annotations

import importlib
import subprocess
import sys
import uuid
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fishrt_engines import providers

UUIDS = (uuid.UUID(int=0xA << 124 | 1), uuid.UUID(int=0xB << 124 | 2))
SMI = f"""GPU-{UUIDS[0]}, NVIDIA H200, 9.0, 580.65.06, 143771, 143000
GPU-{UUIDS[1]}, NVIDIA RTX A2000, 8.6, 580.65.06, 6138, 512
"""
CUDA_LIBRARIES = ("libcudart.so.13", "libcublasLt.so.13", "libcublas.so.13", "libcurand.so.10", "libcudnn.so.9")


class FakeDriver:
    """The functions of libcuda.so.1 that list visible devices."""

    def __init__(self, *shown: uuid.UUID, code: int = 0) -> None:
        self._shown, self._code = shown, code

    def cuInit(self, flags: int) -> int:
        return self._code or (0 if self._shown else 100)

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = len(self._shown)
        return 0

    def cuDeviceGet(self, device: Any, n: int) -> int:
        device._obj.value = n + 10
        return 0

    def cuDeviceGetUuid_v2(self, raw: Any, device: Any) -> int:
        raw[:] = self._shown[device.value - 10].bytes
        return 0


class FakeMachine:
    """Linux with ONNX Runtime's CPU wheel, unless a method changes it."""

    def __init__(self, patch: pytest.MonkeyPatch, site: Path) -> None:
        self._patch, self._site = patch, site
        self.wheels = {"onnxruntime": site}
        self.libraries: set[str] = set()
        self.smi: str | None = None
        self.driver: object = FakeDriver(*UUIDS)
        self.modules: dict[str, object] = {}
        self._import, self._distribution = importlib.import_module, metadata.distribution
        patch.setattr(providers, "_usable", set())
        patch.setattr(providers, "check_wheels", providers.check_wheels.__wrapped__)
        patch.setattr(sys, "platform", "linux")
        patch.setattr(importlib, "import_module", self._module)
        patch.setattr(metadata, "distribution", self._wheel)
        patch.setattr(metadata, "version", lambda name: self._wheel(name).version)
        patch.setattr("fishrt_engines.machine.load_library", self._load)
        patch.setattr("fishrt_engines.machine._driver", self._load_driver)
        patch.setattr(subprocess, "run", self._run)
        self.onnxruntime("CPUExecutionProvider")

    def onnxruntime(self, *names: str, cuda: str = "") -> None:
        """Set the imported build: its providers, and the CUDA it was built with."""
        built = SimpleNamespace(
            __version__="1.31.1",
            cuda_version=cuda,
            get_available_providers=lambda: list(names),
            preload_dlls=lambda: print("Failed to load something"),
        )
        self._patch.setitem(sys.modules, "onnxruntime", built)

    def gpu(self, *, driver: bool = True, devices: str = SMI, lacking: tuple[str, ...] = ()) -> None:
        """Install onnxruntime-gpu, and set the driver, its devices and the missing CUDA libraries."""
        self.wheels = {"onnxruntime-gpu": self._site}
        self.onnxruntime("CUDAExecutionProvider", "CPUExecutionProvider", cuda="13.0")
        self.libraries = set(CUDA_LIBRARIES) - set(lacking)
        if driver:
            self.libraries.add("libcuda.so.1")
            self.smi = devices

    def tensorrt(self, version: str = "11.4.0.106") -> None:
        """Install TensorRT's binding, and cuda-bindings."""
        cuda = SimpleNamespace()
        self.modules |= {"tensorrt": SimpleNamespace(__version__=version), "cuda.bindings.runtime": cuda}

    def _load(self, name: str) -> str | None:
        return None if name in self.libraries else f"{name}: no such file"

    def _load_driver(self) -> object:
        if "libcuda.so.1" not in self.libraries:
            raise OSError("libcuda.so.1: no such file")
        return self.driver

    def _run(self, command: list[str], **_: object) -> SimpleNamespace:
        assert command[0] == "nvidia-smi"
        if self.smi is None:
            raise FileNotFoundError(command[0])
        return SimpleNamespace(stdout=self.smi)

    def _module(self, name: str) -> object:
        if name.partition(".")[0] not in ("tensorrt", "cuda"):
            return self._import(name)
        found = self.modules.get(name, ModuleNotFoundError(f"No module named '{name}'", name=name))
        if isinstance(found, ImportError):
            raise found
        return found

    def _wheel(self, name: str) -> SimpleNamespace | metadata.Distribution:
        if not name.startswith(("onnxruntime", "tensorrt", "cuda-")):
            return self._distribution(name)
        if name not in self.wheels:
            raise metadata.PackageNotFoundError(name)
        folder = self.wheels[name]
        return SimpleNamespace(version="1.31.1", locate_file=lambda file: folder / file)
