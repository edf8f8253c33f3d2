"""Comparison of the results of an engine with expected ones. Needs no torch: those of another engine may be expected, too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fishrt.bundle.manifest import Parity
from fishrt_engines import Array, Engine, open_engine
from fishrt_engines.engine import GraphSpec

from ..errors import ExportError

PROVIDER = "cpu"
PEAK = 50.0
"""Magnitude of an output above which its error is relative, since float32 rounding grows with the numbers."""
ROUNDED = 0.25
"""Largest error that activations rounded to 8 bits explain, as root mean square ÷ that of the values; another graph has 1."""

LEAST_SURE = 0.5
"""Least part of the frames of latents that must be compared."""

Feeds = dict[str, Array]


@dataclass(frozen=True, slots=True)
class Case:
    """Calls that share one state. `dims` are the sizes of the state's symbolic dimensions."""

    calls: tuple[Feeds, ...]
    dims: Mapping[str, int]

    @property
    def is_consecutive(self) -> bool:
        """Whether every column is written at its own position, as the attention of `GraphSpec.columns` needs it."""
        rows = self.dims.get("cache")
        return rows is None or all(int(feeds["position_ids"].max()) < rows for feeds in self.calls)


@dataclass(frozen=True, slots=True)
class Expected:
    """Results of every call of a case, and the final state."""

    results: list[dict[str, Array]]
    state: Mapping[str, Array]
    margins: Sequence[npt.NDArray[np.float32]] = ()
    """For codes, the margin of each over the next best, of every call."""
    chain: int = 1
    """Number of successive codebooks of which each codes the residual of the ones before."""
    sure: Sequence[npt.NDArray[np.bool_]] = ()
    """For latents, the frames [batch, frames] of every call whose codes no rounding changes: only they are compared."""


def exact_file(spec: GraphSpec) -> str:
    """Return the name of a form's graph without rounding of activations, which is written only to be compared."""
    return f"{Path(spec.file).stem}.exact.onnx"


def exact(spec: GraphSpec, folder: Path) -> GraphSpec:
    """Return the spec of the same graph without rounding of activations, whose errors show faults of the graph.

    It is an option of the engine, except for a form that has an `exact_file`.
    """
    file = exact_file(spec) if (folder / exact_file(spec)).exists() else spec.file
    return replace(spec, file=file, rounds_activations=False)


def run(engine: Engine, case: Case) -> Expected:
    """Return what an engine gives for a case."""
    state = engine.new_state(**case.dims) if engine.spec.states else None
    results = [{name: value.copy() for name, value in engine.run(feeds, state).items()} for feeds in case.calls]
    return Expected(results, {} if state is None else {t.name: state.read(t.name) for t in engine.spec.state_tensors})


def compare(
    spec: GraphSpec,
    folder: Path,
    cases: Sequence[tuple[Case, Expected]],
    tolerance: float,
    reference: str = "the torch module",
    *,
    of_form: bool = False,
) -> Parity:
    """Return the largest error of the graph of `spec` in the cases that it takes. Raises ExportError if it is too large.

    of_form: the graph is a form, and not the portable graph; see Report.
    """
    report = Report(spec, tolerance, reference, of_form)
    engine = open_engine(folder / spec.file, spec, provider=PROVIDER)
    for case, expected in cases:
        if spec.columns is None or case.is_consecutive:
            report.add(expected, run(engine, case))
    return report.parity()


@dataclass
class Report:
    """Errors of one graph: raises ExportError at the first that is too large, and keeps the largest.

    The error of numbers is the largest absolute difference, divided by max(1, largest absolute value / PEAK). In a form of a
    codec, the error of the state is divided by max(1, largest absolute value): sums in another order round by the size of their
    numbers, which is any there, and the audio is within −1..1. The error of codes with margins is the largest margin of a code
    that differs, 0 if none does; that of other integers, the share of rows that differ. With rounded activations, the error of
    numbers is the root mean square of the difference, divided by that of the values, and ROUNDED is allowed.
    """

    spec: GraphSpec
    tolerance: float
    reference: str = "the torch module"
    """What the graph is compared with, for messages."""
    of_form: bool = False
    """Whether the graph is a form, and not the portable graph."""
    error: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        if self.spec.rounds_activations:
            self.tolerance = ROUNDED

    def parity(self) -> Parity:
        """Return the manifest's entry."""
        return Parity(self.error, self.tolerance, PROVIDER)

    def add(self, expected: Expected, found: Expected) -> None:
        """Compare all results and the final state."""
        for n, (wanted, given) in enumerate(zip(expected.results, found.results, strict=True)):
            for name, value in wanted.items():
                if expected.sure:
                    self._frames(name, value, given[name], expected.sure[n])
                elif value.dtype != np.int64:
                    self.values(name, value, given[name])
                elif expected.margins:
                    self._codes(name, value, given[name], expected.margins[n], expected.chain)
                else:
                    self._rows(name, value, given[name])
        of_codec = any(tensor.name == "audio" for tensor in self.spec.results)
        for name, value in expected.state.items():
            self.values(name, value, found.state[name], 1.0 if self.of_form and of_codec else PEAK)

    def values(self, name: str, expected: Array, actual: Array, peak: float = PEAK) -> None:
        """Compare two arrays of numbers."""
        self._same_shape(name, expected, actual)
        wanted = expected.astype(np.float64)
        difference = np.abs(wanted - actual.astype(np.float64))
        largest = float(difference.max())
        if self.spec.rounds_activations:
            error = float(np.sqrt(np.mean(difference**2) / (np.mean(wanted**2) or 1.0)))
        else:
            error = largest / max(1.0, float(np.abs(wanted).max()) / peak)
        self._add(error, f"{name} differs by {largest:.3g}")

    def _frames(self, name: str, expected: Array, actual: Array, sure: npt.NDArray[np.bool_]) -> None:
        """Compare the frames of latents [batch, frames, …] that are sure, at least LEAST_SURE of all."""
        self._same_shape(name, expected, actual)
        if sure.mean() < LEAST_SURE:
            raise ExportError(
                f"{self.spec.file} cannot be compared: the codes of {1 - sure.mean():.0%} of the frames are unclear",
                hint="are these the weights of a trained codec?",
            )
        self.values(name, expected[sure], actual[sure])

    def _rows(self, name: str, expected: Array, actual: Array) -> None:
        """Compare two arrays of integers [batch, …]."""
        self._same_shape(name, expected, actual)
        differ = (expected != actual).reshape(len(expected), -1).any(axis=1)
        self._add(float(differ.mean()), f"{differ.sum()} of {len(differ)} rows of {name} differ")

    def _codes(self, name: str, expected: Array, actual: Array, margins: npt.NDArray[np.float32], chain: int) -> None:
        """Compare codes int64 [batch, codebooks, frames]; see `flipped_margin`."""
        self._same_shape(name, expected, actual)
        count = int((expected != actual).sum())
        self._add(flipped_margin(expected, actual, margins, chain), f"{count} of {expected.size} {name} differ")

    def _add(self, error: float, what: str) -> None:
        if not error <= self.tolerance:  # also when the error is NaN
            raise ExportError(
                f"{self.spec.file} is not {self.reference}: {what} (error {error:.3g}; {self.tolerance:.3g} is allowed)",
                hint="this is a fault of the export, not of the checkpoint; please report it",
            )
        self.error = max(self.error, error)

    def _same_shape(self, name: str, expected: Array, actual: Array) -> None:
        if expected.shape != actual.shape:
            raise ExportError(f"{self.spec.file}: {name} has shape {actual.shape}, {self.reference} gives {expected.shape}")


def flipped_margin(expected: Array, actual: Array, margins: npt.NDArray[np.float32], chain: int) -> float:
    """Return the largest margin of a code that differs; 0.0 if no code [batch, codebooks, frames] does.

    Only the first difference in a chain counts: the codes after it are those of another residual.
    """
    differ = (expected != actual).reshape(-1, chain, expected.shape[-1])
    first = differ & (differ.cumsum(axis=1) == 1)
    return float(margins.reshape(differ.shape)[first].max(initial=0.0))
