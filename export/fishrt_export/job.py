"""One graph of a bundle: what is traced, and what it is verified with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from fishrt.bundle import Parity
from fishrt_engines.spec import GraphSpec

from .trace import Dims, export_graph
from .verify import Case, Margins, verify


@dataclass(frozen=True, slots=True)
class GraphJob:
    """One graph to be made."""

    role: str
    spec: GraphSpec
    build: Callable[[], nn.Module]
    """Makes the torch module with its weights in float32."""
    weights: Mapping[str, Tensor]
    """By the module's names, as the checkpoint holds them."""
    cases: list[Case]
    tolerance: float
    dims: Dims = field(default_factory=dict)
    margins: Callable[[nn.Module], Margins] | None = None
    """By what codes that differ are judged, given the module."""

    def run(self, folder: Path, stage: Callable[[str], None] = lambda _: None) -> Parity:
        """Writes the graph into `folder` and verifies it. Raises ExportError."""
        module = self.build()
        stage("tracing")
        export_graph(module, self.spec, folder, {name: tensor.dtype for name, tensor in self.weights.items()}, self.dims)
        stage("verifying")
        return verify(module, self.spec, folder, self.cases, self.tolerance, self.margins and self.margins(module))
