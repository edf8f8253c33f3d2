"""Tensors that stay on the device between runs of a plan: state, and results for the next graph."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..engine import Array, GraphSpec, OneRow, State, TensorSpec, check_growth, check_state_dims, check_written
from ..errors import FishrtError
from ..ort.tensors import from_bytes, item_size, to_bytes
from .device import Device, DeviceBuffer, Graph
from .plans import LARGER, Plan


class DeviceArray:
    """A result on the device. See `engine.Resident`."""

    def __init__(self, device: Device, buffer: DeviceBuffer, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.device, self.buffer, self.shape, self.dtype = device, buffer, shape, dtype

    def numpy(self) -> Array:
        """Return a copy on the host."""
        array = np.empty(self.shape, self.dtype)
        with self.device.lock:
            self.device.download(self.buffer.address, array)
            self.device.synchronize()
        return array


@dataclass(frozen=True, slots=True)
class Tensor:
    """A feed or result: its device buffer and its pinned host buffer."""

    device: DeviceBuffer
    host: Array


@dataclass(slots=True)
class Call:
    """Buffers for one combination of shapes."""

    profile: int
    shapes: Mapping[str, tuple[int, ...]]
    """Shapes of all inputs, state included."""
    feeds: dict[str, Tensor]
    results: dict[str, Tensor]
    graphs: dict[bool, tuple[int, Graph]] = field(default_factory=dict)
    """Captured graphs by `TrtState.turned`, each with the context's `changes` at its capture."""
    constants: dict[str, Any] = field(default_factory=dict)
    """Constant feeds that are already on the device."""
    waits: int = -1
    """`Device.waits` at its last run: while it is unchanged, copies from its arrays may be unfinished."""


@dataclass(frozen=True, slots=True)
class Kept:
    """The facts common to all states of an engine."""

    device: Device
    spec: GraphSpec
    """Description of the portable graph, as callers see it."""
    plan: Plan
    in_place: Collection[str]
    """Input names of state tensors that the plan updates in place."""

    @property
    def limits(self) -> dict[str, int]:
        """Return the largest size of each symbolic dimension in the plan's profiles."""
        most: dict[str, int] = {}
        for profile in self.plan.key.profiles:
            most |= {name: max(high, most.get(name, 0)) for name, (_, _, high) in profile.dims.items()}
        for described, built in zip(self.spec.state_tensors, self.plan.spec.state_tensors, strict=True):
            pairs = zip(described.shape, built.shape, strict=True)
            most |= {name: size for name, size in pairs if isinstance(name, str) and isinstance(size, int)}
        return most

    def check_sizes(self, dims: Mapping[str, int]) -> None:
        """Check that state fits into the plan's limits. Raises FishrtError otherwise."""
        limits = self.limits
        if beyond := [f"{name} of {size}, built for {limits[name]}" for name, size in dims.items() if size > limits[name]]:
            raise FishrtError(f"the TensorRT plan of {self.spec.file} is too small: {', '.join(beyond)}", hint=LARGER)


class TrtState(OneRow):
    """State tensors on the device. See `engine.State`.

    A cache has the plan's full length from the start; `dims` holds the requested length. A tensor that the plan does not update
    in place has two buffers, which alternate as input and output.
    """

    def __init__(self, kept: Kept, dims: Mapping[str, int]) -> None:
        """Allocate zeros. Raises ValueError for other dimensions than the graph's, FishrtError beyond the plan or the memory."""
        check_state_dims(kept.spec, dims)
        kept.check_sizes(dims)
        self.kept, self.dims = kept, dict(dims)
        self.turned = False
        self.calls: OrderedDict[tuple[tuple[int, ...], ...], Call] = OrderedDict()
        self._buffers = self._allocate()

    def read(self, name: str) -> Array:
        """See `engine.State.read`."""
        device, tensor, stored = self.kept.device, *self._specs(name)
        shape = tensor.resolve(self.dims)
        raw = np.empty(math.prod(shape) * item_size(stored.dtype), np.uint8)
        with device.lock:
            for offset, part in self._parts(stored, shape, raw):
                device.download(self.address(name) + offset, part)
            device.synchronize()
        return from_bytes(raw, stored.dtype, np.dtype(tensor.dtype), shape)

    def write(self, name: str, array: Array) -> None:
        """See `engine.State.write`. Raises ValueError for an array that does not fit."""
        device, tensor, stored = self.kept.device, *self._specs(name)
        check_written(name, tensor.dtype, tensor.resolve(self.dims), array)
        raw = to_bytes(array, stored.dtype)
        with device.lock:
            for offset, part in self._parts(stored, array.shape, raw):
                device.upload(part, self.address(name) + offset)
            device.synchronize()

    def grow(self, **dims: int) -> None:
        """See `engine.State.grow`. Raises ValueError for unknown or smaller dimensions, FishrtError beyond the plan's limits."""
        check_growth(self.dims, dims)
        larger = {**self.dims, **dims}
        self.kept.check_sizes(larger)
        if any(stored.resolve(self.dims) != stored.resolve(larger) for stored in self.kept.plan.spec.state_tensors):
            made = TrtState(self.kept, larger)
            for tensor in self.kept.spec.state_tensors:
                made.write(tensor.name, self.read(tensor.name))
            self._buffers, self.turned = made._buffers, False
            self.calls.clear()
        self.dims = larger

    def copy_rows(self, source: State, row: int, length: int) -> None:
        """See `State.copy_rows`. The copy goes through the host."""
        dims = {name: 1 if name == "batch" else length for name in self.dims}
        for t in self.kept.spec.state_tensors:
            self.row(row).write(t.name, source.read(t.name)[tuple(map(slice, t.resolve(dims)))])

    def address(self, name: str, *, after: bool = False) -> int:
        """Return the address of a state tensor, by its input name; with `after`, its address after the next run."""
        buffers = self._buffers[name]
        return buffers[(self.turned ^ after) % len(buffers)].address

    def turn(self) -> None:
        """Swap alternating buffers after a run."""
        self.turned ^= any(len(buffers) > 1 for buffers in self._buffers.values())

    def _allocate(self) -> dict[str, tuple[DeviceBuffer, ...]]:
        device, what = self.kept.device, f"the state of {self.kept.spec.file}"
        tensors = self.kept.plan.spec.state_tensors
        sizes = {t.name: math.prod(t.resolve(self.dims)) * item_size(t.dtype) for t in tensors}
        counts = {name: 1 if name in self.kept.in_place else 2 for name in sizes}
        with device.lock:
            device.check_room(sum(counts[name] * size for name, size in sizes.items()), what)
            return {name: tuple(device.allocate(size, what) for _ in range(counts[name])) for name, size in sizes.items()}

    def _specs(self, name: str) -> tuple[TensorSpec, TensorSpec]:
        """Return the descriptions of a state tensor for callers and in the plan. Raises KeyError for an unknown name."""
        found = [{t.name: t for t in spec.state_tensors}[name] for spec in (self.kept.spec, self.kept.plan.spec)]
        return found[0], found[1]

    def _parts(self, stored: TensorSpec, shape: tuple[int, ...], raw: Array) -> Iterator[tuple[int, Array]]:
        """Yield the contiguous parts of the leading `shape` of a state tensor: byte offset, and the part of `raw`."""
        whole = stored.resolve(self.dims)
        split = max((axis for axis, size in enumerate(whole) if shape[axis] != size), default=0)
        strides = [math.prod(whole[axis + 1 :]) * item_size(stored.dtype) for axis in range(split)]
        length = math.prod(shape[split:]) * item_size(stored.dtype)
        for n, index in enumerate(np.ndindex(shape[:split])):
            yield sum(i * stride for i, stride in zip(index, strides, strict=True)), raw[n * length : (n + 1) * length]
