"""The machine of a measurement: CPU, memory, read bandwidth, versions of libraries."""

from __future__ import annotations

import os
import platform
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from typing import Any

import numpy as np

from fishrt_engines.machine import cpu_name, default_threads, total_memory

from ..metrics import per_second

BUFFER_BYTES = 1 << 29
"""Much larger than any cache."""
_SWEEPS = 12
_PACKAGES = ("fishrt", "numpy", "onnxruntime", "tokenizers")


def describe_machine() -> dict[str, Any]:
    """Return CPU, cores, memory, system and versions, without names of hosts or folders."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads_by_default": default_threads(),
        "memory_bytes": total_memory(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions,
    }


def read_bandwidth(threads: int, size: int = BUFFER_BYTES) -> float:
    """Return the bytes per second that `threads` threads read from memory together, the best of several sweeps.

    Each thread takes the maximum of its part of a float32 array, which numpy computes in vector registers and without the GIL.
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
