"""Comparison of an exported graph with the torch module, which has the weights that the file holds.

Both get equal calls, with the state carried, and every output is compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor, nn

from fishrt.bundle.manifest import Parity
from fishrt_engines import Array, Engine, open_engine
from fishrt_engines.engine import GraphSpec

from ..checkpoint.weights import Lazy
from ..errors import ExportError
from .quantise import dequantise, relative_error, unpack
from .recipe import Storage
from .store import SCALES, stored_float

PROVIDER = "cpu"
PEAK = 50.0
"""Magnitude of an output above which its error is relative, since float32 rounding grows with the numbers."""
WORST = 0.5
"""Largest relative error of rounding. A larger one means that the integers are of another weight."""

Feeds = dict[str, Array]


@dataclass(frozen=True, slots=True)
class Case:
    """Calls that share one state. `dims` are the sizes of the state's symbolic dimensions."""

    calls: tuple[Feeds, ...]
    dims: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Margins:
    """The tolerance for an encoder's codes: rounding may change a code whose margin over the next best is small."""

    measure: Callable[[Tensor], Tensor]
    """Returns the margin of each code [batch, codebooks, frames] from the encoder's input."""
    allowed: float
    """Largest margin of a code that may differ."""
    chain: int
    """Number of successive codebooks of which each codes the residual of the ones before."""


def verify(
    module: nn.Module, spec: GraphSpec, folder: Path, cases: Iterable[Case], tolerance: float, margins: Margins | None = None
) -> Parity:
    """Return the largest error and the tolerance. Raises ExportError if the error is larger.

    The error of an output is its largest absolute difference, divided by max(1, largest absolute value / PEAK).
    With `margins`, the error of codes is the largest margin of a code that differs, 0 if none does.
    """
    engine = open_engine(folder / spec.file, spec, provider=PROVIDER)
    report = Report(spec.file, tolerance if margins is None else margins.allowed)
    for case in cases:
        compare(module, engine, case, case, report, margins)
    return report.parity()


def compare(
    module: nn.Module, engine: Engine, case: Case, case_of_graph: Case, report: Report, margins: Margins | None = None
) -> tuple[list[dict[str, Array]], list[dict[str, Array]]]:
    """Compare all results and the final state in `report`. Return the results of every call, the module's and the graph's.

    Both cases are equal, except for feeds that are results of an earlier stretch.
    """
    spec = engine.spec
    state = engine.new_state(**case.dims) if spec.states else None
    carried = [torch.zeros(tensor.resolve(case.dims)) for tensor in spec.state_tensors]
    of_module, of_graph = [], []
    for feeds, feeds_of_graph in zip(case.calls, case_of_graph.calls, strict=True):
        expected, carried = run_module(module, spec, feeds, carried)
        actual = {name: value.copy() for name, value in engine.run(feeds_of_graph, state).items()}
        for name, value in expected.items():
            if margins is not None and value.dtype == np.int64:
                report.codes(name, value, actual[name], _measured(margins, feeds), margins.chain)
            else:
                report.values(name, value, actual[name])
        of_module.append(expected)
        of_graph.append(actual)
    if state is not None:
        for tensor, kept in zip(spec.state_tensors, carried, strict=True):
            report.values(tensor.name, kept.numpy(), state.read(tensor.name))
    return of_module, of_graph


def run_module(
    module: nn.Module, spec: GraphSpec, feeds: Mapping[str, Array], state: Sequence[Tensor] = ()
) -> tuple[dict[str, Array], list[Tensor]]:
    """Call the torch module with the interface of an engine. Return the results by name, and the new state."""
    arguments: list[Any] = [torch.from_numpy(feeds[tensor.name]) for tensor in spec.feeds]
    if spec.states:
        arguments.append(list(state))
    with torch.no_grad():
        outputs = module(*arguments)
    values = (outputs,) if isinstance(outputs, Tensor) else outputs
    by_name = {tensor.name: value for tensor, value in zip(spec.outputs, values, strict=True)}
    results = {tensor.name: by_name[tensor.name].numpy() for tensor in spec.results}
    return results, [by_name[pair.output] for pair in spec.states]


def flipped_margin(expected: Array, actual: Array, margins: npt.NDArray[np.float32], chain: int) -> float:
    """Return the largest margin of a code that differs; 0.0 if no code [batch, codebooks, frames] does.

    Only the first difference in a chain counts: the codes after it are those of another residual.
    """
    differ = (expected != actual).reshape(-1, chain, expected.shape[-1])
    first = differ & (differ.cumsum(axis=1) == 1)
    return float(margins.reshape(differ.shape)[first].max(initial=0.0))


def _measured(margins: Margins, feeds: Mapping[str, Array]) -> npt.NDArray[np.float32]:
    (audio,) = feeds.values()
    with torch.no_grad():
        return np.asarray(margins.measure(torch.from_numpy(audio)).numpy(), np.float32)


class Report:
    """Comparisons for one graph: raises ExportError at the first failure, and keeps the largest error."""

    def __init__(self, file: str, tolerance: float) -> None:
        self.file, self.tolerance = file, tolerance
        self.error = 0.0

    def parity(self) -> Parity:
        """Return the manifest's entry."""
        return Parity(self.error, self.tolerance, PROVIDER)

    def values(self, name: str, expected: Array, actual: Array) -> None:
        """Compare two arrays of numbers."""
        self._same_shape(name, expected, actual)
        difference = float(np.abs(expected.astype(np.float64) - actual.astype(np.float64)).max())
        self._add(difference / max(1.0, float(np.abs(expected).max()) / PEAK), f"{name} differs by {difference:.3g}")

    def codes(self, name: str, expected: Array, actual: Array, margins: npt.NDArray[np.float32], chain: int) -> None:
        """Compare codes int64 [batch, codebooks, frames]; see `flipped_margin`."""
        self._same_shape(name, expected, actual)
        count = int((expected != actual).sum())
        self._add(flipped_margin(expected, actual, margins, chain), f"{count} of {expected.size} {name} differ")

    def _add(self, error: float, what: str) -> None:
        if not error <= self.tolerance:  # also when the error is NaN
            raise ExportError(
                f"{self.file} is not the torch module: {what} (error {error:.3g}; {self.tolerance:.3g} is allowed)",
                hint="this is a fault of the export, not of the checkpoint; please report it",
            )
        self.error = max(self.error, error)

    def _same_shape(self, name: str, expected: Array, actual: Array) -> None:
        if expected.shape != actual.shape:
            raise ExportError(f"{self.file}: {name} has shape {actual.shape}, the torch module gives {expected.shape}")


class Held(Lazy):
    """Float32 weights in the module's layout, made when they are looked up.

    Integers are read from the file and compared with the checkpoint's weights. All others are the checkpoint's, rounded to the
    stored type, so that verification finds a fault in the file.
    """

    def __init__(self, path: Path, weights: Mapping[str, Tensor], plan: Mapping[str, Storage]) -> None:
        super().__init__({name: partial(self._value, name) for name in weights})
        self._path, self._weights, self._plan = path, weights, plan
        self._initializers = ir.load(path).graph.initializers
        self.errors: dict[str, float] = {}
        """Relative error of each quantised weight that was looked up; see quantise.relative_error."""

    def _value(self, name: str) -> Tensor:
        """Return a weight. Raises ExportError if the file's integers are not those of the checkpoint's weight."""
        source = self._weights[name]
        if name not in self._initializers:  # the graph is only a part of the module
            return source.float()
        storage = self._plan.get(name, Storage("fp32"))
        if storage.block is None:
            return stored_float(source, storage.precision).float()
        value = dequantise(self._read(name), self._read(name + SCALES))
        error = self.errors[name] = relative_error(value, source)
        if not error <= WORST:  # also when the error is NaN
            raise ExportError(
                f"{self._path.name} does not hold {name}: its integers differ from the checkpoint by {error:.0%}",
                hint=f"keep it in more bits with --keep {name.removesuffix('.weight')}=fp32, and please report it",
            )
        return value

    def _read(self, name: str) -> Tensor:
        """Return an initialiser of integers or float32. It is not mapped: mapped pages count as this process's memory."""
        tensor = self._initializers[name].const_value
        assert tensor is not None
        shape = tuple(tensor.shape.numpy())
        if not isinstance(tensor, ir.ExternalTensor):
            array = tensor.numpy()
            return torch.from_numpy(array.astype(np.float32 if tensor.dtype == ir.DataType.FLOAT else np.int8))
        raw = np.fromfile(self._path.parent / tensor.location, np.uint8, tensor.length or 0, offset=tensor.offset or 0)
        stored = torch.from_numpy(raw)
        if tensor.dtype == ir.DataType.INT4:
            return unpack(stored, shape)
        return stored.view(torch.float32 if tensor.dtype == ir.DataType.FLOAT else torch.int8).view(shape)
