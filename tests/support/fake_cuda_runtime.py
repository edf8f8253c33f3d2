"""A simulation of cuda.bindings.runtime on memory of the host. It proves nothing about CUDA.

It has the names that fishrt uses, with the arguments and results that cuda-bindings 13 documents: every call returns a tuple that
begins with an error code. It is as asynchronous as a device: work on a stream runs only when it is waited for, so code that does
not wait, or changes a buffer too early, gives wrong numbers here, too. Addresses outside of allocations are errors, and so are
allocations beyond the device's memory.
"""

# ruff: noqa: N801, N802, N815 - the names are CUDA's

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

Work = Callable[[], None]


class cudaError_t(IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorIllegalAddress = 700
    cudaErrorStreamCaptureUnsupported = 900


class cudaMemcpyKind(IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3


class cudaStreamCaptureMode(IntEnum):
    cudaStreamCaptureModeGlobal = 0
    cudaStreamCaptureModeThreadLocal = 1
    cudaStreamCaptureModeRelaxed = 2


class IllegalAddressError(Exception):
    """An access outside of the device's allocations."""


class FakeCudaRuntime:
    """The module cuda.bindings.runtime.

    `launches` counts launched graphs, `captures` those that were captured, `uploads` copies from the host.
    """

    cudaError_t, cudaMemcpyKind, cudaStreamCaptureMode = cudaError_t, cudaMemcpyKind, cudaStreamCaptureMode
    cudaStreamNonBlocking = 1

    def __init__(
        self, *, memory: int = 8 << 30, name: str = "Simulated GPU", capability: tuple[int, int] = (8, 9), devices: int | None = 1
    ) -> None:
        """devices: None is a machine without a driver."""
        self.total, self.name, self.capability, self.devices = memory, name, capability, devices
        self.reserved = 0
        """Bytes in use by others than cudaMalloc."""
        self.captures = self.launches = self.uploads = 0
        self.refuse_capture = False
        self._handles = itertools.count(1)
        self._device: dict[int, Any] = {}
        self._host: dict[int, Any] = {}
        self._streams: dict[int, list[Work]] = {}
        self._capturing: dict[int, list[Work]] = {}
        self._graphs: dict[int, list[Work]] = {}
        self._broken = cudaError_t.cudaSuccess

    def cudaGetErrorString(self, code: int) -> tuple[Any, ...]:
        return 0, cudaError_t(code).name.encode()

    def cudaGetDeviceCount(self) -> tuple[Any, ...]:
        if self.devices is None:
            return cudaError_t.cudaErrorInsufficientDriver, None
        return (cudaError_t.cudaSuccess, self.devices) if self.devices else (cudaError_t.cudaErrorNoDevice, None)

    def cudaSetDevice(self, device: int) -> tuple[Any, ...]:
        return (cudaError_t.cudaSuccess,)

    def cudaGetDeviceProperties(self, device: int) -> tuple[Any, ...]:
        major, minor = self.capability
        return cudaError_t.cudaSuccess, SimpleNamespace(name=self.name.encode(), major=major, minor=minor)

    def cudaMemGetInfo(self) -> tuple[Any, ...]:
        return cudaError_t.cudaSuccess, self.free, self.total

    @property
    def free(self) -> int:
        return self.total - self.reserved - sum(map(len, self._device.values()))

    def cudaMalloc(self, size: int) -> tuple[Any, ...]:
        if size > self.free:
            return cudaError_t.cudaErrorMemoryAllocation, None
        return cudaError_t.cudaSuccess, self._allocated(self._device, size)

    def cudaMallocHost(self, size: int) -> tuple[Any, ...]:
        return cudaError_t.cudaSuccess, self._allocated(self._host, size)

    def cudaFree(self, address: int) -> tuple[Any, ...]:
        return self._freed(self._device, address)

    def cudaFreeHost(self, address: int) -> tuple[Any, ...]:
        return self._freed(self._host, address)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Any, ...]:
        handle = next(self._handles)
        self._streams[handle] = []
        return cudaError_t.cudaSuccess, handle

    def cudaStreamSynchronize(self, stream: int) -> tuple[Any, ...]:
        if stream in self._capturing:
            return (cudaError_t.cudaErrorStreamCaptureUnsupported,)
        self._work_off(stream)
        return (self._broken,)

    def cudaMemcpyAsync(self, dst: int, src: int, count: int, kind: cudaMemcpyKind, stream: int) -> tuple[Any, ...]:
        on_device = {1: (True, False), 2: (False, True), 3: (True, True)}[int(kind)]
        self.uploads += int(kind) == cudaMemcpyKind.cudaMemcpyHostToDevice

        def copy() -> None:
            for address, expected in zip((dst, src), on_device, strict=True):
                if expected:
                    self.check(address, count)
                elif any(start <= address < start + len(memory) for start, memory in self._device.items()):
                    raise IllegalAddressError
            ctypes.memmove(dst, src, count)

        return self.enqueue(stream, copy)

    def cudaMemsetAsync(self, address: int, value: int, count: int, stream: int) -> tuple[Any, ...]:
        def clear() -> None:
            self.check(address, count)
            ctypes.memset(address, value, count)

        return self.enqueue(stream, clear)

    def cudaStreamBeginCapture(self, stream: int, mode: cudaStreamCaptureMode) -> tuple[Any, ...]:
        if self.refuse_capture or stream in self._capturing:
            return (cudaError_t.cudaErrorStreamCaptureUnsupported,)
        self._capturing[stream] = []
        return (cudaError_t.cudaSuccess,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[Any, ...]:
        handle = next(self._handles)
        self._graphs[handle] = self._capturing.pop(stream)
        return cudaError_t.cudaSuccess, handle

    def cudaGraphInstantiate(self, graph: int, flags: int) -> tuple[Any, ...]:
        handle = next(self._handles)
        self._graphs[handle] = list(self._graphs[graph])
        self.captures += 1
        return cudaError_t.cudaSuccess, handle

    def cudaGraphLaunch(self, graph: int, stream: int) -> tuple[Any, ...]:
        self.launches += 1
        for work in self._graphs[graph]:
            self.enqueue(stream, work)
        return (cudaError_t.cudaSuccess,)

    def cudaGraphDestroy(self, graph: int) -> tuple[Any, ...]:
        del self._graphs[graph]
        return (cudaError_t.cudaSuccess,)

    cudaGraphExecDestroy = cudaGraphDestroy

    # What the simulation of TensorRT needs. Not part of CUDA.

    def enqueue(self, stream: int, work: Work) -> tuple[Any, ...]:
        """Put work on a stream; it runs at the next synchronisation."""
        (self._capturing[stream] if stream in self._capturing else self._streams[stream]).append(work)
        return (cudaError_t.cudaSuccess,)

    def is_capturing(self, stream: int) -> bool:
        return stream in self._capturing

    def check(self, address: int, count: int) -> None:
        """Check that memory lies in one allocation of the device. Raises IllegalAddressError otherwise."""
        if not any(start <= address and address + count <= start + len(memory) for start, memory in self._device.items()):
            raise IllegalAddressError

    def _allocated(self, memories: dict[int, Any], size: int) -> int:
        memory = (ctypes.c_ubyte * size)()
        address = ctypes.addressof(memory)
        ctypes.memset(address, 0xA5, size)  # nobody has cleared it
        memories[address] = memory
        return address

    def _freed(self, memories: dict[int, Any], address: int) -> tuple[Any, ...]:
        for stream in self._streams:
            self._work_off(stream)  # as CUDA does, which waits for the device
        del memories[address]
        return (cudaError_t.cudaSuccess,)

    def _work_off(self, stream: int) -> None:
        works, self._streams[stream] = self._streams[stream], []
        for work in works:
            try:
                work()
            except IllegalAddressError:
                self._broken = cudaError_t.cudaErrorIllegalAddress
