"""Memory that a session reads and writes in place: numpy arrays, or the memory of a device.

Sessions are bound to addresses, so that one row of a tensor can be bound like a whole one. Both kinds of tensor have the same
methods.

A device's memory is used through ONNX Runtime alone: no library of the device's vendor is called. ONNX Runtime can allocate
device memory and copy whole tensors to it, from it and within it. Two further operations are small graphs, run on the device:
filling with zeros, and copying the first rows of a tensor over those of another. Memory is allocated as bytes, since bfloat16
has no numpy type. The code works on every device for which ONNX Runtime has tensors. Tests run it with "cpu".
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..engine import Array
from .packed import CODES, Node, small_graph

_STORED = {"bfloat16": "uint16"}
"""Element types that numpy lacks, and the numpy type that holds their bits."""
_WORD = 4
"""Bytes of a value of these graphs. Memory is allocated in multiples of it."""


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

    def part(self, first: int, count: int) -> Place:
        """Return the place of `count` rows of the first dimension, from `first` on."""
        step = self.nbytes // self.shape[0]
        shape = (count, *self.shape[1:])
        return Place(self.device, self.pointer + first * step, self.element, shape, count * step, self.owner)

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

    def lead(self, value: Any, shape: tuple[int, ...] | None = None) -> None:
        """Copy an array, or a tensor of the same memory, into its leading part.

        shape: copy only this leading part of `value`, which then may be larger.
        """
        ...

    def part(self, first: int, count: int) -> Tensor:
        """Return `count` rows of the first dimension, from `first` on, as a tensor that shares the memory."""
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
    lock: AbstractContextManager[object]
    """Held by whoever runs or allocates on a device: an allocation in another thread breaks the capture of a CUDA graph."""

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

    def lead(self, value: Array | HostTensor, shape: tuple[int, ...] | None = None) -> None:
        """See `Tensor.lead`."""
        array = value.array if isinstance(value, HostTensor) else value
        part = tuple(map(slice, shape or array.shape))
        self.array[part] = array[part]

    def part(self, first: int, count: int) -> HostTensor:
        """See `Tensor.part`."""
        return HostTensor(self.array[first : first + count])

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
    lock: AbstractContextManager[object] = nullcontext()

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


class DeviceTensor:
    """A tensor in a device's memory. See `Tensor`; it is also an `engine.Resident`."""

    def __init__(
        self, memory: DeviceMemory, shape: tuple[int, ...], dtype: str, element: str, within: tuple[Any, int] | None = None
    ) -> None:
        """Allocate a tensor, or find it `within` memory: from `allocate`, and the byte at which it begins."""
        self.shape, self.dtype, self.memory = shape, np.dtype(dtype), memory
        self._element, self._whole = element, within is None
        self._nbytes = prod(shape) * item_size(element)
        self._value, self._at = within or (memory.allocate(-(-self._nbytes // _WORD) * _WORD), 0)

    @property
    def place(self) -> Place:
        """Return the place of this tensor."""
        return Place(self.memory.device, self._pointer, self._element, self.shape, self._nbytes, self._value)

    def part(self, first: int, count: int) -> DeviceTensor:
        """See `Tensor.part`. A row must be a multiple of `_WORD` bytes."""
        at = self._at + first * (self._nbytes // self.shape[0])
        return DeviceTensor(self.memory, (count, *self.shape[1:]), self.dtype.name, self._element, (self._value, at))

    def put(self, value: Array | DeviceTensor) -> None:
        """See `Tensor.put`."""
        if isinstance(value, DeviceTensor) and self._whole and value._whole:
            self._value.update_inplace(value._value)
            return
        if isinstance(value, DeviceTensor) or not self._whole:
            source = value if isinstance(value, DeviceTensor) else self._uploaded(value)
            self.memory.put_first(self._rows(1, self._nbytes), source._rows(1, self._nbytes), 1)
            return
        raw = to_bytes(value, self._element)
        self._value.update_inplace(np.pad(raw, (0, -raw.size % _WORD)) if raw.size % _WORD else raw)

    def lead(self, value: Array | DeviceTensor, shape: tuple[int, ...] | None = None) -> None:
        """See `Tensor.lead`. If all sizes but one are equal, as in a cache, nothing goes through the host."""
        part = shape or value.shape
        differ = [n for n, sizes in enumerate(zip(part, value.shape, self.shape, strict=True)) if len(set(sizes)) > 1]
        row = prod(part[differ[0] + 1 :]) * item_size(self._element) if differ else 0
        if not differ:
            self.put(value)
        elif len(differ) == 1 and row % _WORD == 0:
            source = value if isinstance(value, DeviceTensor) else self._uploaded(value)
            blocks = prod(part[: differ[0]])
            self.memory.put_first(self._rows(blocks, row), source._rows(blocks, row), part[differ[0]])
        else:
            whole, cut = self.numpy(), tuple(map(slice, part))
            whole[cut] = (value.numpy() if isinstance(value, DeviceTensor) else value)[cut]
            self.put(whole)

    def clear(self) -> None:
        """Fill it with zeros."""
        self.memory.clear(self._words(self._value.tensor_size_in_bytes() // _WORD))

    def numpy(self) -> Array:
        """See `Tensor.numpy`."""
        raw = self._value.numpy()[self._at : self._at + self._nbytes]
        return from_bytes(raw, self._element, self.dtype, self.shape)

    def result(self, *, resident: bool) -> Array | DeviceTensor:
        """See `Tensor.result`."""
        return self if resident else self.numpy()

    def _uploaded(self, array: Array) -> DeviceTensor:
        made = DeviceTensor(self.memory, array.shape, self.dtype.name, self._element)
        made.put(array)
        return made

    @property
    def _pointer(self) -> int:
        return int(self._value.data_ptr()) + self._at

    def _rows(self, blocks: int, row: int) -> Place:
        """Return the place of the whole tensor as float32 [blocks, 1, rows, words of a row]."""
        return self._words(blocks, 1, self._nbytes // blocks // row, row // _WORD)

    def _words(self, *shape: int) -> Place:
        return Place(self.memory.device, self._pointer, "float32", shape, prod(shape) * _WORD, self._value)


class DeviceMemory:
    """The memory of one device. See `Memory`.

    device: ONNX Runtime's name, such as "cuda". providers: the `providers` of an InferenceSession on this device.
    """

    def __init__(self, ort: Any, device: str, providers: Sequence[Any]) -> None:
        self.device = device
        self.lock: AbstractContextManager[object] = threading.RLock()
        self._ort, self._providers = ort, list(providers)

    def zeros(self, shape: Sequence[int], dtype: str, element: str) -> DeviceTensor:
        """See `Memory.zeros`."""
        tensor = DeviceTensor(self, tuple(shape), dtype, element)
        tensor.clear()
        return tensor

    def upload(self, array: Array) -> DeviceTensor:
        """See `Memory.upload`."""
        tensor = DeviceTensor(self, array.shape, array.dtype.name, array.dtype.name)
        tensor.put(array)
        return tensor

    def holds(self, value: object) -> bool:
        """See `Memory.holds`. Sessions on one device share its memory."""
        return isinstance(value, DeviceTensor) and value.memory.device == self.device

    def allocate(self, nbytes: int) -> Any:
        """Return an OrtValue uint8 [nbytes], uninitialised."""
        return self._ort.OrtValue.ortvalue_from_shape_and_type([nbytes], np.uint8, self.device, 0)

    def clear(self, words: Place) -> None:
        """Write zeros to a place of float32 [words]."""
        size = np.array(words.shape, np.int64)
        binding = self._clear.io_binding()
        binding.bind_cpu_input("size", size)
        words.bind_output(binding, "zeros")
        self._clear.run_with_iobinding(binding)

    def put_first(self, target: Place, rows: Place, count: int) -> None:
        """Copy the first `count` rows of every block, float32 [blocks, 1, n, words], over those of another tensor."""
        binding = self._put_first.io_binding()
        target.bind_input(binding, "target")
        rows.bind_input(binding, "rows")
        blocks, one, _, words = rows.shape
        binding.bind_cpu_input("starts", np.zeros(4, np.int64))
        binding.bind_cpu_input("ends", np.array([blocks, one, count, words]))
        target.bind_output(binding, "result")
        self._put_first.run_with_iobinding(binding)

    @cached_property
    def _clear(self) -> Any:
        nodes: list[Node] = [("ConstantOfShape", ["size"], "zeros", {})]
        return self._session(small_graph(nodes, {"size": ("int64", 1)}, {"zeros": ("float32", 1)}))

    @cached_property
    def _put_first(self) -> Any:
        inputs = {"target": ("float32", 4), "rows": ("float32", 4), "starts": ("int64", 1), "ends": ("int64", 1)}
        nodes: list[Node] = [
            ("Slice", ["rows", "starts", "ends"], "first", {}),
            ("TensorScatter", ["target", "first"], "result", {"axis": -2}),
        ]
        return self._session(small_graph(nodes, inputs, {"result": ("float32", 4)}))

    def _session(self, model: bytes) -> Any:
        options = self._ort.SessionOptions()
        options.log_severity_level = 3
        return self._ort.InferenceSession(model, options, providers=self._providers)


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
