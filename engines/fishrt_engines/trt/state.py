"""Tensors that stay on the device between runs of a plan: state, and results for the next graph."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
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


@dataclass(frozen=True, slots=True, eq=False)
class Loaded:
    """A plan on the device."""

    device: Device
    spec: GraphSpec
    """Description of the portable graph, as callers see it."""
    plan: Plan
    in_place: Collection[str]
    """Input names of state tensors that the plan updates in place."""
    contexts: Sequence[Any]
    """The execution context of each profile: see `engine`."""
    limits: Mapping[str, int]
    """The largest size of each symbolic dimension: see `largest_sizes`."""

    def takes(self, dims: Mapping[str, int]) -> bool:
        """Return whether sizes of a state, or of a call, are in the ranges that it was built for."""
        within = all(size <= self.limits.get(name, size) for name, size in dims.items())
        return within and any(profile.holds(dims) for profile in self.plan.key.profiles)

    def check_sizes(self, dims: Mapping[str, int]) -> None:
        """Check that state fits into the plan's limits. Raises FishrtError otherwise."""
        limits = self.limits
        if beyond := [f"{name} of {size}, built for {limits[name]}" for name, size in dims.items() if size > limits[name]]:
            raise FishrtError(f"the TensorRT plan of {self.spec.file} is too small: {', '.join(beyond)}", hint=LARGER)


def largest_sizes(spec: GraphSpec, plan: Plan) -> dict[str, int]:
    """Return the largest size of each symbolic dimension of a portable graph in the plan's profiles and caches."""
    most: dict[str, int] = {}
    for profile in plan.key.profiles:
        most |= {name: max(high, most.get(name, 0)) for name, (_, _, high) in profile.dims.items()}
    for described, built in zip(spec.state_tensors, plan.spec.state_tensors, strict=True):
        pairs = zip(described.shape, built.shape, strict=True)
        most |= {name: size for name, size in pairs if isinstance(name, str) and isinstance(size, int)}
    return most


class TrtState(OneRow):
    """State tensors on the device. See `engine.State`.

    A cache has the plan's full length from the start; `dims` holds the requested length. A tensor that the plan does not update
    in place has two buffers, which alternate as input and output. Of several plans, a state belongs to the shortest that takes
    its calls, and moves to a longer one as it grows.
    """

    def __init__(self, plans: Sequence[Loaded], dims: Mapping[str, int]) -> None:
        """Allocate zeros. plans: of the engine, the shortest first.

        Raises ValueError for other dimensions than the graph's, FishrtError beyond the plans or the memory.
        """
        check_state_dims(plans[0].spec, dims)
        self.plans, self.dims = plans, dict(dims)
        self.loaded = self._that_takes(dims)
        self.loaded.check_sizes(dims)
        self.turned = False
        self.calls: OrderedDict[tuple[tuple[int, ...], ...], Call] = OrderedDict()
        self._buffers = self._allocate()

    def read(self, name: str) -> Array:
        """See `engine.State.read`."""
        device, tensor, stored = self.loaded.device, *self._specs(name)
        shape = tensor.resolve(self.dims)
        raw = np.empty(math.prod(shape) * item_size(stored.dtype), np.uint8)
        with device.lock:
            for offset, part in self._parts(stored, shape, raw):
                device.download(self.address(name) + offset, part)
            device.synchronize()
        return from_bytes(raw, stored.dtype, np.dtype(tensor.dtype), shape)

    def write(self, name: str, array: Array) -> None:
        """See `engine.State.write`. Raises ValueError for an array that does not fit."""
        device, tensor, stored = self.loaded.device, *self._specs(name)
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
        loaded = self.loaded if self.loaded.takes(larger) else self._that_takes(larger)
        loaded.check_sizes(larger)
        before, after = (plan.plan.spec.state_tensors for plan in (self.loaded, loaded))
        if any(a.resolve(self.dims) != b.resolve(larger) for a, b in zip(before, after, strict=True)):
            self._move(loaded, larger)
        self.dims = larger

    def move_for(self, dims: Mapping[str, int]) -> None:
        """Move to a longer plan if a call of these sizes, such as a long prompt, needs one."""
        if not self.loaded.takes(dims) and (longer := self._that_takes(dims)) is not self.loaded:
            self._move(longer, self.dims)

    def _that_takes(self, dims: Mapping[str, int]) -> Loaded:
        """Return the shortest plan that takes these sizes; the longest if none does."""
        return next((plan for plan in self.plans if plan.takes(dims)), self.plans[-1])

    def _move(self, loaded: Loaded, dims: Mapping[str, int]) -> None:
        made = TrtState([loaded], dims)
        for tensor in loaded.spec.state_tensors:
            made.write(tensor.name, self.read(tensor.name))
        self.loaded, self._buffers, self.turned = loaded, made._buffers, False
        self.calls.clear()

    def copy_rows(self, source: State, row: int, length: int) -> None:
        """See `State.copy_rows`. The copy goes through the host."""
        dims = {name: 1 if name == "batch" else length for name in self.dims}
        for t in self.loaded.spec.state_tensors:
            self.row(row).write(t.name, source.read(t.name)[tuple(map(slice, t.resolve(dims)))])

    def address(self, name: str, *, after: bool = False) -> int:
        """Return the address of a state tensor, by its input name; with `after`, its address after the next run."""
        buffers = self._buffers[name]
        return buffers[(self.turned ^ after) % len(buffers)].address

    def turn(self) -> None:
        """Swap alternating buffers after a run."""
        self.turned ^= any(len(buffers) > 1 for buffers in self._buffers.values())

    def _allocate(self) -> dict[str, tuple[DeviceBuffer, ...]]:
        device, what = self.loaded.device, f"the state of {self.loaded.spec.file}"
        tensors = self.loaded.plan.spec.state_tensors
        sizes = {t.name: math.prod(t.resolve(self.dims)) * item_size(t.dtype) for t in tensors}
        counts = {name: 1 if name in self.loaded.in_place else 2 for name in sizes}
        with device.lock:
            device.check_room(sum(counts[name] * size for name, size in sizes.items()), what)
            return {name: tuple(device.allocate(size, what) for _ in range(counts[name])) for name, size in sizes.items()}

    def _specs(self, name: str) -> tuple[TensorSpec, TensorSpec]:
        """Return the descriptions of a state tensor for callers and in the plan. Raises KeyError for an unknown name."""
        found = [{t.name: t for t in spec.state_tensors}[name] for spec in (self.loaded.spec, self.loaded.plan.spec)]
        return found[0], found[1]

    def _parts(self, stored: TensorSpec, shape: tuple[int, ...], raw: Array) -> Iterator[tuple[int, Array]]:
        """Yield the contiguous parts of the leading `shape` of a state tensor: byte offset, and the part of `raw`."""
        whole = stored.resolve(self.dims)
        split = max((axis for axis, size in enumerate(whole) if shape[axis] != size), default=0)
        strides = [math.prod(whole[axis + 1 :]) * item_size(stored.dtype) for axis in range(split)]
        length = math.prod(shape[split:]) * item_size(stored.dtype)
        for n, index in enumerate(np.ndindex(shape[:split])):
            yield sum(i * stride for i, stride in zip(index, strides, strict=True)), raw[n * length : (n + 1) * length]
