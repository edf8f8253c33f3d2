"""Memory that a session reads and writes in place: numpy arrays here, a device's memory in `ort_device`.

Sessions are bound to addresses, so that one row of a tensor can be bound like a whole one. Both kinds of tensor have the same
methods, and a plan does not know which it holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .base import Array
from .onnx_proto import CODES

_STORED = {"bfloat16": "uint16"}
"""Element types that numpy lacks, and those that hold their bits."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor lies, as a session is told it."""

    device: str
    """ONNX Runtime's name: "cpu", "cuda"."""
    pointer: int
    element: str
    """Name of the element type in the graph; it may be one that numpy lacks."""
    shape: tuple[int, ...]
    nbytes: int
    owner: object
    """What keeps the memory alive."""

    def row(self, n: int) -> Place:
        """Where the n-th part along the first dimension lies, as a tensor of one row."""
        step = self.nbytes // self.shape[0]
        return Place(self.device, self.pointer + n * step, self.element, (1, *self.shape[1:]), step, self.owner)

    def bind_input(self, binding: Any, name: str) -> None:
        """Makes a session read this place."""
        binding.bind_input(name, self.device, 0, CODES[self.element], list(self.shape), self.pointer)

    def bind_output(self, binding: Any, name: str) -> None:
        """Makes a session write to this place."""
        binding.bind_output(name, self.device, 0, CODES[self.element], list(self.shape), self.pointer)


class Tensor(Protocol):
    """Memory of a fixed size at a fixed address."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes."""
        ...

    @property
    def dtype(self) -> np.dtype[Any]:
        """What callers see: values are converted on the way in and out where the graph's element type is another."""
        ...

    @property
    def place(self) -> Place:
        """Where it lies."""
        ...

    def put(self, value: Any) -> None:
        """Copies a whole array, or a tensor of the same memory, into it."""
        ...

    def lead(self, value: Any) -> None:
        """Copies a smaller array, or tensor of the same memory, into its leading part."""
        ...

    def clear(self) -> None:
        """Makes all of it zeros."""
        ...

    def numpy(self) -> Array:
        """A copy of what it holds."""
        ...

    def shown(self, *, resident: bool) -> Any:
        """What a caller of `run` is given: an array, or, on a device, for a `resident` result, the tensor itself."""
        ...


class Memory(Protocol):
    """Where the tensors of a session lie."""

    device: str

    def zeros(self, shape: Sequence[int], dtype: str, element: str) -> Tensor:
        """A new tensor. Raises what numpy or ONNX Runtime raises where there is not enough memory."""
        ...

    def upload(self, array: Array) -> Any:
        """What a caller of `run` is given for a resident result that was made on the host."""
        ...

    def holds(self, value: object) -> bool:
        """Whether a feed is a tensor of this memory."""
        ...


class HostTensor:
    """A numpy array. See `Tensor`."""

    def __init__(self, array: Array) -> None:
        self.array = array

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes."""
        return self.array.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """The array's."""
        return self.array.dtype

    @property
    def place(self) -> Place:
        """Where it lies."""
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

    def shown(self, *, resident: bool) -> Array:
        """The array itself."""
        return self.array


class HostMemory:
    """See `Memory`."""

    device = "cpu"

    def zeros(self, shape: Sequence[int], dtype: str, element: str) -> HostTensor:
        """See `Memory.zeros`. `element` must be `dtype`: a CPU converts nothing."""
        assert element == dtype
        try:
            return HostTensor(np.zeros(tuple(shape), dtype))
        except ValueError as error:  # numpy's word for a size beyond the address space
            raise MemoryError(str(error)) from None

    def upload(self, array: Array) -> Array:
        """See `Memory.upload`."""
        return array

    def holds(self, value: object) -> bool:
        """See `Memory.holds`."""
        return False


def item_size(element: str) -> int:
    """Bytes of one value."""
    return np.dtype(_STORED.get(element, element)).itemsize


def to_bytes(array: Array, element: str) -> npt.NDArray[np.uint8]:
    """The values as a device holds them, uint8 [bytes]: rounded to the nearest of `element`, ties to even."""
    if element == "bfloat16":
        stored: Array = _bfloat16_bits(np.ascontiguousarray(array, np.float32))
    else:
        stored = np.ascontiguousarray(array, element)
    return stored.reshape(-1).view(np.uint8)


def from_bytes(raw: npt.NDArray[np.uint8], element: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
    """The inverse: a new array of `dtype`."""
    stored = raw.view(_STORED.get(element, element)).reshape(shape)
    if element == "bfloat16":
        return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(dtype, copy=False)
    return stored.astype(dtype)


def _bfloat16_bits(array: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """A bfloat16 is the upper half of a float32."""
    bits = array.reshape(-1).view(np.uint32)
    nearest = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    quiet = bits | np.uint32(0x400000)  # adding to a NaN could make it an infinity
    return (np.where(np.isnan(array.reshape(-1)), quiet, nearest) >> np.uint32(16)).astype(np.uint16)
