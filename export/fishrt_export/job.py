"""One graph of a bundle: what is traced, how its weights are stored, and what it is verified with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from fishrt.bundle import Parity
from fishrt_engines.spec import GraphSpec

from .held import Held
from .recipe import Storage
from .store import store
from .stretches import BUDGET, split, stretch_bytes, verify_stack
from .trace import Dims, trace
from .transformer import Stack
from .verify import Case, Margins, verify
from .weights import load

Tell = Callable[[str, float], None]
"""Told what is being done, and the part of the job that is done, 0..1."""


@dataclass(frozen=True, slots=True)
class Made:
    """What is known of a graph when it is there."""

    parity: Parity
    memory: int
    """Bytes of its weights in memory; see store.store."""
    errors: Mapping[str, float]
    """Of each quantised layer; see Held.errors."""


@dataclass(frozen=True, slots=True)
class GraphJob:
    """One graph to be made."""

    role: str
    spec: GraphSpec
    build: Callable[[], nn.Module]
    """Makes the torch module, in float32. What its weights hold does not matter."""
    weights: Mapping[str, Tensor]
    """By the module's names, as the checkpoint holds them."""
    cases: list[Case]
    tolerance: float
    dims: Dims = field(default_factory=dict)
    margins: Callable[[nn.Module], Margins] | None = None
    """By what codes that differ are judged, given the module."""
    plan: Mapping[str, Storage] = field(default_factory=dict)
    """How weights are stored; those without an entry, as they are."""

    def run(self, folder: Path, tell: Tell = lambda _stage, _done: None) -> Made:
        """Writes the graph into `folder` and verifies it. Raises ExportError."""
        path = folder / self.spec.file
        memory = self._write(path, tell)
        held = Held(path, self.weights, self.plan)
        tell("verifying", 0.5)
        return Made(self._verify(folder, held, lambda part: tell("verifying", 0.5 + 0.5 * part)), memory, held.errors)

    def _write(self, path: Path, tell: Tell) -> int:
        tell("tracing", 0.0)
        model = trace(self.build(), self.spec, self.dims)
        return store(model, path, self.weights, self.plan, lambda part: tell("writing", 0.5 * part))

    def need(self) -> int:
        """Bytes of memory that `run` takes at least: the module's float32 weights, or a stretch of them, twice: in torch, and
        as ONNX Runtime widens and packs them.
        """
        module = self.build()
        if isinstance(module, Stack):
            return 2 * max(stretch_bytes(module, parts) for parts in split(module, BUDGET))
        sizes: list[int] = [tensor.numel() for tensor in module.state_dict().values()]
        return 2 * 4 * sum(sizes)

    def _verify(self, folder: Path, held: Held, progress: Callable[[float], None]) -> Parity:
        module = self.build()
        if isinstance(module, Stack):
            build: Callable[[], Stack] = self.build  # type: ignore[assignment]
            return verify_stack(build, self.spec, folder, held, self.cases, self.tolerance, progress=progress)
        module = load(module, held)
        return verify(module, self.spec, folder, self.cases, self.tolerance, self.margins and self.margins(module))
