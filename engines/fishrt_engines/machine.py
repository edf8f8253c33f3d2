"""Facts about this machine: its CPU, its NVIDIA devices and their driver, the libraries that ONNX Runtime's CUDA provider loads.

Found without torch and without a session. The choice of a provider is in `providers`.
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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ProviderError

log = logging.getLogger(__name__)

_MIB = 1 << 20
_SMI_SECONDS = 20.0
"""Time limit of `nvidia-smi`: without a resident driver it initialises every device first."""
_NO_DEVICE = 100
"""The error code of CUDA's driver and runtime if no device is visible."""
_UNLIMITED = 1 << 60
"""Limits above this mean no limit: cgroup v1 writes a number instead of "max"."""


_BFLOAT16_SINCE = (8, 0)
"""The lowest compute capability with products in bfloat16."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One NVIDIA device that is visible to this process."""

    name: str
    compute_capability: tuple[int, int]
    driver: str
    """Version of the driver, or, where only that is known, of CUDA as the driver supports it."""
    total_bytes: int
    free_bytes: int
    """Free memory when this was read."""


@dataclass(frozen=True, slots=True)
class Library:
    """A shared library that ONNX Runtime's CUDA provider needs."""

    name: str
    error: str | None
    """The reason why it cannot be loaded; None if it is loaded."""


def default_threads() -> int:
    """Return the threads for one graph: the physical cores that this process may use, at most its container's CPU quota.

    A second thread on a core does not speed up matrix products; threads beyond the quota make every call wait.
    """
    cores = {_siblings(cpu) for cpu in allowed_cpus()}
    return max(1, min(len(cores), _container_share() or len(cores)))


def usable_threads(threads: int | None) -> int:
    """Return the threads for one graph: the default for None, else at most one for each logical CPU, with a warning.

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
    log.warning("%d threads are requested, but this process may use %d logical CPUs: %d threads are used", threads, most, most)


def allowed_cpus() -> list[int]:
    """Return the logical CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def cpu_name() -> str:
    """Return the model of the CPU, or the architecture if the system does not name the model."""
    return _cpu_field("model name") or platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """Return the CPU's instruction sets that ONNX Runtime's kernels use."""
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "sve")
    present = set((_cpu_field("flags") or _cpu_field("Features")).split())
    return [name for name in wanted if name in present]


def features(provider: str) -> frozenset[str]:
    """Return what a graph may need of this machine: instruction sets for "cpu", for "cuda" also number formats.

    "vnni": products of 8-bit integers are added four at a time, exactly. "bfloat16": the first device multiplies in bfloat16.
    """
    found = set(cpu_features())
    if found & {"avx512_vnni", "avx_vnni"}:
        found.add("vnni")
    if provider == "cuda" and (gpu := next(iter(gpus() or ()), None)) and gpu.compute_capability >= _BFLOAT16_SINCE:
        found.add("bfloat16")
    return frozenset(found)


def cpu_identity() -> str:
    """Return all that kernels and packed weights depend on: architecture, model and instruction sets of the CPU."""
    return f"{platform.machine()} {cpu_name()} {_cpu_field('flags') or _cpu_field('Features')}"


def total_memory() -> int | None:
    """Return the bytes of physical memory; None if the system does not report them."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def peak_memory() -> int | None:
    """Return the largest resident size of this process so far, in bytes; None if the system does not report it.

    Linux counts a parent's memory into `ru_maxrss` of a process that it started, so its own status file is read.
    """
    if sys.platform == "linux":
        peaks = [line.split()[1] for line in _read(Path("/proc/self/status")).splitlines() if line.startswith("VmHWM:")]
        return int(peaks[0]) * 1024 if peaks else None
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_memory(root: Path = Path("/")) -> int | None:
    """Return the bytes that this process can still get; None if it is unknown.

    This is the least of free memory with swap, the limits of the process's control groups, and its limit of address space.
    root: the folder of /proc and /sys.
    """
    found = [*_of_system(root), *_of_control_groups(root), *_of_address_space(root)]
    return max(min(found), 0) if found else None


def driver_error() -> str | None:
    """Return why NVIDIA's driver cannot be loaded; None if it can."""
    return load_library(_driver_name())


def load_library(name: str) -> str | None:
    """Load a shared library, which stays loaded. Return why it cannot be loaded, or None."""
    try:
        ctypes.CDLL(name)
    except OSError as error:
        return str(error)
    return None


def gpus() -> tuple[Gpu, ...] | None:
    """Return the visible devices by `nvidia-smi`, or else by cuda-bindings; None if neither reports them.

    Visibility and order are the driver's, which reads CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER: `nvidia-smi` lists all devices
    in the order of the bus.
    """
    visible, listed = _visible(), _from_smi()
    if visible == ():
        return ()
    if visible is None or listed is None or not listed.keys() >= set(visible):
        return _from_bindings()
    return tuple(listed[name] for name in visible)


def device_memory(index: int = 0) -> tuple[int, int] | None:
    """Return free and total bytes of one of the devices of `gpus`; None if they are unknown."""
    found = gpus()
    return (found[index].free_bytes, found[index].total_bytes) if found and index < len(found) else None


def _driver_name() -> str:
    return "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"


def _driver() -> Any:
    """Return NVIDIA's driver as a ctypes library. Raises OSError if there is none."""
    return ctypes.CDLL(_driver_name())


def _visible() -> tuple[str, ...] | None:
    """Return the UUIDs of the devices visible to this process, in the driver's order; None if they cannot be read."""
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
    """Return all devices by UUID."""
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
        known = _checked(runtime.cudaDriverGetVersion())
        code, count = runtime.cudaGetDeviceCount()
        if int(code) == _NO_DEVICE:
            return ()
        return tuple(_bindings_gpu(runtime, index, known) for index in range(_checked((code, count))))
    except (ImportError, RuntimeError):
        return None


def _bindings_gpu(runtime: Any, index: int, known: int) -> Gpu:
    properties = _checked(runtime.cudaGetDeviceProperties(index))
    _checked(runtime.cudaSetDevice(index))
    free, total = _checked(runtime.cudaMemGetInfo())
    name = properties.name
    return Gpu(
        name.decode() if isinstance(name, bytes) else name,
        (properties.major, properties.minor),
        f"for CUDA {known // 1000}.{known % 1000 // 10}",
        total,
        free,
    )


def _checked(result: tuple[Any, ...]) -> Any:
    """Return the value behind the error code of a call of cuda-bindings. Raises RuntimeError for an error."""
    code, *values = result
    if int(code) != 0:
        raise RuntimeError(str(code))
    return values[0] if len(values) == 1 else values


def cuda_libraries(ort: Any) -> tuple[Library, ...]:
    """Load the libraries that the CUDA provider of onnxruntime-gpu needs on Linux, and return each with its error, if any.

    ort: the onnxruntime module; empty for another build or system. ONNX Runtime's own search runs first, so that libraries
    installed by pip are found.
    """
    major = str(getattr(ort, "cuda_version", "") or "").partition(".")[0]
    if not major or sys.platform != "linux":
        return ()
    with contextlib.redirect_stdout(io.StringIO()):  # it prints every library that it does not find
        ort.preload_dlls()
    # Convolutions need cuDNN, which the provider loads only for the first of them.
    names = (f"libcudart.so.{major}", f"libcublasLt.so.{major}", f"libcublas.so.{major}", "libcurand.so.10", "libcudnn.so.9")
    return tuple(Library(name, load_library(name)) for name in names)


def _siblings(cpu: int) -> str:
    """Return a key that is the same for the hardware threads of one core; if the system has none, each counts as a core."""
    return _read(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")) or str(cpu)


def _container_share() -> int | None:
    """Return the CPU quota of the control group in CPUs, rounded up; None without a limit."""
    quota, _, period = _read(Path("/sys/fs/cgroup/cpu.max")).partition(" ")
    return -(-int(quota) // int(period)) if quota.isdigit() and period.isdigit() else None


def _of_system(root: Path) -> Iterator[int]:
    fields = _fields(root / "proc/meminfo")
    if "MemAvailable:" in fields:
        yield 1024 * (fields["MemAvailable:"] + fields.get("SwapFree:", 0))


def _of_control_groups(root: Path) -> Iterator[int]:
    """Yield limit − use, without reclaimable file pages, of every control group of this process, cgroup v1 and v2."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        limit, used = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        group = top / path.strip("/")
        # Inside a container, the path in /proc/self/cgroup may be the host's; the container's own group is then the top.
        for folder in {group, *(parent for parent in group.parents if parent.is_relative_to(top)), top}:
            most, now = _read(folder / limit), _read(folder / used)
            if most.isdecimal() and now.isdecimal() and int(most) < _UNLIMITED:
                stat = _fields(folder / "memory.stat")
                dropped = sum(stat.get(name, 0) for name in ("inactive_file", "active_file"))
                yield int(most) - max(int(now) - dropped, 0)


def _of_address_space(root: Path) -> Iterator[int]:
    for line in _read(root / "proc/self/limits").splitlines():
        if line.startswith("Max address space"):
            limit = line.removeprefix("Max address space").split()[0]
            used = _fields(root / "proc/self/status").get("VmSize:")
            if limit.isdecimal() and used is not None:
                yield int(limit) - 1024 * used


def _fields(path: Path) -> dict[str, int]:
    """Read a file of lines with a name and a number."""
    words = (line.split() for line in _read(path).splitlines())
    return {line[0]: int(line[1]) for line in words if len(line) > 1 and line[1].isdecimal()}


@functools.cache  # each graph of a bundle asks, and the file is long on a machine with many CPUs
def _cpu_field(field: str) -> str:
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        key, _, value = line.partition(":")
        if key.strip() == field:
            return value.strip()
    return ""


def _read(path: Path) -> str:
    """Return the text of a file of the system; empty if there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
