"""Facts about this machine: its CPU, its NVIDIA devices and their driver, the libraries that ONNX Runtime's CUDA provider loads.

Asked without torch and without a session. Nothing here decides anything; `providers` does.
"""

from __future__ import annotations

import contextlib
import csv
import ctypes
import functools
import importlib
import io
import logging
import os
import platform
import subprocess
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ProviderError

log = logging.getLogger(__name__)

_MIB = 1 << 20
_SMI_SECONDS = 20.0
"""How long `nvidia-smi` may take: without a resident driver it wakes every device up first."""
_NO_DEVICE = 100
"""The code of CUDA's driver and runtime where no device is shown."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One NVIDIA device that CUDA programs of this process may use, in their order."""

    name: str
    compute_capability: tuple[int, int]
    driver: str
    """Version of the driver, or of the CUDA that it knows where only that is told."""
    total_bytes: int
    free_bytes: int
    """At the moment of asking."""


@dataclass(frozen=True, slots=True)
class Library:
    """A shared library that ONNX Runtime's CUDA provider needs."""

    name: str
    error: str | None
    """Why it cannot be loaded; None if it is loaded now."""


def default_threads() -> int:
    """Threads for one graph: the physical cores that this process may use, and no more than its container's share of time.

    A second thread on the same core gains nothing in matrix products, and threads beyond the share make every call wait.
    """
    cores = {_siblings(cpu) for cpu in allowed_cpus()}
    return max(1, min(len(cores), _container_share() or len(cores)))


def usable_threads(threads: int | None) -> int:
    """Return the threads for one graph: the default for None, and at most one for each logical CPU, with a warning.

    More threads than CPUs wait for each other at every operator. Raises ProviderError below 1.
    """
    if threads is None:
        return default_threads()
    if threads < 1:
        raise ProviderError(f"threads is {threads}; at least 1 is needed", hint="leave it out to use the physical cores")
    if threads > (most := len(allowed_cpus())):
        _warn_of_threads(threads, most)
    return min(threads, most)


@functools.cache  # once for all graphs of a bundle
def _warn_of_threads(threads: int, most: int) -> None:
    log.warning("%d threads are asked for, and this process may use %d logical CPUs: %d threads are used", threads, most, most)


def allowed_cpus() -> list[int]:
    """The logical CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def cpu_name() -> str:
    """The model, or the architecture where the system does not say more."""
    return _cpu_field("model name") or platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """The instruction sets that ONNX Runtime's kernels make use of."""
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "sve")
    present = set((_cpu_field("flags") or _cpu_field("Features")).split())
    return [name for name in wanted if name in present]


def cpu_identity() -> str:
    """What kernels and packed weights depend on: architecture, model and instruction sets of the CPU."""
    return f"{platform.machine()} {cpu_name()} {_cpu_field('flags') or _cpu_field('Features')}"


def total_memory() -> int | None:
    """Bytes of physical memory; None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def peak_memory() -> int | None:
    """Return the largest resident size of this process so far, in bytes; None where the system does not tell.

    Linux counts a parent's memory into `ru_maxrss` of a process that it started, so its own status file is read.
    """
    if sys.platform == "linux":
        peaks = [line.split()[1] for line in (_read(Path("/proc/self/status")) or "").splitlines() if line.startswith("VmHWM:")]
        return int(peaks[0]) * 1024 if peaks else None
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def driver_error() -> str | None:
    """Why NVIDIA's driver cannot be loaded; None if it is there."""
    return load_library(_driver_name())


def load_library(name: str) -> str | None:
    """Loads a shared library for good. Returns why that is not possible, or None."""
    try:
        ctypes.CDLL(name)
    except OSError as error:
        return str(error)
    return None


def gpus() -> tuple[Gpu, ...] | None:
    """The devices, asked of `nvidia-smi`, or of cuda-bindings where that does not tell. None if neither does.

    Which they are and in what order only the driver knows, who reads CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER: `nvidia-smi`
    lists all, in the order of the bus.
    """
    shown, listed = _shown(), _from_smi()
    if shown == ():
        return ()
    if shown is None or listed is None or not listed.keys() >= set(shown):
        return _from_bindings()
    return tuple(listed[name] for name in shown)


def device_memory(index: int = 0) -> tuple[int, int] | None:
    """Free and total bytes of one of the devices of `gpus`; None where nothing tells."""
    found = gpus()
    return (found[index].free_bytes, found[index].total_bytes) if found and index < len(found) else None


def _driver_name() -> str:
    return "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"


def _driver() -> Any:
    """NVIDIA's driver, as ctypes has it. Raises OSError where there is none."""
    return ctypes.CDLL(_driver_name())


def _shown() -> tuple[str, ...] | None:
    """The devices that the driver shows to this process: their UUIDs, in its order. None if it cannot be asked."""
    try:
        driver = _driver()
        if (code := driver.cuInit(0)) == _NO_DEVICE:
            return ()
        count, device, raw = ctypes.c_int(), ctypes.c_int(), (ctypes.c_ubyte * 16)()
        codes = [code, driver.cuDeviceGetCount(ctypes.byref(count))]
        uuids = []
        for n in range(count.value):
            codes += [driver.cuDeviceGet(ctypes.byref(device), n), driver.cuDeviceGetUuid_v2(raw, device)]
            uuids.append(f"GPU-{uuid.UUID(bytes=bytes(raw))}")
    except (OSError, AttributeError):  # no driver, or one from before CUDA 11.4
        return None
    return None if any(codes) else tuple(uuids)


def _from_smi() -> dict[str, Gpu] | None:
    """All devices by UUID."""
    fields = "uuid,name,compute_cap,driver_version,memory.total,memory.free"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SMI_SECONDS, check=True)
        rows = [[cell.strip() for cell in row] for row in csv.reader(io.StringIO(done.stdout)) if row]
        return {row[0]: _smi_gpu(*row[1:]) for row in rows}
    except (OSError, subprocess.SubprocessError, ValueError, TypeError):
        return None


def _smi_gpu(name: str, capability: str, driver: str, total: str, free: str) -> Gpu:
    major, minor = capability.split(".")
    return Gpu(name, (int(major), int(minor)), driver, int(total) * _MIB, int(free) * _MIB)


def _from_bindings() -> tuple[Gpu, ...] | None:
    try:
        runtime: Any = importlib.import_module("cuda.bindings.runtime")
        known = _told(runtime.cudaDriverGetVersion())
        code, count = runtime.cudaGetDeviceCount()
        if int(code) == _NO_DEVICE:
            return ()
        return tuple(_bindings_gpu(runtime, index, known) for index in range(_told((code, count))))
    except (ImportError, RuntimeError):
        return None


def _bindings_gpu(runtime: Any, index: int, known: int) -> Gpu:
    properties = _told(runtime.cudaGetDeviceProperties(index))
    _told(runtime.cudaSetDevice(index))
    free, total = _told(runtime.cudaMemGetInfo())
    name = properties.name
    return Gpu(
        name.decode() if isinstance(name, bytes) else name,
        (properties.major, properties.minor),
        f"for CUDA {known // 1000}.{known % 1000 // 10}",
        total,
        free,
    )


def _told(result: tuple[Any, ...]) -> Any:
    """What a call of cuda-bindings gives behind its error code. Raises RuntimeError for an error."""
    code, *values = result
    if int(code) != 0:
        raise RuntimeError(str(code))
    return values[0] if len(values) == 1 else values


def cuda_libraries(ort: Any) -> tuple[Library, ...]:
    """Loads the libraries that the CUDA provider of an onnxruntime-gpu on Linux needs, and tells which could not be.

    ort: the onnxruntime module; of another build, or another system, there is nothing to tell. Those that pip installed are
    found, too, since ONNX Runtime's own search goes first.
    """
    major = str(getattr(ort, "cuda_version", "") or "").partition(".")[0]
    if not major or sys.platform != "linux":
        return ()
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find
        ort.preload_dlls()
    # Convolutions need cuDNN, which the provider opens only when it meets one.
    names = (f"libcudart.so.{major}", f"libcublasLt.so.{major}", f"libcublas.so.{major}", "libcurand.so.10", "libcudnn.so.9")
    return tuple(Library(name, load_library(name)) for name in names)


def _siblings(cpu: int) -> str:
    """A key that is the same for the hardware threads of one core; each is its own core where the system does not say."""
    return _read(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")) or str(cpu)


def _container_share() -> int | None:
    """CPUs' worth of time that the control group grants, rounded up; None without a limit."""
    quota, _, period = (_read(Path("/sys/fs/cgroup/cpu.max")) or "").partition(" ")
    return -(-int(quota) // int(period)) if quota.isdigit() and period.isdigit() else None


def _cpu_field(field: str) -> str:
    for line in (_read(Path("/proc/cpuinfo")) or "").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == field:
            return value.strip()
    return ""


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
