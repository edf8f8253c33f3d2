"""One NVIDIA device through cuda-bindings: memory, copies, one stream, captured graphs. No torch, and no kernels of our own.

All work runs asynchronously on one created stream, in the order of the calls; `synchronize` waits for it. A thread holds
`Device.lock` during its calls, since a capture records all work that reaches the stream.
"""

from __future__ import annotations

import ctypes
import importlib
import threading
import weakref
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from ..engine import Array
from ..errors import FishrtError, ProviderError

_OUT_OF_MEMORY = 2
_NO_DRIVER, _NO_DEVICE = 35, 100
"""Values of `cudaError_t`."""


class DeviceBuffer:
    """Memory on the device, freed with the last reference to it."""

    def __init__(self, runtime: Any, address: int, nbytes: int) -> None:
        self.address, self.nbytes = address, nbytes
        weakref.finalize(self, runtime.cudaFree, address)


class Graph:
    """A captured CUDA graph."""

    def __init__(self, device: Device, handle: Any) -> None:
        self._device, self._handle = device, handle
        weakref.finalize(self, device.runtime.cudaGraphExecDestroy, handle)

    def launch(self) -> None:
        """Run the captured work again, on the present contents of the same addresses."""
        self._device.ask(self._device.runtime.cudaGraphLaunch(self._handle, self._device.stream), "a graph cannot be launched")


class Device:
    """The first visible device; CUDA_VISIBLE_DEVICES chooses it."""

    def __init__(self, runtime: Any) -> None:
        """runtime: the module cuda.bindings.runtime. Raises ProviderError if there is no driver or no device."""
        self.runtime = runtime
        self.lock = threading.RLock()
        self.waits = 0
        """Number of finished `synchronize` calls: work from before the last of them is done."""
        count = self.ask(runtime.cudaGetDeviceCount(), "no device can be used")
        if count < 1:
            raise _no_device("CUDA shows no device")
        self.ask(runtime.cudaSetDevice(0), "the device cannot be used")
        properties = self.ask(runtime.cudaGetDeviceProperties(0), "the properties of the device cannot be read")
        name = properties.name
        self.name: str = name.decode() if isinstance(name, bytes) else name
        self.compute_capability: tuple[int, int] = (properties.major, properties.minor)
        # On the default stream, TensorRT synchronises more often.
        stream = runtime.cudaStreamCreateWithFlags(runtime.cudaStreamNonBlocking)
        self.stream: int = int(self.ask(stream, "no stream can be made"))

    def ask(self, result: tuple[Any, ...], failed: str) -> Any:
        """Return the value behind the error code of a call of cuda-bindings. Raises FishrtError, which begins with `failed`."""
        code, *values = result
        if int(code) == 0:
            return values[0] if len(values) == 1 else tuple(values)
        _, text = self.runtime.cudaGetErrorString(code)
        said = text.decode() if isinstance(text, bytes) else str(text)
        if int(code) in (_NO_DRIVER, _NO_DEVICE):
            raise _no_device(f"{failed}: {said}")
        raise FishrtError(f"{failed}: CUDA says {said!r} ({int(code)})")

    def memory(self) -> tuple[int, int]:
        """Return free and total bytes."""
        free, total = self.ask(self.runtime.cudaMemGetInfo(), "the memory of the device cannot be read")
        return int(free), int(total)

    def check_room(self, need: int, what: str) -> None:
        """Check that `need` bytes are free. Raises FishrtError, which names `what`, otherwise."""
        free, total = self.memory()
        if need > free:
            raise FishrtError(
                f"{what} needs about {need / 1e9:.2f} GB of device memory; {free / 1e9:.2f} of {total / 1e9:.2f} GB are free "
                f"on {self.name}",
                hint="end other programs on the device, build with a smaller --max-len or --max-batch, or take a smaller model",
            )

    def allocate(self, nbytes: int, what: str) -> DeviceBuffer:
        """Return memory of zeros. Raises FishrtError if too little is free."""
        self.check_room(nbytes, what)
        buffer = DeviceBuffer(self.runtime, int(self.ask(self.runtime.cudaMalloc(nbytes), f"no memory for {what}")), nbytes)
        self.ask(self.runtime.cudaMemsetAsync(buffer.address, 0, nbytes, self.stream), f"{what} cannot be cleared")
        return buffer

    def pinned(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """Return an array in a pinned host buffer, freed with the last view of it."""
        nbytes = max(int(np.prod(shape)) * dtype.itemsize, 1)
        address = int(self.ask(self.runtime.cudaMallocHost(nbytes), "no memory of the host for copies"))
        memory = (ctypes.c_ubyte * nbytes).from_address(address)
        weakref.finalize(memory, self.runtime.cudaFreeHost, address)
        return np.ndarray(shape, dtype, memoryview(memory))

    def upload(self, array: Array, address: int) -> None:
        """Copy a contiguous array to the device. The array must not change before `synchronize` returns."""
        self._copy(address, array.ctypes.data, array.nbytes, self.runtime.cudaMemcpyKind.cudaMemcpyHostToDevice)

    def download(self, address: int, array: Array) -> None:
        """Copy from the device into a contiguous array, which is filled when `synchronize` returns."""
        self._copy(array.ctypes.data, address, array.nbytes, self.runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost)

    def copy(self, source: int, target: int, nbytes: int) -> None:
        """Copy bytes within the device."""
        self._copy(target, source, nbytes, self.runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice)

    def synchronize(self) -> None:
        """Wait for all work on the stream."""
        self.ask(self.runtime.cudaStreamSynchronize(self.stream), "the device failed")
        self.waits += 1

    def capture(self, work: Callable[[], None]) -> Graph:
        """Return the work that `work` puts on the stream as a graph, without running it. Raises FishrtError if that fails."""
        runtime = self.runtime
        # Relaxed: Python may free other device memory at any moment, which would break a stricter capture.
        mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed
        self.ask(runtime.cudaStreamBeginCapture(self.stream, mode), "no capture can be begun")
        try:
            work()
        finally:
            ended = runtime.cudaStreamEndCapture(self.stream)
        captured = self.ask(ended, "the work cannot be captured")
        try:
            return Graph(self, self.ask(runtime.cudaGraphInstantiate(captured, 0), "the captured work makes no graph"))
        finally:
            runtime.cudaGraphDestroy(captured)

    def _copy(self, target: int, source: int, nbytes: int, kind: Any) -> None:
        self.ask(self.runtime.cudaMemcpyAsync(target, source, nbytes, kind, self.stream), "a copy failed")


@cache
def open_device() -> Device:
    """Return the device. Raises ProviderError if cuda-bindings is not installed, or if there is no driver or device."""
    try:
        runtime = importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise ProviderError(f"cuda-bindings cannot be loaded: {error}", hint='pip install "fishrt[trt]"') from None
    return Device(runtime)


def _no_device(what: str) -> ProviderError:
    return ProviderError(what, hint="check the NVIDIA driver and CUDA_VISIBLE_DEVICES")
