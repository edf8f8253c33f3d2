"""Description of a graph: names, dtypes and symbolic shapes of its inputs and outputs, and the state carried between calls.

One `GraphSpec` drives the export call, the manifest entry, the check when a graph is opened, and the engine's binding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Dim = int | str
"""A fixed size, or the name of a dimension whose size is known when the graph runs."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output. `dtype` is numpy's name for it: float32, int64, …"""

    name: str
    dtype: str
    shape: tuple[Dim, ...]

    def resolve(self, dims: Mapping[str, int]) -> tuple[int, ...]:
        """Return the shape with every symbolic dimension replaced. Raises KeyError for a name that `dims` lacks."""
        return tuple(dims[d] if isinstance(d, str) else d for d in self.shape)


@dataclass(frozen=True, slots=True)
class StatePair:
    """Input name and output name of a tensor that the graph updates."""

    input: str
    output: str


@dataclass(frozen=True, slots=True)
class GraphSpec:
    """The contract of one graph file. `inputs` and `outputs` are in the file's order and include the state tensors."""

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    states: tuple[StatePair, ...] = ()

    @property
    def feeds(self) -> tuple[TensorSpec, ...]:
        """Return the inputs that a caller gives: all but the state."""
        carried = {pair.input for pair in self.states}
        return tuple(t for t in self.inputs if t.name not in carried)

    @property
    def results(self) -> tuple[TensorSpec, ...]:
        """Return the outputs that a caller gets: all but the state."""
        carried = {pair.output for pair in self.states}
        return tuple(t for t in self.outputs if t.name not in carried)

    @property
    def state_tensors(self) -> tuple[TensorSpec, ...]:
        """Return the inputs that carry state, in the order of `states`."""
        by_name = {t.name: t for t in self.inputs}
        return tuple(by_name[pair.input] for pair in self.states)
