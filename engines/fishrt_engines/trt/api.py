"""Types of the part of TensorRT's Python API that fishrt uses, and a logger that keeps its error messages.

The library has no type stubs, and its import needs NVIDIA's libraries, so only `load_tensorrt` imports it.
Names and meanings are those of TensorRT 11.4, from its documentation and bindings; `tests/support/fake_tensorrt.py` has the same.
"""

from __future__ import annotations

import importlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Protocol, TypeVar, cast

from ..errors import GraphError
from ..providers import resolve_provider

log = logging.getLogger(__name__)
T = TypeVar("T")
Shape = tuple[int, ...]

_ERRORS_KEPT = 12
"""The number of TensorRT's last error messages that an error shows. The first message of a failure is often its cause."""
_ERROR, _WARNING = 1, 2
"""`ILogger.Severity` as numbers: INTERNAL_ERROR 0, ERROR 1, WARNING 2, INFO 3, VERBOSE 4."""


class ParserError(Protocol):
    """One error of the importer of ONNX files."""

    def desc(self) -> str: ...
    def node_name(self) -> str: ...
    def node_operator(self) -> str: ...


class OnnxParser(Protocol):
    """The importer: makes a network from an ONNX file."""

    num_errors: int

    def parse(self, model: bytes, path: str) -> bool: ...
    def get_error(self, index: int) -> ParserError: ...


class OptimizationProfile(Protocol):
    """The range of shapes of an engine's inputs."""

    def set_shape(self, name: str, least: Shape, usual: Shape, most: Shape) -> bool | None: ...


class TimingCache(Protocol):
    """Measured times of kernels, reused by later builds."""

    def serialize(self) -> Any: ...


class BuilderConfig(Protocol):
    """The options of a build."""

    progress_monitor: Any

    def set_memory_pool_limit(self, pool: Any, size: int) -> bool | None: ...
    def add_optimization_profile(self, profile: OptimizationProfile) -> int: ...
    def create_timing_cache(self, serialized: bytes) -> TimingCache | None: ...
    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool: ...
    def get_timing_cache(self) -> TimingCache | None: ...


class Builder(Protocol):
    """The builder: makes a plan from a network."""

    def create_network(self, flags: int) -> Any: ...
    def create_builder_config(self) -> BuilderConfig: ...
    def create_optimization_profile(self) -> OptimizationProfile: ...
    def build_serialized_network(self, network: Any, config: BuilderConfig) -> Any | None: ...


class ExecutionContext(Protocol):
    """An engine's shapes, addresses and scratch memory for one run at a time."""

    def set_device_memory(self, address: int, size: int) -> bool | None: ...
    def set_optimization_profile_async(self, index: int, stream: int) -> bool: ...
    def set_input_shape(self, name: str, shape: Shape) -> bool: ...
    def infer_shapes(self) -> Sequence[str]: ...
    def get_tensor_shape(self, name: str) -> Sequence[int]: ...
    def set_tensor_address(self, name: str, address: int) -> bool: ...
    def execute_async_v3(self, stream: int) -> bool: ...


class CudaEngine(Protocol):
    """A plan loaded on the device."""

    num_io_tensors: int
    num_optimization_profiles: int
    device_memory_size_v2: int

    def get_tensor_name(self, index: int) -> str: ...
    def get_tensor_mode(self, name: str) -> Any: ...
    def get_tensor_dtype(self, name: str) -> Any: ...
    def get_tensor_shape(self, name: str) -> Sequence[int]: ...
    def get_aliased_input_tensor(self, name: str) -> str | None: ...
    def create_execution_context(self, strategy: Any) -> ExecutionContext | None: ...


class Runtime(Protocol):
    """The runtime: loads a plan as an engine."""

    def deserialize_cuda_engine(self, serialized: Any) -> CudaEngine | None: ...


class TensorRT(Protocol):
    """The module `tensorrt`."""

    __version__: str
    ILogger: Any
    IProgressMonitor: Any
    DataType: Any
    TensorIOMode: Any
    MemoryPoolType: Any
    ExecutionContextAllocationStrategy: Any
    Builder: Callable[[Any], Builder]
    OnnxParser: Callable[[Any, Any], OnnxParser]
    Runtime: Callable[[Any], Runtime]


class Log(Protocol):
    """A logger that TensorRT may call from several threads."""

    def take_errors(self) -> list[str]:
        """Return and clear the error messages, oldest first, without repetitions."""
        ...


def load_tensorrt() -> TensorRT:
    """Return the tensorrt module. Raises ProviderError if it or a library it needs is missing, broken or too old."""
    resolve_provider("tensorrt")
    return cast(TensorRT, importlib.import_module("tensorrt"))


def log_of(trt: TensorRT) -> Log:
    """Return the one logger of this process: TensorRT's objects keep references to it."""
    module: Any = trt  # hashable for the cache, unlike the protocol's type
    return _log_of(module)


@cache
def _log_of(trt: Any) -> Log:
    class Logger(trt.ILogger):  # type: ignore[misc]  # the base class is known only at run time
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self._errors: deque[str] = deque(maxlen=_ERRORS_KEPT)
            self._lock = threading.Lock()

        def log(self, severity: Any, msg: str) -> None:
            level = int(severity)
            if level <= _ERROR:
                with self._lock:
                    self._errors.append(msg.strip())
            log.log(logging.INFO if level <= _WARNING else logging.DEBUG, "TensorRT: %s", msg)

        def take_errors(self) -> list[str]:
            with self._lock:
                errors = list(dict.fromkeys(self._errors))
                self._errors.clear()
            return errors

    return cast(Log, Logger())


def checked(trt: TensorRT, what: str, call: Callable[[], T | None], hint: str | None = None) -> T:
    """Return the result of a call of TensorRT, which reports failures as None, False or an exception and logs the reason.

    what: names the call. Raises GraphError, with the messages of the log, for a failure.
    """
    kept = log_of(trt)
    kept.take_errors()  # drop messages of earlier failures
    raised = ""
    try:
        result = call()
    except (RuntimeError, ValueError, TypeError) as error:  # pybind11 converts C++ exceptions to these
        result, raised = None, str(error)
    if result is None or result is False:
        reasons = [*kept.take_errors(), *([raised] if raised else [])]
        raise GraphError(f"TensorRT {what} failed: {'; '.join(reasons) or 'it gave no reason'}", hint=hint)
    return result
