"""The export of one graph: its module, the storage of its weights, and the cases that verify it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from fishrt.bundle.manifest import Parity
from fishrt.progress import PartDone, Progress
from fishrt_engines.engine import GraphSpec

from ..checkpoint.weights import load
from ..models.transformer import Stack
from .recipe import Storage
from .store import store
from .stretches import BUDGET, split, stretch_bytes, verify_stack
from .trace import Dims, trace
from .verify import Case, Held, Margins, verify


@dataclass(frozen=True, slots=True)
class Made:
    """Measurements of a written and verified graph."""

    parity: Parity
    memory: int
    """Bytes of its weights in memory; see store.store."""
    errors: Mapping[str, float]
    """Relative error of each quantised layer; see Held.errors."""


@dataclass(frozen=True, slots=True)
class GraphJob:
    """One graph to write and verify."""

    role: str
    spec: GraphSpec
    build: Callable[[], nn.Module]
    """Makes the torch module, in float32, with arbitrary values of its weights."""
    weights: Mapping[str, Tensor]
    """The checkpoint's tensors under the module's names."""
    cases: list[Case]
    tolerance: float
    dims: Dims = field(default_factory=dict)
    margins: Callable[[nn.Module], Margins] | None = None
    """Makes the margins for codes that differ, from the module with the checkpoint's weights."""
    plan: Mapping[str, Storage] = field(default_factory=dict)
    """Storage of weights by name; weights without an entry keep the checkpoint's type."""

    def run(self, folder: Path, progress: Progress = lambda _stage, _done: None) -> Made:
        """Write the graph into `folder` and verify it. Raises ExportError."""
        path = folder / self.spec.file
        memory = self._write(path, progress)
        held = Held(path, self.weights, self.plan)
        progress("verifying", 0.5)
        return Made(self._verify(folder, held, lambda part: progress("verifying", 0.5 + 0.5 * part)), memory, held.errors)

    def _write(self, path: Path, progress: Progress) -> int:
        progress("tracing", 0.0)
        model = trace(self.build(), self.spec, self.dims)
        return store(model, path, self.weights, self.plan, lambda part: progress("writing", 0.5 * part))

    def need(self) -> int:
        """Return the least bytes of memory that `run` takes: twice the float32 weights of the module or its largest stretch.

        They are there once in torch and once as ONNX Runtime widens and packs them.
        """
        module = self.build()
        if isinstance(module, Stack):
            return 2 * max(stretch_bytes(module, parts) for parts in split(module, BUDGET))
        sizes: list[int] = [tensor.numel() for tensor in module.state_dict().values()]
        return 2 * 4 * sum(sizes)

    def _verify(self, folder: Path, held: Held, progress: PartDone) -> Parity:
        module = self.build()
        if isinstance(module, Stack):
            build: Callable[[], Stack] = self.build  # type: ignore[assignment]
            return verify_stack(build, self.spec, folder, held, self.cases, self.tolerance, progress=progress)
        module = load(module, held)
        return verify(module, self.spec, folder, self.cases, self.tolerance, self.margins and self.margins(module))
