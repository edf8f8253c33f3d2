"""Memory that a session reads and writes in place: numpy arrays here, a device's memory in `ort.device`.

Sessions are bound to addresses, so that one row of a tensor can be bound like a whole one. Both kinds of tensor have the same
methods.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..engine import Array
from ..rewrite.onnx_proto import CODES

_STORED = {"bfloat16": "uint16"}
"""Element types that numpy lacks, and the numpy type that holds their bits."""


@dataclass(frozen=True, slots=True)
class Place:
    """Address, type and shape of a tensor, as a session binds it."""

    device: str
    """ONNX Runtime's name: "cpu", "cuda"."""
    pointer: int
    element: str
    """Name of the element type in the graph; it may be one that numpy lacks."""
    shape: tuple[int, ...]
    nbytes: int
    owner: object
    """The object that keeps the memory alive."""

    def row(self, n: int) -> Place:
        """Return the place of the n-th part along the first dimension, as a tensor of one row."""
        step = self.nbytes // self.shape[0]
        return Place(self.device, self.pointer + n * step, self.element, (1, *self.shape[1:]), step, self.owner)

    def bind_input(self, binding: Any, name: str) -> None:
        """Bind a session's input to this place."""
        binding.bind_input(name, self.device, 0, CODES[self.element], list(self.shape), self.pointer)

    def bind_output(self, binding: Any, name: str) -> None:
        """Bind a session's output to this place."""
        binding.bind_output(name, self.device, 0, CODES[self.element], list(self.shape), self.pointer)


class Tensor(Protocol):
    """Memory of a fixed size at a fixed address."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape."""
        ...

    @property
    def dtype(self) -> np.dtype[Any]:
        """Return the dtype that callers see. Copies convert values where the graph's element type differs."""
        ...

    @property
    def place(self) -> Place:
        """Return the place of this tensor."""
        ...

    def put(self, value: Any) -> None:
        """Copy a whole array, or a tensor of the same memory, into it."""
        ...

    def lead(self, value: Any) -> None:
        """Copy a smaller array, or tensor of the same memory, into its leading part."""
        ...

    def clear(self) -> None:
        """Fill it with zeros."""
        ...

    def numpy(self) -> Array:
        """Return a copy as an array."""
        ...

    def result(self, *, resident: bool) -> Any:
        """Return the value for a caller of `run`: an array, or the tensor itself if it is `resident` on a device."""
        ...


class Memory(Protocol):
    """The memory of a session's tensors."""

    device: str

    def zeros(self, shape: Sequence[int], dtype: str, element: str) -> Tensor:
        """Return a new tensor of zeros. Errors of numpy or ONNX Runtime for too little memory go through."""
        ...

    def upload(self, array: Array) -> Any:
        """Return an array of the host as a resident result."""
        ...

    def holds(self, value: object) -> bool:
        """Return whether a feed is a tensor of this memory."""
        ...


class HostTensor:
    """A numpy array as a `Tensor`."""

    def __init__(self, array: Array) -> None:
        self.array = array

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape."""
        return self.array.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Return the array's dtype."""
        return self.array.dtype

    @property
    def place(self) -> Place:
        """Return the place of this tensor."""
        a = self.array
        return Place("cpu", a.ctypes.data, a.dtype.name, a.shape, a.nbytes, a)

    def put(self, value: Array) -> None:
        """See `Tensor.put`."""
        self.array[...] = value

    def lead(self, value: Array | HostTensor) -> None:
        """See `Tensor.lead`."""
        array = value.array if isinstance(value, HostTensor) else value
        self.array[tuple(map(slice, array.shape))] = array

    def clear(self) -> None:
        """See `Tensor.clear`."""
        self.array[...] = 0

    def numpy(self) -> Array:
        """See `Tensor.numpy`."""
        return self.array.copy()

    def result(self, *, resident: bool) -> Array:
        """Return the array itself."""
        return self.array


class HostMemory:
    """The host's memory. See `Memory`."""

    device = "cpu"

    def zeros(self, shape: Sequence[int], dtype: str, element: str) -> HostTensor:
        """See `Memory.zeros`. `element` must be `dtype`: on the CPU, nothing is converted."""
        assert element == dtype
        try:
            return HostTensor(np.zeros(tuple(shape), dtype))
        except ValueError as error:  # numpy raises it for a size beyond the address space
            raise MemoryError(str(error)) from None

    def upload(self, array: Array) -> Array:
        """See `Memory.upload`."""
        return array

    def holds(self, value: object) -> bool:
        """See `Memory.holds`."""
        return False


def item_size(element: str) -> int:
    """Return the bytes of one value."""
    return np.dtype(_STORED.get(element, element)).itemsize


def to_bytes(array: Array, element: str) -> npt.NDArray[np.uint8]:
    """Return the values as stored on a device, uint8 [bytes]: rounded to the nearest of `element`, ties to even."""
    if element == "bfloat16":
        stored: Array = _bfloat16_bits(np.ascontiguousarray(array, np.float32))
    else:
        stored = np.ascontiguousarray(array, element)
    return stored.reshape(-1).view(np.uint8)


def from_bytes(raw: npt.NDArray[np.uint8], element: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
    """Return a new array of `dtype`: the inverse of `to_bytes`."""
    stored = raw.view(_STORED.get(element, element)).reshape(shape)
    if element == "bfloat16":
        return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(dtype, copy=False)
    return stored.astype(dtype)


def _bfloat16_bits(array: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Return the bits of the nearest bfloat16, which is the upper half of a float32."""
    bits = array.reshape(-1).view(np.uint32)
    nearest = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    quiet = bits | np.uint32(0x400000)  # rounding could turn a NaN into an infinity
    return (np.where(np.isnan(array.reshape(-1)), quiet, nearest) >> np.uint32(16)).astype(np.uint16)
