"""What a figure depends on besides the bundle: the CPU, its memory and how fast that is read, the versions of libraries."""

from __future__ import annotations

import os
import platform
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from fishrt_engines.machine import default_threads

from ..metrics import per_second

BUFFER_BYTES = 1 << 29
"""Much more than any cache holds."""
_SWEEPS = 12
_PACKAGES = ("fishrt", "numpy", "onnxruntime", "tokenizers")


def describe_machine() -> dict[str, Any]:
    """CPU, cores, memory, system, versions. No names of hosts or folders."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads_by_default": default_threads(),
        "memory_bytes": memory_bytes(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions,
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def memory_bytes() -> int | None:
    """Physical memory; None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def read_bandwidth(threads: int, size: int = BUFFER_BYTES) -> float:
    """Bytes a second that `threads` threads read from memory together.

    Each takes the maximum of its part of one array of float32, which numpy does in vector registers and without the interpreter's
    lock; the best of several sweeps counts, since a limit is asked for.
    """
    parts = np.array_split(np.ones(size // 4, np.float32), threads)
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(_SWEEPS):
            begun = time.perf_counter()
            for _maximum in pool.map(np.max, parts):
                pass
            best = min(best, time.perf_counter() - begun)
    return per_second(size, best)


def peak_memory() -> int | None:
    """The largest resident size of this process, in bytes; None where the system does not tell.

    Linux counts a parent's memory into `ru_maxrss` of a process that it started, so its own status file is asked.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
