"""A fake of cuda.bindings.runtime on memory of the host. It proves nothing about CUDA.

It has the names that fishrt uses, with the results that cuda-bindings 13 documents: a tuple that begins with an error code. Work
on the stream runs only when it is waited for, so code that does not wait, or changes a buffer too early, gives wrong numbers.
Addresses outside of allocations are errors, and so are allocations beyond the device's memory.
"""

# ruff: noqa: N802, N815 - the names are CUDA's

from __future__ import annotations

import ctypes
from collections.abc import Callable
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

Work = Callable[[], None]
STREAM = 7
"""The one stream."""
CUDA_ERRORS = {2: "MemoryAllocation", 35: "InsufficientDriver", 100: "NoDevice", 700: "IllegalAddress", 900: "CaptureUnsupported"}


class IllegalAddressError(Exception):
    """An access outside of the device's allocations."""


class FakeCudaRuntime:
    """The module cuda.bindings.runtime. `launches` counts launched graphs, `captures` captured ones, `uploads` copies to it."""

    cudaMemcpyKind = IntEnum("cudaMemcpyKind", ["cudaMemcpyHostToDevice", "cudaMemcpyDeviceToHost", "cudaMemcpyDeviceToDevice"])
    cudaStreamCaptureMode = IntEnum("cudaStreamCaptureMode", {"cudaStreamCaptureModeRelaxed": 2})
    cudaStreamNonBlocking = 1
    cudaSetDevice, cudaStreamCreateWithFlags = (staticmethod(lambda _, found=found: found) for found in ((0,), (0, STREAM)))

    def __init__(
        self, *, memory: int = 8 << 30, name: str = "Simulated GPU", capability: tuple[int, int] = (8, 9), devices: int | None = 1
    ) -> None:
        """devices: None is a machine without a driver."""
        self.total, self.name, self.capability, self.devices = memory, name, capability, devices
        self.reserved = 0
        """Bytes in use by others than cudaMalloc."""
        self.captures = self.launches = self.uploads = self._broken = 0
        self.refuse_capture = False
        self._memories: dict[int, tuple[Any, bool]] = {}
        """Allocations by address, and whether they are the device's."""
        self._waiting: list[Work] = []
        self.captured: list[Work] | None = None
        """The work of the capture that runs."""
        self._graphs: dict[int, list[Work]] = {}

    def cudaGetErrorString(self, code: int) -> tuple[Any, ...]:
        return 0, f"cudaError{CUDA_ERRORS[code]}".encode()

    def cudaGetDeviceCount(self) -> tuple[Any, ...]:
        return (35, None) if self.devices is None else (0 if self.devices else 100, self.devices)

    def cudaGetDeviceProperties(self, device: int) -> tuple[Any, ...]:
        return 0, SimpleNamespace(name=self.name.encode(), major=self.capability[0], minor=self.capability[1])

    def cudaMemGetInfo(self) -> tuple[Any, ...]:
        return 0, self.free, self.total

    @property
    def free(self) -> int:
        return self.total - self.reserved - sum(len(memory) for memory, on_device in self._memories.values() if on_device)

    def cudaMalloc(self, size: int) -> tuple[Any, ...]:
        return (2, None) if size > self.free else self._allocated(size, on_device=True)

    def cudaMallocHost(self, size: int) -> tuple[Any, ...]:
        return self._allocated(size, on_device=False)

    def cudaFree(self, address: int) -> tuple[Any, ...]:
        self.cudaStreamSynchronize(STREAM)  # as CUDA does
        del self._memories[address]
        return (0,)

    cudaFreeHost = cudaFree

    def cudaStreamSynchronize(self, stream: int) -> tuple[Any, ...]:
        works, self._waiting = self._waiting, []
        for work in works:
            try:
                work()
            except IllegalAddressError:
                self._broken = 700
        return (self._broken,)

    def cudaMemcpyAsync(self, target: int, source: int, count: int, kind: IntEnum, stream: int) -> tuple[Any, ...]:
        self.uploads += kind == 1

        def copy() -> None:
            for address, on_device in ((target, kind != 2), (source, kind != 1)):
                if self._holds(address, count) != on_device:
                    raise IllegalAddressError
            ctypes.memmove(target, source, count)

        return self.enqueue(stream, copy)

    def cudaMemsetAsync(self, address: int, value: int, count: int, stream: int) -> tuple[Any, ...]:
        return self.enqueue(stream, lambda: ctypes.memset(self.checked(address, count), value, count) and None)

    def cudaStreamBeginCapture(self, stream: int, mode: IntEnum) -> tuple[Any, ...]:
        if self.refuse_capture or self.captured is not None:
            return (900,)
        self.captured = []
        return (0,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[Any, ...]:
        handle = max(self._graphs, default=0) + 1
        self._graphs[handle], self.captured = self.captured or [], None
        return 0, handle

    def cudaGraphInstantiate(self, graph: int, flags: int) -> tuple[Any, ...]:
        self.captures += 1
        handle = max(self._graphs) + 1
        self._graphs[handle] = self._graphs[graph]
        return 0, handle

    def cudaGraphLaunch(self, graph: int, stream: int) -> tuple[Any, ...]:
        self.launches += 1
        self._waiting += self._graphs[graph]
        return (0,)

    def cudaGraphDestroy(self, graph: int) -> tuple[Any, ...]:
        del self._graphs[graph]
        return (0,)

    cudaGraphExecDestroy = cudaGraphDestroy

    def enqueue(self, stream: int, work: Work) -> tuple[Any, ...]:
        """Put work on the stream; it runs at the next synchronisation, or whenever the capture that takes it is launched."""
        assert stream == STREAM
        (self._waiting if self.captured is None else self.captured).append(work)
        return (0,)

    def checked(self, address: int, count: int) -> int:
        """Return an address. Raises IllegalAddressError unless so many bytes there lie in one allocation of the device."""
        if not self._holds(address, count):
            raise IllegalAddressError
        return address

    def _holds(self, address: int, count: int) -> bool:
        ranges = ((start, start + len(memory)) for start, (memory, on_device) in self._memories.items() if on_device)
        return any(start <= address and address + count <= end for start, end in ranges)

    def _allocated(self, size: int, *, on_device: bool) -> tuple[Any, ...]:
        memory = (ctypes.c_ubyte * size)()
        ctypes.memset(memory, 0xA5, size)  # nobody has cleared it
        self._memories[ctypes.addressof(memory)] = memory, on_device
        return 0, ctypes.addressof(memory)
