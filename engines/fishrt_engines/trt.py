"""TensorRT: plans that `trt_build` made, run with state, feeds and results in buffers of the device that are allocated once.

    feeds ──copy──► buffers of these shapes ─► context, or captured graph ─► buffers ──copy──► results, or they stay there
                                      state ─►                            ─► the same state, in place

Each profile of a plan has its own context, so that a graph that was captured from the step stays good while prompts are read.
All contexts of all engines work on the one stream of `cuda_device`, one run after the other: a result that stays on the device
can be fed to another engine without waiting for it.

The first run after shapes in a context have changed is a plain one, since TensorRT does some work only then. The second is
captured as a CUDA graph, which later ones launch until the shapes change again.

Driven end to end by tests with a simulation of TensorRT and CUDA only: neither library nor device was at hand.
"""

from __future__ import annotations

import logging
import mmap
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .base import Array, Resident, State
from .cuda_device import Device, DeviceBuffer, Graph, open_device
from .errors import FishrtError, GraphError
from .feeds import check_feeds, is_constant, names
from .spec import GraphSpec, TensorSpec
from .trt_api import CudaEngine, TensorRT, checked, load_tensorrt, log_of
from .trt_plans import Plan, find_plan, graph_hash, machine_of, read_portable, weights_identity
from .trt_state import Call, DeviceArray, Kept, Tensor, TrtState

log = logging.getLogger(__name__)

_CALLS_KEPT = 4
"""Combinations of shapes that a state remembers. A loop has two or three; a prefill's is rarely met again: it goes first."""
_DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT64": "int64", "INT32": "int32", "INT8": "int8"}
_DTYPES |= {"BOOL": "bool", "UINT8": "uint8"}
"""Names of element types: TensorRT's, and those of specs."""
_REBUILD = "remove its folder, and run fishrt build-trt again"


def open_plan(
    path: Path, spec: GraphSpec, *, identity: str | None = None, build: Callable[[bytes], bytes] | None = None
) -> TrtEngine:
    """The plan that `fishrt build-trt` made of a graph, on the device.

    identity: a hash that stands for the file and its weights. build: makes the graph from the file's bytes.
    Raises ProviderError where TensorRT, a device, or a plan for this machine is missing; GraphError for a plan that cannot be
    loaded or is not what `spec` says; FishrtError where the device's memory does not suffice.
    """
    trt, device = load_tensorrt(), open_device()
    plan = find_built(path, spec, identity=identity, build=build)
    log.info("%s runs in %s, from %s", spec.file, plan.key.lowering.precision, plan.path)
    device.check_room(plan.path.stat().st_size, f"the plan of {spec.file}")
    runtime = checked(trt, "making a runtime", lambda: trt.Runtime(log_of(trt)))
    with plan.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as serialized:
        engine = checked(trt, f"loading {plan.path}", lambda: runtime.deserialize_cuda_engine(serialized), _REBUILD)
    return TrtEngine(trt, device, engine, spec, plan)


def find_built(
    path: Path, spec: GraphSpec, *, identity: str | None = None, build: Callable[[bytes], bytes] | None = None
) -> Plan:
    """The plan that `open_plan` would load. Raises ProviderError if there is none for this machine."""
    trt, device = load_tensorrt(), open_device()
    portable = read_portable(path, build)
    weights = identity or weights_identity(portable, path.parent)
    return find_plan(graph_hash(portable), weights, machine_of(trt.__version__, device), path.with_name(spec.file))


class _Context:
    """One profile of an engine."""

    def __init__(self, trt: TensorRT, device: Device, engine: CudaEngine, profile: int, scratch: DeviceBuffer) -> None:
        """scratch: memory for what layers hand on."""
        self._trt, self._device, self._scratch = trt, device, scratch
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self._context = checked(trt, "making a context", lambda: engine.create_execution_context(strategy))
        self._shapes: dict[str, tuple[int, ...]] = {}
        self.changes = 0
        """How often the shapes were changed."""
        self._ran = 0
        """That number at the last run."""
        context = self._context
        self._set("the device memory", lambda: context.set_device_memory(scratch.address, scratch.nbytes) is not False)
        self._set(f"profile {profile}", lambda: context.set_optimization_profile_async(profile, device.stream))

    def set_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Of all inputs."""
        if shapes == self._shapes:
            return
        self._shapes = {}
        for name, shape in shapes.items():
            self._set(f"{name} to {list(shape)}", partial(self._context.set_input_shape, name, shape))
        if missing := checked(self._trt, "working out shapes", self._context.infer_shapes):
            raise GraphError(f"TensorRT does not know the shape of {names(missing)}")
        self._shapes = dict(shapes)
        self.changes += 1

    def shape(self, name: str) -> tuple[int, ...]:
        """Of an output, now that all inputs have theirs."""
        return tuple(self._context.get_tensor_shape(name))

    @property
    def warm(self) -> bool:
        """Whether it ran with its present shapes."""
        return self._ran == self.changes

    def enqueue(self, addresses: Mapping[str, int]) -> None:
        """Asks for one run on these buffers."""
        for name, address in addresses.items():
            self._set(f"the address of {name}", partial(self._context.set_tensor_address, name, address))
        checked(self._trt, "running", lambda: self._context.execute_async_v3(self._device.stream))
        self._ran = self.changes

    def _set(self, what: str, setter: Callable[[], bool]) -> None:
        checked(self._trt, f"setting {what}", setter)


class TrtEngine:
    """One plan. See `base.Engine`."""

    provider = "tensorrt"

    def __init__(self, trt: TensorRT, device: Device, engine: CudaEngine, spec: GraphSpec, plan: Plan) -> None:
        """spec: of the portable graph. Raises GraphError for a plan of other tensors, FishrtError where memory is too small."""
        if wrong := sorted(_differences(trt, engine, spec, plan)):
            raise GraphError(f"{plan.path} is not what its description says: {'; '.join(wrong)}", hint=_REBUILD)
        self.spec = spec
        self._device, self._plan, self._engine = device, plan, engine
        in_place = {pair.input for pair in spec.states if engine.get_aliased_input_tensor(pair.output) == pair.input}
        self._kept = Kept(device, spec, plan, in_place)
        self._results = [t.name for t in spec.results]
        self._captures = True
        """Whether its runs can be captured, as far as is known."""
        with device.lock:
            # Contexts work one after the other, so that all may use the same memory.
            scratch = device.allocate(max(engine.device_memory_size_v2, 1), f"running {spec.file}")
            self._contexts = [_Context(trt, device, engine, n, scratch) for n in range(engine.num_optimization_profiles)]
        self._shared = None if spec.states else TrtState(self._kept, {})
        """Buffers of a graph that carries no state."""

    @property
    def limits(self) -> Mapping[str, int]:
        """The greatest size of each symbolic dimension that the plan was built for."""
        return self._kept.limits

    def new_state(self, **dims: int) -> TrtState:
        """State of zeros. `dims` gives every symbolic dimension of the state tensors; ValueError for any other set of names.

        Raises FishrtError for more than the plan was built for, or than fits into memory.
        """
        return TrtState(self._kept, dims)

    def run(
        self, feeds: Mapping[str, Array | Resident], state: State | None = None, resident: Collection[str] = ()
    ) -> dict[str, Any]:
        """See `base.Engine.run`. Results of a run with a state live in buffers that its next run may overwrite."""
        if self._shared is not None and state is not None:
            raise ValueError(f"{self.spec.file} carries no state, but one was given")
        used = state if self._shared is None else self._shared
        if not isinstance(used, TrtState) or used.kept is not self._kept:
            raise ValueError(f"{self.spec.file} needs a state that its own new_state made")
        if unknown := set(resident) - set(self._results):
            raise ValueError(f"{names(unknown)} cannot stay on the device; the results are {names(self._results)}")
        if foreign := [name for name, value in feeds.items() if not isinstance(value, (np.ndarray, DeviceArray))]:
            raise ValueError(f"{names(foreign)} of {self.spec.file} must be arrays, or results that stayed on the device")
        dims = check_feeds(self.spec, feeds, used.dims)
        self._check_writes(feeds, dims, used)
        with self._device.lock:
            call = self._call(feeds, dims, used)
            self._give(feeds, call)
            self._execute(call, used)
            return self._take(call, resident)

    def _check_writes(self, feeds: Mapping[str, Array | Resident], dims: Mapping[str, int], state: TrtState) -> None:
        """Raises ValueError for columns behind the end of a cache: TensorRT would write them wherever that is."""
        writes = self._plan.writes
        if writes is None:
            return
        given = feeds[writes.write_index]
        index = given if isinstance(given, np.ndarray) else given.numpy()
        cache = next(t for t in self.spec.state_tensors if t.name == writes.cache)
        rows, more = cache.resolve(state.dims)[-2], dims[writes.length]
        if int(index.min()) < 0 or int(index.max()) + more > rows:
            raise ValueError(f"{self.spec.file}: {more} more from {index.tolist()} on do not fit into {rows} rows of cache")

    def _call(self, feeds: Mapping[str, Array | Resident], dims: Mapping[str, int], state: TrtState) -> Call:
        """The buffers for the shapes of `feeds`. They are made when these are met for the first time."""
        shapes = tuple(feeds[t.name].shape for t in self.spec.feeds)
        call = state.calls.get(shapes)
        if call is None:
            call = state.calls[shapes] = self._bind(dims)
            if len(state.calls) > _CALLS_KEPT:
                state.calls.popitem(last=False)
        state.calls.move_to_end(shapes)
        return call

    def _bind(self, dims: Mapping[str, int]) -> Call:
        profile = self._plan.profile_for(dims)
        shapes = {t.name: t.resolve(dims) for t in self._plan.spec.inputs}
        context = self._contexts[profile]
        context.set_shapes(shapes)
        feeds = {t.name: self._tensor(t, shapes[t.name]) for t in self._plan.spec.feeds}
        results = {t.name: self._tensor(t, context.shape(t.name)) for t in self._plan.spec.results}
        return Call(profile, shapes, feeds, results)

    def _tensor(self, spec: TensorSpec, shape: tuple[int, ...]) -> Tensor:
        if min(shape, default=1) < 1:
            raise GraphError(
                f"TensorRT gives {spec.name} of {self.spec.file} the shape {list(shape)}", hint="export the bundle again"
            )
        host = self._device.pinned(shape, np.dtype(spec.dtype))
        return Tensor(self._device.allocate(host.nbytes, f"{spec.name} of {self.spec.file}"), host)

    def _give(self, feeds: Mapping[str, Array | Resident], call: Call) -> None:
        """Copies feeds to where the run reads them."""
        if call.waits == self._device.waits:
            self._device.synchronize()
        for name, tensor in call.feeds.items():
            given = feeds[name]
            if given is call.constants.get(name):
                continue
            call.constants.pop(name, None)
            if is_constant(given):
                call.constants[name] = given
            if isinstance(given, np.ndarray):
                tensor.host[...] = given
                self._device.upload(tensor.host, tensor.device.address)
            else:
                assert isinstance(given, DeviceArray)
                self._device.copy(given.buffer.address, tensor.device.address, tensor.host.nbytes)

    def _execute(self, call: Call, state: TrtState) -> None:
        context = self._contexts[call.profile]
        context.set_shapes(call.shapes)
        addresses = {name: tensor.device.address for name, tensor in (*call.feeds.items(), *call.results.items())}
        for pair in self.spec.states:
            addresses |= {pair.input: state.address(pair.input), pair.output: state.address(pair.input, after=True)}
        changes, graph = call.graphs.get(state.turned, (-1, None))
        if changes != context.changes:
            graph = self._captured(context, addresses) if context.warm else None
            if graph is not None:
                call.graphs[state.turned] = context.changes, graph
        if graph is not None:
            graph.launch()
        else:
            context.enqueue(addresses)
        call.waits = self._device.waits
        state.turn()

    def _captured(self, context: _Context, addresses: Mapping[str, int]) -> Graph | None:
        """One run as a graph; None, with a warning the first time, where that does not work."""
        if not self._captures:
            return None
        try:
            return self._device.capture(lambda: context.enqueue(addresses))
        except FishrtError as error:
            self._captures = False
            log.warning("%s runs without a CUDA graph, and so slower: %s", self.spec.file, error)
            return None

    def _take(self, call: Call, resident: Collection[str]) -> dict[str, Any]:
        taken = [name for name in self._results if name not in resident]
        for name in taken:
            self._device.download(call.results[name].device.address, call.results[name].host)
        if taken:
            self._device.synchronize()
        results: dict[str, Any] = {}
        for name in self._results:
            tensor, shared = call.results[name], self._shared is not None
            if name in taken:
                results[name] = tensor.host.copy() if shared else tensor.host
                continue
            buffer = tensor.device
            if shared:
                buffer = self._device.allocate(tensor.device.nbytes, f"{name} of {self.spec.file}")
                self._device.copy(tensor.device.address, buffer.address, buffer.nbytes)
            results[name] = DeviceArray(self._device, buffer, tensor.host.shape, tensor.host.dtype)
        return results


def _differences(trt: TensorRT, engine: CudaEngine, spec: GraphSpec, plan: Plan) -> Iterator[str]:
    """How an engine's tensors differ from the described ones."""
    tensors_of = [[[t.name for t in kind] for kind in (s.inputs, s.outputs)] for s in (spec, plan.spec)]
    if tensors_of[0] != tensors_of[1] or spec.states != plan.spec.states:
        yield "its tensors are not those of the bundle"
    if engine.num_optimization_profiles != len(plan.key.profiles):
        yield f"it has {engine.num_optimization_profiles} profiles instead of {len(plan.key.profiles)}"
    there = {engine.get_tensor_name(n) for n in range(engine.num_io_tensors)}
    for name in there - {t.name for t in (*plan.spec.inputs, *plan.spec.outputs)}:
        yield f"{name} is not described"
    for tensors, mode, kind in (
        (plan.spec.inputs, trt.TensorIOMode.INPUT, "input"),
        (plan.spec.outputs, trt.TensorIOMode.OUTPUT, "output"),
    ):
        for tensor in tensors:
            if tensor.name not in there or engine.get_tensor_mode(tensor.name) != mode:
                yield f"{kind} {tensor.name} is missing"
                continue
            named = engine.get_tensor_dtype(tensor.name).name
            dtype, shape = _DTYPES.get(named, named), tuple(engine.get_tensor_shape(tensor.name))
            same = len(shape) == len(tensor.shape) and all(
                isinstance(described, str) or built in (-1, described)
                for built, described in zip(shape, tensor.shape, strict=True)
            )
            if dtype != tensor.dtype or not same:
                yield f"{kind} {tensor.name} is {dtype} {list(shape)} instead of {tensor.dtype} {list(tensor.shape)}"
