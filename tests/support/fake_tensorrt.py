"""A fake of TensorRT that checks the order of calls, and runs "plans" in ONNX Runtime. It proves nothing about TensorRT.

It has the names that fishrt uses, with the arguments, results and failures that are documented for TensorRT 11. It checks that
shapes are within profiles, addresses have enough memory, caches are updated in place, and that graphs are captured after a first
run and launched only while shapes are unchanged. Only a device shows what the real importer accepts, and the numbers and speed of
real plans.
"""

# ruff: noqa: N802 - the names are TensorRT's

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from functools import cache, wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime

from fake_cuda_runtime import FakeCudaRuntime

Shape = tuple[int, ...]
TYPES = {onnx.TensorProto.FLOAT: "FLOAT", onnx.TensorProto.FLOAT16: "HALF", onnx.TensorProto.INT64: "INT64"}


def may_fail(result: Any = None) -> Callable[[Any], Any]:
    """Let a method return `result`, and say why, if a test put its name into `FakeTensorRT.faults`."""

    def wrap(method: Any) -> Any:
        @wraps(method)
        def call(self: Any, *given: Any) -> Any:
            trt = getattr(self, "trt", self)
            fault = trt.faults.get(method.__name__)
            return method(self, *given) if fault is None else trt.refused(fault, result)

        return call

    return wrap


class FakeTensorRT:
    """The module. `builds` counts builds, `configs` are their options."""

    ILogger, IProgressMonitor = type("ILogger", (), {}), type("IProgressMonitor", (), {})
    TensorIOMode = Enum("TensorIOMode", ["NONE", "INPUT", "OUTPUT"])
    MemoryPoolType = Enum("MemoryPoolType", ["WORKSPACE"])
    ExecutionContextAllocationStrategy = Enum("ExecutionContextAllocationStrategy", ["STATIC", "USER_MANAGED"])

    def __init__(self, cuda: FakeCudaRuntime, version: str = "11.4.0.106") -> None:
        self.__version__, self.cuda = version, cuda
        self.logger: Any = None
        self.faults: dict[str, str] = {}
        """Names of methods that fail, and their messages to the logger."""
        self.builds = 0
        self.configs: list[Config] = []
        self.refuses: Callable[[onnx.ModelProto], str | None] = lambda model: None
        """Return why a network cannot be built."""

    def refused(self, why: str, result: Any = None) -> Any:
        self.logger.log(1, why)
        return result

    def Builder(self, logger: Any) -> Any:
        self.logger = logger
        return self.refused(self.faults["Builder"]) if "Builder" in self.faults else Builder(self)

    def OnnxParser(self, network: Any, logger: Any) -> Any:
        return Parser(self, network)

    def Runtime(self, logger: Any) -> Any:
        self.logger = logger
        return self.refused(self.faults["Runtime"]) if "Runtime" in self.faults else Runtime(self)


class Parser:
    def __init__(self, trt: FakeTensorRT, network: Any) -> None:
        self.trt, self._network = trt, network
        self._errors: list[Any] = []

    num_errors = property(lambda self: len(self._errors))

    def get_error(self, index: int) -> Any:
        return self._errors[index]

    @may_fail(False)
    def parse(self, model: bytes, path: str) -> bool:
        parsed = onnx.ModelProto.FromString(model)
        _read_weights(parsed, Path(path).parent)
        for node in parsed.graph.node:
            if node.op_type == "Acosh":
                said = {"desc": "no importer is registered for this operator", "node_name": node.name, "node_operator": "Acosh"}
                self._errors.append(SimpleNamespace(**{name: lambda text=text: text for name, text in said.items()}))
        self._network.model = parsed
        return not self._errors


def _read_weights(model: onnx.ModelProto, folder: Path) -> None:
    """Read weights into the model. TensorRT opens whatever file is at the place; the onnx package refuses one with links."""
    for tensor in model.graph.initializer:
        if tensor.external_data:
            place = onnx.external_data_helper.ExternalDataInfo(tensor)
            with (folder / place.location).open("rb") as file:
                file.seek(place.offset or 0)
                tensor.raw_data = file.read(place.length or -1)
            tensor.data_location = onnx.TensorProto.DEFAULT
            del tensor.external_data[:]


class Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, tuple[Shape, Shape, Shape]] = {}

    def set_shape(self, name: str, least: Shape, usual: Shape, most: Shape) -> None:
        if not all(a <= b <= c for a, b, c in zip(least, usual, most, strict=True)):
            raise ValueError(f"{name}: the shapes are not in order")
        self.shapes[name] = least, usual, most


class Config:
    progress_monitor: Any

    def __init__(self, trt: FakeTensorRT) -> None:
        self.trt, self._timings = trt, f"timings {trt.__version__} {trt.cuda.name}".encode()
        self.profiles: list[Profile] = []
        self.limits: dict[Any, int] = {}

    def set_memory_pool_limit(self, pool: Any, size: int) -> None:
        self.limits[pool] = size

    @may_fail(-1)
    def add_optimization_profile(self, profile: Profile) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def create_timing_cache(self, serialized: bytes) -> Any:
        return serialized if not serialized or serialized.startswith(b"timings ") else None

    def set_timing_cache(self, given: Any, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        if given and not given.startswith(self._timings):
            return False
        self._timings = given + b" more" if given else self._timings
        return True

    def get_timing_cache(self) -> Any:
        return SimpleNamespace(serialize=lambda: self._timings)


class Builder:
    def __init__(self, trt: FakeTensorRT) -> None:
        self.trt = trt

    def create_network(self, flags: int) -> Any:
        assert flags == 0  # every network is strongly typed
        return SimpleNamespace(model=None)

    def create_builder_config(self) -> Config:
        self.trt.configs.append(Config(self.trt))
        return self.trt.configs[-1]

    def create_optimization_profile(self) -> Profile:
        return Profile()

    @may_fail()
    def build_serialized_network(self, network: Any, config: Config) -> bytes | None:
        for value in network.model.graph.input:
            for profile in config.profiles:
                assert -1 not in dims_of(value) or value.name in profile.shapes, "every profile has every dynamic input"
                for shape in profile.shapes.get(value.name, ()):
                    assert all(d in (-1, size) for d, size in zip(dims_of(value), shape, strict=True))
        if why := self.trt.refuses(network.model):
            self.trt.refused(why)
            return None
        if not reported(config.progress_monitor):
            return None
        self.trt.builds += 1
        head = [self.trt.__version__, self.trt.cuda.name, [profile.shapes for profile in config.profiles]]
        return json.dumps(head).encode() + b"\n" + network.model.SerializeToString()


def reported(monitor: Any) -> bool:
    """Report phases and their steps; return whether the build may go on."""
    monitor.phase_start("Building Engine", None, 2)
    monitor.phase_start("Selecting Tactics", "Building Engine", 2)
    going = [monitor.step_complete("Selecting Tactics", step) for step in range(2)]
    monitor.phase_finish("Selecting Tactics")
    going += [monitor.step_complete("Building Engine", step) for step in range(2)]
    monitor.phase_finish("Building Engine")
    return all(going)


class Runtime:
    def __init__(self, trt: FakeTensorRT) -> None:
        self.trt = trt

    @may_fail()
    def deserialize_cuda_engine(self, serialized: Any) -> Engine:
        head, _, model = bytes(memoryview(serialized)).partition(b"\n")
        version, gpu, profiles = json.loads(head)
        assert (version, gpu) == (self.trt.__version__, self.trt.cuda.name)
        self.trt.cuda.reserved += len(model)
        return Engine(self.trt, onnx.ModelProto.FromString(model), profiles)


class Engine:
    device_memory_size_v2 = 4096

    def __init__(self, trt: FakeTensorRT, model: onnx.ModelProto, profiles: Sequence[Mapping[str, Any]]) -> None:
        self.trt, self.profiles = trt, profiles
        self.inputs = {value.name: value for value in model.graph.input}
        self.outputs = {value.name: value for value in model.graph.output}
        self.values = {**self.inputs, **self.outputs}
        scatters = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "TensorScatter"}
        self.aliases = {name: scatters[name] for name in self.outputs if scatters.get(name) in self.inputs}
        options = onnxruntime.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, 1
        for node in model.graph.node:
            for told in [a for a in node.attribute if a.name.startswith("TRT_")]:
                node.attribute.remove(told)  # for TensorRT only
        self._session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        self.shapes_of = cache(self._shapes_of)

    num_io_tensors = property(lambda self: len(self.values))
    num_optimization_profiles = property(lambda self: len(self.profiles))

    def get_tensor_name(self, index: int) -> str:
        return list(self.values)[index]

    def get_tensor_mode(self, name: str) -> Any:
        return FakeTensorRT.TensorIOMode.INPUT if name in self.inputs else FakeTensorRT.TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=TYPES[self.values[name].type.tensor_type.elem_type])

    def get_tensor_shape(self, name: str) -> Shape:
        return dims_of(self.values[name])

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return self.aliases.get(name)

    @may_fail()
    def create_execution_context(self, strategy: Any) -> Context:
        assert strategy is FakeTensorRT.ExecutionContextAllocationStrategy.USER_MANAGED
        return Context(self)

    def dtype(self, name: str) -> Any:
        return onnx.helper.tensor_dtype_to_np_dtype(self.values[name].type.tensor_type.elem_type)

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        return dict(zip(self.outputs, self._session.run(list(self.outputs), feeds), strict=True))

    def _shapes_of(self, shapes: tuple[tuple[str, Shape], ...]) -> dict[str, Shape]:
        results = self.run({name: np.zeros(shape, self.dtype(name)) for name, shape in shapes})
        return {name: array.shape for name, array in results.items()}


class Context:
    def __init__(self, engine: Engine) -> None:
        self.trt, self._engine, self._cuda = engine.trt, engine, engine.trt.cuda
        self._memory = self._profile = self._warm = None
        self._shapes: dict[str, Shape] = {}
        self._addresses: dict[str, int] = {}

    def set_device_memory(self, address: int, size: int) -> None:
        assert size >= self._engine.device_memory_size_v2
        self._memory = self._cuda.checked(address, size)

    @may_fail(False)
    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self._profile, self._shapes = index, {}
        return True

    def set_input_shape(self, name: str, shape: Shape) -> bool:
        static = dims_of(self._engine.inputs[name])
        least, _, most = self._engine.profiles[self._profile].get(name, (static, static, static))
        if not all(a <= n <= b for a, n, b in zip(least, shape, most, strict=True)):
            return bool(self.trt.refused(f"{name} {list(shape)} is not in profile {self._profile}"))
        if self._shapes.get(name) != shape:
            self._shapes, self._warm = {**self._shapes, name: shape}, None
        return True

    def infer_shapes(self) -> list[str]:
        return [name for name in self._engine.inputs if name not in self._shapes]

    def get_tensor_shape(self, name: str) -> Shape:
        return self._engine.shapes_of(tuple(self._shapes.items()))[name]

    @may_fail(False)
    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return True

    @may_fail(False)
    def execute_async_v3(self, stream: int) -> bool:
        captured, shapes, addresses = self._cuda.captured is not None, self._shapes, dict(self._addresses)
        aliases = self._engine.aliases
        assert self._memory is not None
        assert not self.infer_shapes()
        assert addresses.keys() == self._engine.values.keys()
        assert not captured or self._warm is shapes, "the first run with these shapes cannot be captured"
        read = {addresses[name] for name in self._engine.inputs}
        for name in self._engine.outputs:
            if name in aliases:
                assert addresses[name] == addresses[aliases[name]], f"{name} must be where {aliases[name]} is"
            else:
                assert addresses[name] not in read, f"{name} would be written over an input"

        def work() -> None:
            assert not captured or self._shapes is shapes, "a graph holds what was there when it was captured"
            results = self._engine.run({name: self._array(addresses[name], shapes[name], name) for name in self._engine.inputs})
            for name, array in results.items():
                self._array(addresses[name], array.shape, name)[...] = array

        self._cuda.enqueue(stream, work)
        self._warm = shapes
        return True

    def _array(self, address: int, shape: Shape, name: str) -> Any:
        dtype = np.dtype(self._engine.dtype(name))
        nbytes = int(np.prod(shape)) * dtype.itemsize
        memory = (ctypes.c_ubyte * nbytes).from_address(self._cuda.checked(address, nbytes))
        return np.frombuffer(memory, dtype).reshape(shape)


def dims_of(value: onnx.ValueInfoProto) -> Shape:
    return tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in value.type.tensor_type.shape.dim)
