"""The boundary between speech and the libraries that run graphs: numpy arrays in, numpy arrays out, by name."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .spec import GraphSpec

Array = npt.NDArray[np.generic]


class Resident(Protocol):
    """A result that stayed on the device; it can be fed to engines of the same provider. On the CPU it is the array itself."""

    @property
    def shape(self) -> tuple[int, ...]:
        """As that of an array."""
        ...

    @property
    def dtype(self) -> np.dtype[Any]:
        """As that of an array."""
        ...

    def numpy(self) -> Array:
        """A copy on the host."""
        ...


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

    def run(
        self, feeds: Mapping[str, Array | Resident], state: State | None = None, resident: Collection[str] = ()
    ) -> dict[str, Any]:
        """Runs the graph once and updates `state` in place.

        `feeds` holds exactly the arrays of `spec.feeds`; the result holds those of `spec.results`, of which those named in
        `resident` stay on the device. An array that owns its memory and cannot be written is taken to be constant: calls of the
        same shapes copy it to a device once. The next call with the same state may overwrite a result: copy what must outlive it.
        Raises ValueError for wrong names, dtypes or shapes.
        """
        ...
