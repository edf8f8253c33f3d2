"""A simulation of TensorRT's Python module, which runs "plans" in ONNX Runtime. It proves nothing about TensorRT.

It has the names that fishrt uses, with the arguments, results and failures that are documented for TensorRT 11: None, False and
messages to the logger. It checks that builder and runner call them in a consistent order and with consistent values: shapes
within profiles, addresses of enough memory, caches updated in place, graphs captured after a first run and launched only while
shapes and addresses are unchanged. It cannot check which graphs the real importer accepts, the results of the real builder, their
numbers in 16 bits, or their speed.
"""

# ruff: noqa: N802 - the names are TensorRT's

from __future__ import annotations

import ctypes
import json
import struct
from collections.abc import Callable, Mapping, Sequence
from enum import Enum, IntEnum
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime

from fake_cuda_runtime import FakeCudaRuntime, IllegalAddressError

MAGIC = b"simulated plan\n"
UNSUPPORTED = {"Multinomial", "Bernoulli", "BitwiseAnd", "Unique", "Det"}
"""Some operators that the importer is documented not to support."""
SCRATCH = 4096

DataType = Enum("DataType", ["FLOAT", "HALF", "BF16", "INT8", "INT32", "INT64", "BOOL", "UINT8"])
TensorIOMode = Enum("TensorIOMode", ["NONE", "INPUT", "OUTPUT"])
MemoryPoolType = Enum("MemoryPoolType", ["WORKSPACE"])
ExecutionContextAllocationStrategy = Enum("ExecutionContextAllocationStrategy", ["STATIC", "ON_PROFILE_CHANGE", "USER_MANAGED"])

_TYPES = {
    onnx.TensorProto.FLOAT: (DataType.FLOAT, np.float32),
    onnx.TensorProto.FLOAT16: (DataType.HALF, np.float16),
    onnx.TensorProto.INT64: (DataType.INT64, np.int64),
    onnx.TensorProto.INT32: (DataType.INT32, np.int32),
    onnx.TensorProto.BOOL: (DataType.BOOL, np.bool_),
}
Shape = tuple[int, ...]


class ILogger:
    class Severity(IntEnum):
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def log(self, severity: Any, msg: str) -> None:
        raise NotImplementedError


class IProgressMonitor:
    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        raise NotImplementedError

    def step_complete(self, phase_name: str, step: int) -> bool:
        raise NotImplementedError

    def phase_finish(self, phase_name: str) -> None:
        raise NotImplementedError


class FakeTensorRT:
    """The module. faults: names of methods that fail, and their messages to the logger. `builds` counts builds."""

    ILogger, IProgressMonitor = ILogger, IProgressMonitor
    DataType, TensorIOMode, MemoryPoolType = DataType, TensorIOMode, MemoryPoolType
    ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy

    def __init__(self, cuda: FakeCudaRuntime, version: str = "11.4.0.106") -> None:
        self.__version__ = version
        self.cuda = cuda
        self.faults: dict[str, str] = {}
        self.builds = 0
        self.configs: list[Any] = []
        self.interrupt: Callable[[], None] = lambda: None
        """Called in the middle of a build."""

    def fails(self, method: str, logger: ILogger) -> bool:
        if method in self.faults:
            logger.log(ILogger.Severity.ERROR, self.faults[method])
        return method in self.faults

    def Builder(self, logger: ILogger) -> Any:
        return None if self.fails("Builder", logger) else _Builder(self, logger)

    def OnnxParser(self, network: Any, logger: ILogger) -> Any:
        return _Parser(self, network, logger)

    def Runtime(self, logger: ILogger) -> Any:
        return None if self.fails("Runtime", logger) else _Runtime(self, logger)


class _ParserError:
    def __init__(self, node: Any, why: str) -> None:
        self._node, self._why = node, why

    def desc(self) -> str:
        return self._why

    def node_name(self) -> str:
        return str(self._node.name)

    def node_operator(self) -> str:
        return str(self._node.op_type)


class _Parser:
    def __init__(self, trt: FakeTensorRT, network: Any, logger: ILogger) -> None:
        self._trt, self._network, self._logger = trt, network, logger
        self._errors: list[_ParserError] = []

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> _ParserError:
        return self._errors[index]

    def parse(self, model: bytes, path: str) -> bool:
        """Parse a model whose weights are in the folder of `path`."""
        if self._trt.fails("parse", self._logger):
            return False
        parsed = onnx.ModelProto.FromString(model)
        onnx.load_external_data_for_model(parsed, str(Path(path).parent))
        inputs = {value.name: value for value in parsed.graph.input}
        for node in parsed.graph.node:
            if node.op_type in UNSUPPORTED:
                self._errors.append(_ParserError(node, "no importer is registered for this operator"))
            if node.op_type == "TensorScatter":
                rows = inputs[node.input[0]].type.tensor_type.shape.dim[-2] if node.input[0] in inputs else None
                if rows is None or not rows.HasField("dim_value"):
                    self._errors.append(_ParserError(node, "the cache must be an input of static length"))
        self._network.model = parsed
        return not self._errors


class _Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, tuple[Shape, Shape, Shape]] = {}

    def set_shape(self, name: str, least: Shape, usual: Shape, most: Shape) -> None:
        if not all(a <= b <= c for a, b, c in zip(least, usual, most, strict=True)):
            raise ValueError(f"{name}: the shapes are not in order")
        self.shapes[name] = tuple(least), tuple(usual), tuple(most)


class _TimingCache:
    def __init__(self, content: bytes) -> None:
        self.content = content

    def serialize(self) -> bytes:
        return self.content


class _Config:
    def __init__(self, trt: FakeTensorRT) -> None:
        self._trt = trt
        self.profiles: list[_Profile] = []
        self.limits: dict[Any, int] = {}
        self.progress_monitor: Any = None
        self.cache: _TimingCache | None = None

    @property
    def _header(self) -> bytes:
        return f"timings {self._trt.__version__} {self._trt.cuda.name}".encode()

    def set_memory_pool_limit(self, pool: Any, size: int) -> None:
        self.limits[pool] = size

    def add_optimization_profile(self, profile: _Profile) -> int:
        if "add_optimization_profile" in self._trt.faults:
            return -1
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def create_timing_cache(self, serialized: bytes) -> _TimingCache | None:
        return _TimingCache(serialized) if not serialized or serialized.startswith(b"timings ") else None

    def set_timing_cache(self, cache: _TimingCache, ignore_mismatch: bool) -> bool:
        if cache.content and not cache.content.startswith(self._header) and not ignore_mismatch:
            return False
        self.cache = _TimingCache(cache.content or self._header)
        return True

    def get_timing_cache(self) -> _TimingCache | None:
        return self.cache


class _Builder:
    def __init__(self, trt: FakeTensorRT, logger: ILogger) -> None:
        self._trt, self._logger = trt, logger

    def create_network(self, flags: int) -> Any:
        assert flags == 0  # every network is strongly typed
        return SimpleNamespace(model=None)

    def create_builder_config(self) -> _Config:
        self._trt.configs.append(_Config(self._trt))
        return self._trt.configs[-1]

    def create_optimization_profile(self) -> _Profile:
        return _Profile()

    def build_serialized_network(self, network: Any, config: _Config) -> bytes | None:
        error = None if self._trt.fails("build_serialized_network", self._logger) else self._fault(network.model, config)
        if "build_serialized_network" in self._trt.faults or error:
            if error:
                self._logger.log(ILogger.Severity.ERROR, error)
            return None
        self._trt.builds += 1
        if config.cache:
            config.cache.content += b" more"
        shapes = [profile.shapes for profile in config.profiles]
        head = json.dumps({"version": self._trt.__version__, "gpu": self._trt.cuda.name, "profiles": shapes}).encode()
        return MAGIC + struct.pack("<Q", len(head)) + head + network.model.SerializeToString()

    def _fault(self, model: Any, config: _Config) -> str | None:
        if model is None:
            return "the network is empty"
        for value in model.graph.input:
            dims = _dims(value)
            for n, profile in enumerate(config.profiles):
                if -1 in dims and value.name not in profile.shapes:
                    return f"profile {n} lacks the dynamic input {value.name}"
                for shape in profile.shapes.get(value.name, ()):
                    if len(shape) != len(dims) or any(d not in (-1, size) for d, size in zip(dims, shape, strict=True)):
                        return f"{list(shape)} of profile {n} does not fit {value.name} {list(dims)}"
        return None if self._report(config.progress_monitor) else "the build was cancelled"

    def _report(self, monitor: Any) -> bool:
        monitor.phase_start("Building Engine", None, 2)
        monitor.phase_start("Selecting Tactics", "Building Engine", 2)
        going = True
        for step in range(2):
            self._trt.interrupt()
            going = going and monitor.step_complete("Selecting Tactics", step)
        monitor.phase_finish("Selecting Tactics")
        going = going and monitor.step_complete("Building Engine", 0) and monitor.step_complete("Building Engine", 1)
        monitor.phase_finish("Building Engine")
        return going


class _Runtime:
    def __init__(self, trt: FakeTensorRT, logger: ILogger) -> None:
        self._trt, self._logger = trt, logger

    def deserialize_cuda_engine(self, serialized: Any) -> _Engine | None:
        plan = bytes(memoryview(serialized))
        if self._trt.fails("deserialize_cuda_engine", self._logger):
            return None
        if not plan.startswith(MAGIC):
            self._logger.log(ILogger.Severity.ERROR, "the magic tag does not match")
            return None
        start = len(MAGIC) + 8
        (length,) = struct.unpack("<Q", plan[len(MAGIC) : start])
        head = json.loads(plan[start : start + length])
        if (head["version"], head["gpu"]) != (self._trt.__version__, self._trt.cuda.name):
            self._logger.log(ILogger.Severity.ERROR, "the plan was made by another version or for another device")
            return None
        self._trt.cuda.reserved += len(plan)
        return _Engine(self._trt, self._logger, onnx.ModelProto.FromString(plan[start + length :]), head["profiles"])


class _Engine:
    device_memory_size_v2 = SCRATCH

    def __init__(self, trt: FakeTensorRT, logger: ILogger, model: Any, profiles: Sequence[Mapping[str, Any]]) -> None:
        self.trt, self.logger, self.profiles = trt, logger, profiles
        self.inputs = {value.name: value for value in model.graph.input}
        self.outputs = {value.name: value for value in model.graph.output}
        self._names = [*self.inputs, *self.outputs]
        scatters = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "TensorScatter"}
        self.aliases = {name: scatters[name] for name in self.outputs if scatters.get(name) in self.inputs}
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        self.shapes_of = cache(self._shapes_of)

    num_io_tensors = property(lambda self: len(self._names))
    num_optimization_profiles = property(lambda self: len(self.profiles))

    def get_tensor_name(self, index: int) -> str:
        return self._names[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return self.type(name)[0]

    def get_tensor_shape(self, name: str) -> Shape:
        return _dims(self.inputs.get(name) or self.outputs[name])

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return self.aliases.get(name)

    def create_execution_context(self, strategy: Any) -> _Context | None:
        assert strategy is ExecutionContextAllocationStrategy.USER_MANAGED
        return None if self.trt.fails("create_execution_context", self.logger) else _Context(self)

    def type(self, name: str) -> Any:
        return _TYPES[(self.inputs.get(name) or self.outputs[name]).type.tensor_type.elem_type]

    def _shapes_of(self, shapes: tuple[tuple[str, Shape], ...]) -> dict[str, Shape]:
        """Return the shapes of the outputs, from a run with zeros."""
        feeds = {name: np.zeros(shape, self.type(name)[1]) for name, shape in shapes}
        return {name: array.shape for name, array in zip(self.outputs, self.session.run(list(self.outputs), feeds), strict=True)}


class _Context:
    def __init__(self, engine: _Engine) -> None:
        self._engine, self._cuda, self._logger = engine, engine.trt.cuda, engine.logger
        self._memory = self._profile = None
        self._shapes: dict[str, Shape] = {}
        self._addresses: dict[str, int] = {}
        self._changes = 0
        self._warm: int | None = None

    def set_device_memory(self, address: int, size: int) -> None:
        self._cuda.check(address, size)
        if size < SCRATCH:
            raise ValueError("too little memory")
        self._memory = address

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        if self._engine.trt.fails("set_optimization_profile_async", self._logger):
            return False
        self._profile, self._shapes = index, {}
        return True

    def set_input_shape(self, name: str, shape: Shape) -> bool:
        static = _dims(self._engine.inputs[name])
        least, _, most = self._engine.profiles[self._profile or 0].get(name, (static, static, static))
        if not all(a <= n <= b for a, n, b in zip(least, shape, most, strict=True)):
            self._logger.log(ILogger.Severity.ERROR, f"{name} {list(shape)} is not in profile {self._profile}")
            return False
        if self._shapes.get(name) != tuple(shape):
            self._shapes[name] = tuple(shape)
            self._changes += 1
        return True

    def infer_shapes(self) -> list[str]:
        return [name for name in self._engine.inputs if name not in self._shapes]

    def get_tensor_shape(self, name: str) -> Shape:
        return self._engine.shapes_of(tuple(self._shapes.items()))[name]

    def set_tensor_address(self, name: str, address: int) -> bool:
        if self._engine.trt.fails("set_tensor_address", self._logger):
            return False
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        fault = self._fault(stream)
        if fault or self._engine.trt.fails("execute_async_v3", self._logger):
            self._logger.log(ILogger.Severity.ERROR, fault or "")
            return False
        shapes, addresses, changes = dict(self._shapes), dict(self._addresses), self._changes
        captured = self._cuda.is_capturing(stream)

        def work() -> None:
            if captured and changes != self._changes:
                raise IllegalAddressError  # a graph holds what was there when it was captured
            feeds = {name: self._array(addresses[name], shapes[name], name) for name in self._engine.inputs}
            outputs = self._engine.session.run(list(self._engine.outputs), feeds)
            for name, array in zip(self._engine.outputs, outputs, strict=True):
                self._array(addresses[name], array.shape, name)[...] = array

        self._cuda.enqueue(stream, work)
        self._warm = self._changes
        return True

    def _fault(self, stream: int) -> str | None:
        names = (*self._engine.inputs, *self._engine.outputs)
        if self._memory is None or self._profile is None or self.infer_shapes():
            return "memory, profile or shapes are missing"
        if missing := [name for name in names if name not in self._addresses]:
            return f"{missing} have no address"
        if self._cuda.is_capturing(stream) and self._warm != self._changes:
            return "the first run with these shapes cannot be captured"
        read = {self._addresses[name] for name in self._engine.inputs}
        for name in self._engine.outputs:
            aliased = self._engine.aliases.get(name)
            if aliased and self._addresses[name] != self._addresses[aliased]:
                return f"{name} must be where {aliased} is"
            if not aliased and self._addresses[name] in read:
                return f"{name} would be written over an input"
        return None

    def _array(self, address: int, shape: Shape, name: str) -> Any:
        dtype = np.dtype(self._engine.type(name)[1])
        nbytes = int(np.prod(shape)) * dtype.itemsize
        self._cuda.check(address, nbytes)
        return np.frombuffer((ctypes.c_ubyte * nbytes).from_address(address), dtype).reshape(shape)


def _dims(value: Any) -> Shape:
    return tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in value.type.tensor_type.shape.dim)
