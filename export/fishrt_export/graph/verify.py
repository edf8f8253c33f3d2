"""Comparison of exported graphs with the torch module, which has the weights that the file holds.

All get equal calls, with the state carried, and every output is compared.
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
from fishrt_engines import Array
from fishrt_engines.engine import GraphSpec

from ..checkpoint.quantised.integers import Integers
from ..checkpoint.quantised.levels import TABLES, Levels
from ..checkpoint.weights import Lazy
from ..errors import ExportError
from .kept.blocks import Blocks
from .kept.levels import LARGEST
from .kept.tables import GROUPS
from .quantise import relative_error, unpack
from .recipe import Storage
from .report import Case, Expected, Feeds, compare
from .store import BIASES, ORDER, SCALES, SHIFTS, ZEROS, stored_float

WORST = 0.5
"""Largest relative error of rounding. A larger one means that the integers are of another weight."""

_FOUR_BITS = (ir.DataType.INT4, ir.DataType.UINT4)
_TYPES = {ir.DataType.FLOAT: torch.float32, ir.DataType.INT64: torch.int64}


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
    module: nn.Module,
    specs: Sequence[GraphSpec],
    folder: Path,
    cases: Iterable[Case],
    tolerance: float,
    margins: Margins | None = None,
) -> list[Parity]:
    """Return the error of each graph of `specs`, all of this module. Raises ExportError if one is larger than allowed.

    The first is the portable graph. With `margins`, codes may differ whose margin is at most theirs, and latents of such codes;
    see report.Report. One graph at a time is in memory.
    """
    expected = [(case, expect(module, specs[0], case, margins)) for case in cases]
    allowed = margins.allowed if margins and _has_codes(specs[0]) else tolerance
    return [compare(spec, folder, expected, allowed, of_form=spec is not specs[0]) for spec in specs]


def expect(module: nn.Module, spec: GraphSpec, case: Case, margins: Margins | None = None) -> Expected:
    """Return what the module gives for a case."""
    carried = [torch.zeros(tensor.resolve(case.dims)) for tensor in spec.state_tensors]
    results = []
    for feeds in case.calls:
        found, carried = run_module(module, spec, feeds, carried)
        results.append(found)
    state = {tensor.name: kept.numpy() for tensor, kept in zip(spec.state_tensors, carried, strict=True)}
    if margins is None:
        return Expected(results, state)
    measured = [_measured(margins, feeds) for feeds in case.calls]
    if _has_codes(spec):
        return Expected(results, state, measured, margins.chain)
    return Expected(results, state, sure=[np.all(margin > margins.allowed, axis=1) for margin in measured])


def _has_codes(spec: GraphSpec) -> bool:
    return spec.results[0].dtype == "int64"


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


def _measured(margins: Margins, feeds: Feeds) -> npt.NDArray[np.float32]:
    (audio,) = feeds.values()
    with torch.no_grad():
        return np.asarray(margins.measure(torch.from_numpy(audio)).numpy(), np.float32)


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
        value = self._stored(name, storage.precision, tuple(source.shape))
        error = self.errors[name] = relative_error(value, source)
        if not error <= WORST:  # also when the error is NaN
            raise ExportError(
                f"{self._path.name} does not hold {name}: its integers differ from the checkpoint by {error:.0%}",
                hint=f"keep it in more bits with --keep {name.removesuffix('.weight')}=fp32, and please report it",
            )
        return value

    def _stored(self, name: str, precision: str, shape: tuple[int, ...]) -> Tensor:
        """Return the weight of this shape that the file's integers or codes stand for."""
        if precision in LARGEST:
            codes, largest = (self._raw(name + end).view(shape[0], -1) for end in ("", LARGEST[precision]))
            return Levels(codes, torch.tensor(TABLES[precision]), largest.view(torch.float32), shape[1]).widened()
        integers, scales = self._read(name), self._read(name + SCALES)
        zeros, biases, order = (
            self._read(name + end) if name + end in self._initializers else None for end in (ZEROS, BIASES, ORDER)
        )
        if name + GROUPS in self._initializers:
            return Integers(integers, scales, 8, biases=biases).widened()
        return Blocks(integers, scales, zeros, biases, order).widened()

    def _read(self, name: str) -> Tensor:
        """Return an initialiser of integers or float32, unsigned integers as signed ones less half their range."""
        tensor, stored = self._initializers[name].const_value, self._raw(name)
        assert tensor is not None
        shape, kind = tuple(tensor.shape.numpy()), tensor.dtype
        if kind in _FOUR_BITS:
            found = unpack(stored, shape)
            return found ^ SHIFTS[4] if kind == ir.DataType.UINT4 else found
        found = stored.view(_TYPES.get(kind, torch.int8)).view(shape)
        return found ^ SHIFTS[8] if kind == ir.DataType.UINT8 else found

    def _raw(self, name: str) -> Tensor:
        """Return the bytes of an initialiser. It is not mapped: mapped pages count as this process's memory."""
        tensor = self._initializers[name].const_value
        assert tensor is not None
        if isinstance(tensor, ir.ExternalTensor):
            raw = np.fromfile(self._path.parent / tensor.location, np.uint8, tensor.length or 0, offset=tensor.offset or 0)
        else:
            raw = np.frombuffer(tensor.tobytes(), np.uint8).copy()
        return torch.from_numpy(raw)
