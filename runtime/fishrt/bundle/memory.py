"""Memory that a bundle needs, from its manifest alone.

The need is that of ONNX Runtime on a CPU. It is checked before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from fishrt_engines.engine import GraphSpec
from fishrt_engines.machine import available_memory

from ..errors import FishrtError
from .features import LanguageModel
from .manifest import Manifest

CACHE_POSITIONS = 1000


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """Memory that one bundle needs, in bytes."""

    disk: int
    """All of its files."""
    speaking: int
    """Weights of the model and of the codec's decoder."""
    encoding: int
    """Weights of the codec's encoder, which is loaded when a voice is made."""
    state: int
    """State of one request that does not grow with its length: the codec's, and the fast AR's cache."""
    cache: int
    """The slow AR's cache for CACHE_POSITIONS positions of prompt and speech, or the keys and values of as many tokens of text
    or patches of a voice."""


def estimate(manifest: Manifest) -> MemoryNeed:
    """Return the memory that a bundle needs, without activations: small, except a few hundred MB for long pieces in the codec."""
    specs, model = manifest.specs, manifest.model
    memory = {role: graph.memory for role, graph in manifest.graphs.items()}
    if isinstance(model, LanguageModel):
        cache = _state_bytes(specs.pop("slow_ar"), {"batch": 1, "cache": CACHE_POSITIONS})
    else:
        cache = 2 * 4 * model.layers * model.heads * model.head_dim * CACHE_POSITIONS
    return MemoryNeed(
        disk=manifest.total_bytes,
        speaking=sum(count for role, count in memory.items() if role != "codec_encode"),
        encoding=memory["codec_encode"],
        state=sum(_state_bytes(spec, {"batch": 1}) for spec in specs.values()),
        cache=cache,
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


def _state_bytes(spec: GraphSpec, dims: dict[str, int]) -> int:
    tensors = [t for t in spec.state_tensors if all(isinstance(size, int) or size in dims for size in t.shape)]
    return sum(t.nbytes(dims) for t in tensors)
