"""Memory that a bundle needs, from its manifest alone, and memory that this process can still get.

The need is that of ONNX Runtime on a CPU. It is checked before anything is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fishrt_engines.engine import GraphSpec

from ..errors import FishrtError
from .manifest import Manifest

CACHE_POSITIONS = 1000
_UNLIMITED = 1 << 60
"""Limits above this mean no limit: cgroup v1 writes a number instead of "max"."""


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """Memory that one bundle needs, in bytes."""

    disk: int
    """All of its files."""
    speaking: int
    """Weights of the language model and of the codec's decoder."""
    encoding: int
    """Weights of the codec's encoder, which is loaded when a voice is made."""
    state: int
    """State of one request that does not grow with its length: the fast AR's cache and the codec's state."""
    cache: int
    """The slow AR's cache for CACHE_POSITIONS positions of prompt and speech."""


def estimate(manifest: Manifest) -> MemoryNeed:
    """Return the memory that a bundle needs, without activations: small, except a few hundred MB for long pieces in the codec."""
    graphs = manifest.specs
    memory = {role: graph.memory for role, graph in manifest.graphs.items()}
    return MemoryNeed(
        disk=manifest.total_bytes,
        speaking=sum(memory[role] for role in ("slow_ar", "fast_ar", "codec_decode")),
        encoding=memory["codec_encode"],
        state=sum(_state_bytes(graphs[role], {"batch": 1}) for role in ("fast_ar", "codec_decode")),
        cache=_state_bytes(graphs["slow_ar"], {"batch": 1, "cache": CACHE_POSITIONS}),
    )


def check_memory(need: int, what: str, available: int | None = None) -> None:
    """Check that there are `need` bytes for `what`. available: None measures it. Raises FishrtError otherwise."""
    if available is None:
        available = available_memory()
    if available is not None and need > available:
        raise FishrtError(
            f"{what} needs about {need / 1e9:.2f} GB of memory, and {available / 1e9:.2f} GB are free",
            hint="close other programs, raise the memory limit, or take a smaller model or one of less precision",
        )


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turn a MemoryError inside the block into a FishrtError with a hint."""
    try:
        yield
    except MemoryError as error:
        raise FishrtError(f"not enough memory: {error}", hint="use shorter text or references, or fewer frames") from None


def available_memory(root: Path = Path("/")) -> int | None:
    """Return the bytes that this process can still get; None if it is unknown.

    This is the least of free memory with swap, the limits of the process's control groups, and its limit of address space.
    root: the folder of /proc and /sys.
    """
    found = [*_of_system(root), *_of_control_groups(root), *_of_address_space(root)]
    return max(min(found), 0) if found else None


def _state_bytes(spec: GraphSpec, dims: dict[str, int]) -> int:
    tensors = [t for t in spec.state_tensors if all(isinstance(size, int) or size in dims for size in t.shape)]
    return sum(math.prod(t.resolve(dims)) * np.dtype(t.dtype).itemsize for t in tensors)


def _of_system(root: Path) -> Iterator[int]:
    fields = _fields(root / "proc/meminfo")
    if "MemAvailable:" in fields:
        yield 1024 * (fields["MemAvailable:"] + fields.get("SwapFree:", 0))


def _of_control_groups(root: Path) -> Iterator[int]:
    """Yield limit − use, without reclaimable file pages, of every control group of this process, cgroup v1 and v2."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        limit, used = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        group = top / path.strip("/")
        # Inside a container, the path in /proc/self/cgroup may be the host's; the container's own group is then the top.
        for folder in {group, *(parent for parent in group.parents if parent.is_relative_to(top)), top}:
            most, now = _text(folder / limit).strip(), _text(folder / used).strip()
            if most.isdecimal() and now.isdecimal() and int(most) < _UNLIMITED:
                stat = _fields(folder / "memory.stat")
                dropped = sum(stat.get(name, 0) for name in ("inactive_file", "active_file"))
                yield int(most) - max(int(now) - dropped, 0)


def _of_address_space(root: Path) -> Iterator[int]:
    for line in _text(root / "proc/self/limits").splitlines():
        if line.startswith("Max address space"):
            limit = line.removeprefix("Max address space").split()[0]
            used = _fields(root / "proc/self/status").get("VmSize:")
            if limit.isdecimal() and used is not None:
                yield int(limit) - 1024 * used


def _fields(path: Path) -> dict[str, int]:
    """Read a file of lines with a name and a number."""
    words = (line.split() for line in _text(path).splitlines())
    return {line[0]: int(line[1]) for line in words if len(line) > 1 and line[1].isdecimal()}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
