"""The report on this machine: its hardware, the installed packages, usable providers, and remedies for the others."""

from __future__ import annotations

import importlib
import platform
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

from . import machine
from .errors import ProviderError
from .folders import cache_folder, cache_limit
from .machine import Gpu, Library
from .providers import NEVER_BY_ITSELF, PROVIDERS, Choice, choose_provider, find_obstacle, import_onnxruntime, telemetry, version

PACKAGES = (
    "numpy",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt-cu13",
    "cuda-bindings",
    "soundfile",
    "tokenizers",
)


@dataclass(frozen=True, slots=True)
class Cpu:
    """The processor."""

    name: str
    threads: int
    """Default threads of a graph."""
    logical: int
    """Logical CPUs that this process may use."""
    features: tuple[str, ...]
    """Instruction sets that ONNX Runtime uses."""


@dataclass(frozen=True, slots=True)
class ProviderState:
    """A provider, and whether it can be used here."""

    name: str
    obstacle: str | None
    """The reason why it cannot be used; None if it can."""
    hint: str | None


@dataclass(frozen=True, slots=True)
class TensorRt:
    """TensorRT's Python binding and its library."""

    binding: str | None
    """Version of the Python distribution; None if it is not installed."""
    library: str | None
    """Version of the loaded library; None if it cannot be loaded."""
    error: str | None
    """The reason why it cannot be loaded."""


@dataclass(frozen=True, slots=True)
class Cache:
    """The folder of optimised graphs and plans."""

    folder: str | None
    """None for a user without a home, unless FISHRT_CACHE names a folder."""
    bytes: int
    """Size of its files."""
    limit_bytes: int
    """Size that its graphs may have. Plans are beside them."""
    error: str | None
    """The reason why nothing can be written there."""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The whole report."""

    system: str
    python: str
    cpu: Cpu
    memory_bytes: int | None
    packages: dict[str, str | None]
    """Version by distribution; None if it is not installed."""
    driver_error: str | None
    """The reason why NVIDIA's driver cannot be loaded; None if it can."""
    gpus: tuple[Gpu, ...] | None
    """None if the devices cannot be listed."""
    cuda_libraries: tuple[Library, ...]
    """The libraries of onnxruntime-gpu; empty for other builds."""
    tensorrt: TensorRt
    providers: tuple[ProviderState, ...]
    auto: Choice | None
    """None if no provider can be used."""
    cache: Cache
    telemetry: bool
    """Whether ONNX Runtime's telemetry is on."""

    def lines(self) -> list[str]:
        """Return the report as text: lines of a name and its value."""
        return [f"{name}: {text}" for name, text in self._lines()]

    def _lines(self) -> Iterator[tuple[str, str]]:
        yield "system", self.system
        yield "python", self.python
        yield "cpu", self.cpu.name
        yield "cores", f"{self.cpu.threads} used by default, {self.cpu.logical} logical allowed"
        yield "cpu features", " ".join(self.cpu.features) or "unknown"
        yield "memory", "unknown" if self.memory_bytes is None else _gib(self.memory_bytes)
        for name, found in self.packages.items():
            yield name, found or "not installed"
        yield "nvidia driver", "found" if self.driver_error is None else f"none ({self.driver_error})"
        if self.driver_error is None and not self.gpus:
            yield "nvidia device", "cannot be listed" if self.gpus is None else "none"
        for gpu in self.gpus or ():
            yield "nvidia device", _describe(gpu)
        for library in self.cuda_libraries:
            yield library.name, "loads" if library.error is None else f"cannot be loaded ({library.error})"
        yield "tensorrt", self._tensorrt()
        for state in self.providers:
            yield f"provider {state.name}", "ready" if state.obstacle is None else _with_hint(state)
        yield "provider auto", f"{self.auto.name} ({self.auto.reason})" if self.auto else "none"
        for name, why in NEVER_BY_ITSELF.items():
            yield "provider auto", f"never {name}, since {why}"
        if self.cache.folder is None:
            yield "cache", "no folder: this user has no home, and FISHRT_CACHE is not set"
        else:
            writable = "can be written to" if self.cache.error is None else f"cannot be written to ({self.cache.error})"
            held, most = f"{self.cache.bytes / 1e6:,.0f} MB", f"{self.cache.limit_bytes / 1e9:g} GB"
            yield "cache", f"{self.cache.folder} {writable}; it holds {held}, of graphs {most} at most (FISHRT_CACHE_GB)"
        yield "telemetry", "on, by ORT_DISABLE_TELEMETRY" if self.telemetry else "off"

    def _tensorrt(self) -> str:
        binding = f"binding {self.tensorrt.binding}" if self.tensorrt.binding else "no binding"
        return f"{binding}, " + (
            f"library {self.tensorrt.library}" if self.tensorrt.library else f"no library ({self.tensorrt.error})"
        )


def examine() -> Diagnosis:
    """Examine this machine. Takes seconds if it has devices; opens no session, and downloads nothing."""
    driver_error = machine.driver_error()
    return Diagnosis(
        system=platform.platform(),
        python=platform.python_version(),
        cpu=Cpu(machine.cpu_name(), machine.default_threads(), len(machine.allowed_cpus()), tuple(machine.cpu_features())),
        memory_bytes=machine.total_memory(),
        packages={name: version(name) for name in PACKAGES},
        driver_error=driver_error,
        gpus=machine.gpus() if driver_error is None else None,
        cuda_libraries=_cuda_libraries(),
        tensorrt=_tensorrt(),
        providers=tuple(_state(name) for name in PROVIDERS),
        auto=_choice(),
        cache=_cache(),
        telemetry=telemetry(),
    )


def _cuda_libraries() -> tuple[Library, ...]:
    try:
        return machine.cuda_libraries(import_onnxruntime())
    except ProviderError:
        return ()


def _tensorrt() -> TensorRt:
    binding = version("tensorrt-cu13")
    try:
        return TensorRt(binding, str(importlib.import_module("tensorrt").__version__), None)
    except (ImportError, OSError) as error:
        return TensorRt(binding, None, str(error))


def _state(name: str) -> ProviderState:
    obstacle = find_obstacle(name)
    return ProviderState(name, obstacle.what, obstacle.hint) if obstacle else ProviderState(name, None, None)


def _choice() -> Choice | None:
    try:
        return choose_provider()
    except ProviderError:
        return None


def _cache() -> Cache:
    folder, most, fault = cache_folder(), cache_limit(), None
    if folder is None:
        return Cache(None, 0, most, None)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        fault = error.strerror or str(error)
    return Cache(str(folder), sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()), most, fault)


def _with_hint(state: ProviderState) -> str:
    return f"{state.obstacle}; {state.hint}" if state.hint else str(state.obstacle)


def _describe(gpu: Gpu) -> str:
    major, minor = gpu.compute_capability
    return (
        f"{gpu.name}, compute capability {major}.{minor}, driver {gpu.driver}, "
        f"{_gib(gpu.free_bytes)} of {_gib(gpu.total_bytes)} free"
    )


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
