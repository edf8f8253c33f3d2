"""The boundary between speech and the libraries that run graphs: numpy arrays in, numpy arrays out, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt

from .spec import GraphSpec

Array = npt.NDArray[np.generic]


class State(Protocol):
    """The tensors that a graph carries between calls. Owned by the engine that made it, and kept where that engine runs."""

    @property
    def dims(self) -> Mapping[str, int]:
        """The sizes that the symbolic dimensions of the state tensors were given."""
        ...

    def read(self, name: str) -> Array:
        """A copy of one state tensor, by its input name."""
        ...

    def write(self, name: str, array: Array) -> None:
        """Puts an array into the leading part of one state tensor, by its input name: the inverse of `read`, or of part of it."""
        ...

    def grow(self, **dims: int) -> None:
        """Enlarges dimensions. What is there stays where it is; the new part is zeros. Raises FishrtError if memory lacks."""
        ...


class Engine(Protocol):
    """One loaded graph."""

    @property
    def spec(self) -> GraphSpec:
        """The graph's contract."""
        ...

    @property
    def provider(self) -> str:
        """The execution provider in use: "cpu", "cuda", …"""
        ...

    def new_state(self, **dims: int) -> State:
        """State of zeros, allocated once at the given sizes. Raises FishrtError if it does not fit into memory."""
        ...

    def run(self, feeds: Mapping[str, Array], state: State | None = None) -> dict[str, Array]:
        """Runs the graph once and updates `state` in place.

        `feeds` holds exactly the arrays of `spec.feeds`; the result holds those of `spec.results`. A result may be overwritten by
        the next call with the same state, so copy what must outlive it. Raises ValueError for wrong names, dtypes or shapes.
        """
        ...
