"""TensorRT's Python API, as far as fishrt uses it, as types; and the log that keeps what TensorRT says.

The library brings no stubs and cannot be imported without NVIDIA's libraries, so `load_tensorrt` is the only place that does.
Names and meanings are those of TensorRT 11.4, from its documentation and its bindings; `tests/fake_tensorrt.py` has the same.
"""

from __future__ import annotations

import importlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Protocol, TypeVar, cast

from .errors import GraphError
from .providers import resolve_provider

log = logging.getLogger(__name__)
T = TypeVar("T")
Shape = tuple[int, ...]

_ERRORS_KEPT = 12
"""Of TensorRT's error messages, the last ones are told. The first of a failure is often the cause, and rarely further back."""
_ERROR, _WARNING = 1, 2
"""`ILogger.Severity` as numbers: INTERNAL_ERROR 0, ERROR 1, WARNING 2, INFO 3, VERBOSE 4."""


class ParserError(Protocol):
    """One thing that the importer of ONNX files does not take."""

    def desc(self) -> str: ...
    def node_name(self) -> str: ...
    def node_operator(self) -> str: ...


class OnnxParser(Protocol):
    """ONNX file → network."""

    num_errors: int

    def parse(self, model: bytes, path: str) -> bool: ...
    def get_error(self, index: int) -> ParserError: ...


class OptimizationProfile(Protocol):
    """The shapes that an engine takes."""

    def set_shape(self, name: str, least: Shape, usual: Shape, most: Shape) -> bool | None: ...


class TimingCache(Protocol):
    """What kernels took, so that they are not timed again."""

    def serialize(self) -> Any: ...


class BuilderConfig(Protocol):
    """How an engine is built."""

    progress_monitor: Any

    def set_memory_pool_limit(self, pool: Any, size: int) -> bool | None: ...
    def add_optimization_profile(self, profile: OptimizationProfile) -> int: ...
    def create_timing_cache(self, serialized: bytes) -> TimingCache | None: ...
    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool: ...
    def get_timing_cache(self) -> TimingCache | None: ...


class Builder(Protocol):
    """Network → plan."""

    def create_network(self, flags: int) -> Any: ...
    def create_builder_config(self) -> BuilderConfig: ...
    def create_optimization_profile(self) -> OptimizationProfile: ...
    def build_serialized_network(self, network: Any, config: BuilderConfig) -> Any | None: ...


class ExecutionContext(Protocol):
    """One use of an engine at a time."""

    def set_device_memory(self, address: int, size: int) -> bool | None: ...
    def set_optimization_profile_async(self, index: int, stream: int) -> bool: ...
    def set_input_shape(self, name: str, shape: Shape) -> bool: ...
    def infer_shapes(self) -> Sequence[str]: ...
    def get_tensor_shape(self, name: str) -> Sequence[int]: ...
    def set_tensor_address(self, name: str, address: int) -> bool: ...
    def execute_async_v3(self, stream: int) -> bool: ...


class CudaEngine(Protocol):
    """A plan on the device."""

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
    """Plan → engine."""

    def deserialize_cuda_engine(self, serialized: Any) -> CudaEngine | None: ...


class TensorRT(Protocol):
    """The module."""

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
    """What TensorRT reports to; it may do so from several threads."""

    def take_errors(self) -> list[str]:
        """The errors since they were last taken, oldest first, without repetitions."""
        ...


def load_tensorrt() -> TensorRT:
    """The tensorrt module. Raises ProviderError where it, or what it needs, is missing, broken or too old."""
    resolve_provider("tensorrt")
    return cast(TensorRT, importlib.import_module("tensorrt"))


def log_of(trt: TensorRT) -> Log:
    """The one log of this process: TensorRT's objects keep a reference to theirs."""
    module: Any = trt  # which can be hashed, though its protocol does not say so
    return _log_of(module)


@cache
def _log_of(trt: Any) -> Log:
    class Kept(trt.ILogger):  # type: ignore[misc]  # known only now
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

    return cast(Log, Kept())


def checked(trt: TensorRT, what: str, call: Callable[[], T | None], hint: str | None = None) -> T:
    """What a call of TensorRT's gives. It reports a failure as None, False or an exception, and the reason to its log only.

    what: names what failed. Raises GraphError with what the log has.
    """
    kept = log_of(trt)
    kept.take_errors()  # of what failed before, and was told then
    raised = ""
    try:
        result = call()
    except (RuntimeError, ValueError, TypeError) as error:  # as pybind11 turns C++ exceptions
        result, raised = None, str(error)
    if result is None or result is False:
        reasons = [*kept.take_errors(), *([raised] if raised else [])]
        raise GraphError(f"TensorRT {what} failed: {'; '.join(reasons) or 'it gave no reason'}", hint=hint)
    return result
