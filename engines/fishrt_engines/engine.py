"""The boundary between speech and the libraries that run graphs: numpy arrays in, numpy arrays out, by name."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .spec import GraphSpec

Array = npt.NDArray[np.generic]


class Resident(Protocol):
    """A result kept on the device, which can be fed to engines of the same provider. On the CPU it is the array itself."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape, as of an array."""
        ...

    @property
    def dtype(self) -> np.dtype[Any]:
        """Return the dtype, as of an array."""
        ...

    def numpy(self) -> Array:
        """Return a copy on the host."""
        ...


class State(Protocol):
    """The tensors that a graph carries between calls, in the memory of the engine that made them."""

    @property
    def dims(self) -> Mapping[str, int]:
        """Return the size of each symbolic dimension of the state tensors."""
        ...

    def read(self, name: str) -> Array:
        """Return a copy of one state tensor, by its input name."""
        ...

    def write(self, name: str, array: Array) -> None:
        """Copy an array into the leading part of one state tensor, by its input name: the inverse of `read`, or of part of it."""
        ...

    def grow(self, **dims: int) -> None:
        """Enlarge dimensions. Values keep their indices; the new part is zeros. Raises FishrtError if memory does not suffice."""
        ...


class Engine(Protocol):
    """One loaded graph."""

    @property
    def spec(self) -> GraphSpec:
        """Return the description of the graph."""
        ...

    @property
    def provider(self) -> str:
        """Return the name of the provider in use: "cpu", "cuda", …"""
        ...

    def new_state(self, **dims: int) -> State:
        """Return a state of zeros, allocated once at the given sizes. Raises FishrtError if it does not fit into memory."""
        ...

    def run(
        self, feeds: Mapping[str, Array | Resident], state: State | None = None, resident: Collection[str] = ()
    ) -> dict[str, Any]:
        """Run the graph once and update `state` in place.

        `feeds` holds exactly the arrays of `spec.feeds`. The result holds those of `spec.results`; the ones named in `resident`
        stay on the device. A read-only array that owns its memory counts as constant: calls of the same shapes copy it to a
        device once. The next call with the same state may overwrite a result: copy it to keep it.
        Raises ValueError for wrong names, dtypes or shapes.
        """
        ...
