"""The contract of an engine: the description of a graph, numpy arrays in and out by name, and checks that the arrays fit.

One `GraphSpec` drives the export call, the manifest entry, the check when a graph is opened, and the engine's binding.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.generic]
Dim = int | str
"""A fixed size, or the name of a dimension whose size is known when the graph runs."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output. `dtype` is numpy's name for it: float32, int64, …; a device's state may be bfloat16, too."""

    name: str
    dtype: str
    shape: tuple[Dim, ...]

    def resolve(self, dims: Mapping[str, int]) -> tuple[int, ...]:
        """Return the shape with every symbolic dimension replaced. Raises KeyError for a name that `dims` lacks."""
        return tuple(dims[d] if isinstance(d, str) else d for d in self.shape)

    def nbytes(self, dims: Mapping[str, int]) -> int:
        """Return the bytes of a tensor with these sizes. Raises KeyError as `resolve`."""
        size = 2 if self.dtype == "bfloat16" else np.dtype(self.dtype).itemsize
        return prod(self.resolve(dims)) * size

    @property
    def as_read(self) -> str:
        """The dtype in which a state's tensor is read and written: float32 for floats of 16 bits."""
        return "float32" if self.dtype in ("bfloat16", "float16") else self.dtype


@dataclass(frozen=True, slots=True)
class StatePair:
    """Input name and output name of a tensor that the graph updates."""

    input: str
    output: str


@dataclass(frozen=True, slots=True)
class ColumnInputs:
    """Names of the inputs of a rewritten graph that give the positions of a call's columns."""

    write_index: str
    """int64 [batch]"""
    position_ids: str
    """int64 [batch, length]"""
    rows: str | None = None
    """int32 [], an added input: filled cache rows after a call, the largest number in the batch. A larger number, up to the
    cache's length, gives the same values; only a batch of prompts needs the exact one. Read on the CPU."""
    cache: str | None = None
    """With `rows`: one of the caches, [batch, heads, rows, width]."""


@dataclass(frozen=True, slots=True)
class GraphSpec:
    """The contract of one graph file. `inputs` and `outputs` are in the file's order and include the state tensors."""

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    states: tuple[StatePair, ...] = ()
    columns: ColumnInputs | None = None
    """Inputs of attention that writes consecutive columns at their own positions; None: a graph of standard operators."""
    rounds_activations: bool = False
    """Whether products with quantised weights are computed in integers on a CPU: activations are rounded to 8 bits, in
    blocks by this option or in rows by the file."""
    identity: str = ""
    """Hash of the file and its weights, by which results for this machine are cached; empty: they are not."""

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

    def row(self, n: int) -> State:
        """Return row n of the batch as a state. It shares the memory of this one, also after that has grown."""
        ...

    def rows(self, count: int) -> State:
        """Return the first `count` rows of the batch as a state, in the same way."""
        ...

    def copy_rows(self, source: State, row: int, length: int) -> None:
        """Copy the first `length` positions of `source`, a state of one row of the same engine, to the front of row `row`.

        Positions are the open dimension behind the batch. Raises ValueError if they do not fit.
        """
        ...


class OneRow:
    """The rows of a state that is always used as a whole."""

    dims: Mapping[str, int]

    def row(self, n: int) -> Self:
        """See `State.row`. Raises ValueError unless it is the only one."""
        return self.rows(0 if n else 1)

    def rows(self, count: int) -> Self:
        """See `State.rows`. Raises ValueError unless these are all rows."""
        if count != self.dims["batch"]:
            raise ValueError(f"{type(self).__name__} cannot be parted into rows: use one state for each row")
        return self

    def copy_rows(self, source: State, row: int, length: int) -> None:
        """Raises ValueError: nothing is copied between such states."""
        raise ValueError(f"nothing can be copied into a {type(self).__name__}")


@dataclass(frozen=True, slots=True)
class Traits:
    """What a caller may make use of."""

    parts_states: bool = True
    """A state gives rows of its batch as states, and takes copies of rows where it is kept."""
    few_sizes: bool = False
    """Each size of a state costs much the first time, so that few sizes should be used."""


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

    @property
    def traits(self) -> Traits:
        """Return what callers may make use of."""
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


def check_feeds(spec: GraphSpec, feeds: Mapping[str, Any], known: Mapping[str, int]) -> dict[str, int]:
    """Return the size of every symbolic dimension of the feeds and the state. Raises ValueError for feeds that do not fit.

    feeds: arrays, or other objects with `dtype` and `shape`. known: sizes of the state's dimensions.
    """
    wanted = [t.name for t in spec.feeds]
    if feeds.keys() != set(wanted):
        raise ValueError(f"feeds are {names(feeds)}; {spec.file} needs {names(wanted)}")
    dims = dict(known)
    for t in spec.feeds:
        array = feeds[t.name]
        if not hasattr(array, "shape") or array.dtype != t.dtype:
            raise ValueError(f"{t.name} is {getattr(array, 'dtype', type(array).__name__)}; {spec.file} needs {t.dtype}")
        fits = len(array.shape) == len(t.shape) and 0 not in array.shape
        if fits:
            sizes = zip(t.shape, array.shape, strict=True)
            fits = all((d if isinstance(d, int) else dims.setdefault(d, size)) == size for d, size in sizes)
        if not fits:
            where = ", ".join(f"{name} = {size}" for name, size in dims.items())
            shape = ", ".join(str(d) for d in t.shape)
            raise ValueError(f"{t.name} has shape {list(array.shape)}; {spec.file} needs [{shape}] with {where or 'sizes > 0'}")
    return dims


def is_constant(feed: object) -> bool:
    """Return whether a feed never changes, so that a device needs it once: a read-only array that owns its memory."""
    return isinstance(feed, np.ndarray) and feed.base is None and not feed.flags.writeable


def check_state_dims(spec: GraphSpec, dims: Mapping[str, int]) -> None:
    """Check that `dims` names the dimensions of the state tensors, each at least 1. Raises ValueError otherwise."""
    wanted = {d for t in spec.state_tensors for d in t.shape if isinstance(d, str)}
    if dims.keys() != wanted:
        raise ValueError(f"state dimensions are {names(dims)}; {spec.file} needs {names(wanted)}")
    if small := [f"{name} = {size}" for name, size in dims.items() if size < 1]:
        raise ValueError(f"state dimensions must be at least 1: {', '.join(small)}")


def check_growth(now: Mapping[str, int], dims: Mapping[str, int]) -> None:
    """Check that state dimensions are known and do not shrink. Raises ValueError otherwise."""
    if bad := [f"{name} = {size}" for name, size in dims.items() if size < now.get(name, size + 1)]:
        raise ValueError(f"state dimensions cannot become {', '.join(bad)}; they are {dict(now)}")


def check_written(tensor_name: str, dtype: str, shape: tuple[int, ...], array: Any) -> None:
    """Check that an array fits into a state tensor. Raises ValueError otherwise."""
    if array.dtype != dtype or array.ndim != len(shape) or any(a > b for a, b in zip(array.shape, shape, strict=True)):
        raise ValueError(f"{tensor_name} is {dtype} {list(shape)}; {array.dtype} {list(array.shape)} does not fit into it")


def names(of: Iterable[str]) -> str:
    """Return names as one text for messages."""
    return ", ".join(sorted(of)) or "none"
