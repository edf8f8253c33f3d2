"""The export of one graph: its module, the storage of its weights, and the cases that verify it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor, nn

from fishrt.bundle.manifest import Form, Parity
from fishrt.bundle.quantisation import LEVELS
from fishrt.progress import PartDone, Progress
from fishrt_engines.engine import GraphSpec

from ..checkpoint.weights import load
from ..models.stack import Stack
from .recipe import Storage
from .report import PROVIDER, Case, exact, exact_file
from .store import link, store
from .stretches import BUDGET, split, stretch_bytes, verify_stack
from .trace import Dims, trace
from .verify import Held, Margins, verify


@dataclass(frozen=True, slots=True)
class Made:
    """Measurements of a written and verified graph."""

    parity: Parity
    memory: int
    """Bytes of its own weights in memory; see store.store."""
    errors: Mapping[str, float]
    """Relative error of each quantised layer; see Held.errors."""
    forms: tuple[Form, ...] = ()
    """Forms of the graph, with their errors."""


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
    stored_in: str | None = None
    """The graph file in the same folder that has the weights, without the first part of their names. None: they are written."""

    def run(
        self,
        folder: Path,
        progress: Progress = lambda _stage, _done: None,
        make_forms: Callable[[], Sequence[Form]] = lambda: (),
    ) -> Made:
        """Write the graph and its forms into `folder`, and verify those that a CPU runs. Raises ExportError.

        make_forms: writes the forms of the portable graph into its folder.
        """
        path = folder / self.spec.file
        memory = self._write(path, progress)
        held = Held(path, self.weights, self.plan)
        progress("verifying", 0.5)
        forms = make_forms()
        ours = {form.spec: exact(form.spec, folder) for form in forms if form.provider == PROVIDER}
        specs = [*dict.fromkeys([self.spec, *ours.values(), *ours])]
        found = self._verify(folder, specs, held, lambda part: progress("verifying", 0.5 + 0.5 * part))
        errors = dict(zip(specs, found, strict=True))
        made = tuple(
            _with_errors(form, errors[ours[form.spec]], errors[form.spec]) if form.spec in ours else form for form in forms
        )
        for spec in ours:
            (folder / exact_file(spec)).unlink(missing_ok=True)
        return Made(errors[self.spec], memory, held.errors, made)

    def _write(self, path: Path, progress: Progress) -> int:
        progress("tracing", 0.0)
        model = trace(self.build(), self.spec, self.dims)
        if self.stored_in is not None:
            link(model, path, path.with_name(self.stored_in))
            return 0
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

    def _verify(self, folder: Path, specs: Sequence[GraphSpec], held: Held, progress: PartDone) -> list[Parity]:
        module = self.build()
        if isinstance(module, Stack):
            build: Callable[[], Stack] = self.build  # type: ignore[assignment]
            # ONNX Runtime holds every step from the codes of a table to floats at once: five times the bytes of the floats.
            steps = 5 if any(storage.precision in LEVELS for storage in self.plan.values()) else 1
            return verify_stack(build, specs, folder, held, self.cases, self.tolerance, budget=BUDGET // steps, progress=progress)
        module = load(module, held)
        return verify(module, specs, folder, self.cases, self.tolerance, self.margins and self.margins(module))


def _with_errors(form: Form, parity: Parity, rounded: Parity) -> Form:
    """Return the form with its error without rounding of activations, and with it."""
    return replace(form, parity=parity, activations_error=rounded.max_abs_error if form.spec.rounds_activations else None)
