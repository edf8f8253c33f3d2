"""TensorRT engine: runs a plan with state, feeds and results in device buffers that are allocated once.

    feeds ──copy──► buffers of these shapes ─► context, or captured graph ─► buffers ──copy──► results, or resident results
                                      state ─►                            ─► the same state, in place

A step reads all rows of its plan's caches, so short states and large batches are faster in a shorter plan: of several lengths, a
state takes the shortest.

Each profile of a plan has its own context, so that the captured graph of the step stays valid during a prefill. All contexts of
all engines use the one stream of `trt.device`, one run after the other: a resident result can be fed to another engine without
synchronisation.

The first run after a change of shapes is not captured, since TensorRT does some work only then. The second is captured as a CUDA
graph, which later runs launch until the shapes change again.

Tests run this file end to end with a simulation of TensorRT and CUDA only.
"""

from __future__ import annotations

import logging
import mmap
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..engine import Array, GraphSpec, Resident, State, TensorSpec, Traits, check_feeds, is_constant, names
from ..errors import FishrtError, GraphError
from .api import checked, load_tensorrt, log_of
from .device import Device, DeviceBuffer, Graph, open_device
from .plans import Plan, find_plans, machine_of
from .state import Call, DeviceArray, Loaded, Tensor, TrtState, largest_sizes

log = logging.getLogger(__name__)

_CALLS_KEPT = 4
"""Calls that a state keeps, least recently used first out. A loop uses two or three; a prefill's is rarely used again."""
_DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT64": "int64", "INT32": "int32", "INT8": "int8"}
_DTYPES |= {"BOOL": "bool", "UINT8": "uint8"}
"""Name of an element type in specs, by TensorRT's name."""
_LEFT_FREE = 0.25
"""Part of the device's memory that stays free for states when a shorter plan is loaded beside the longest."""
_REBUILD = "remove its folder, and build the plan again"


def open_plan(path: Path, spec: GraphSpec) -> TrtEngine:
    """Open the plan that was built of a graph. The plan is found by the identity in `spec`: the file is not read.

    Raises ProviderError if TensorRT, a device, or a plan for this machine is missing; GraphError for a plan that cannot be loaded
    or differs from `spec`; FishrtError if the device's memory does not suffice.
    """
    trt, device = load_tensorrt(), open_device()
    loaded: list[tuple[Plan, Any]] = []
    for plan in find_plans(path, spec, machine_of(trt.__version__, device)):
        size, (free, total) = plan.path.stat().st_size, device.memory()
        if loaded and free - size < total * _LEFT_FREE:
            log.info("%s is not loaded: too little memory would be left", plan.path)
            break
        log.info("%s runs in %s, from %s", spec.file, plan.key.lowering.precision, plan.path)
        device.check_room(size, f"the plan of {spec.file}")
        runtime = checked(trt, "making a runtime", lambda: trt.Runtime(log_of(trt)))
        loaded.append((plan, _load(trt, runtime, plan.path)))
    return TrtEngine(trt, device, spec, loaded[::-1])


def _load(trt: Any, runtime: Any, path: Path) -> Any:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as serialized:
        return checked(trt, f"loading {path}", lambda: runtime.deserialize_cuda_engine(serialized), _REBUILD)


def find_built(path: Path, spec: GraphSpec) -> Plan:
    """Return the longest plan that `open_plan` would load. Raises ProviderError if there is none for this machine."""
    return find_plans(path, spec, machine_of(load_tensorrt().__version__, open_device()))[0]


class _Context:
    """The execution context of one profile of an engine."""

    def __init__(self, trt: Any, device: Device, engine: Any, profile: int, scratch: DeviceBuffer) -> None:
        """Create the context. scratch: memory for activations. Raises GraphError if TensorRT fails."""
        self._trt, self._device, self._scratch = trt, device, scratch
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self._context = checked(trt, "making a context", lambda: engine.create_execution_context(strategy))
        self._shapes: dict[str, tuple[int, ...]] = {}
        self.changes = 0
        """Number of changes of shapes so far."""
        self._ran = 0
        """`changes` at the last run."""
        context = self._context
        self._set("the device memory", lambda: context.set_device_memory(scratch.address, scratch.nbytes) is not False)
        self._set(f"profile {profile}", lambda: context.set_optimization_profile_async(profile, device.stream))

    def set_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Set the shapes of all inputs. Raises GraphError for shapes that the profile does not allow."""
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
        """Return the shape of an output, after `set_shapes`."""
        return tuple(self._context.get_tensor_shape(name))

    @property
    def warm(self) -> bool:
        """Return whether it has run with its present shapes."""
        return self._ran == self.changes

    def enqueue(self, addresses: Mapping[str, int]) -> None:
        """Start one run on buffers at these addresses, by tensor name."""
        for name, address in addresses.items():
            self._set(f"the address of {name}", partial(self._context.set_tensor_address, name, address))
        checked(self._trt, "running", lambda: self._context.execute_async_v3(self._device.stream))
        self._ran = self.changes

    def _set(self, what: str, setter: Callable[[], bool]) -> None:
        checked(self._trt, f"setting {what}", setter)


class TrtEngine:
    """Loaded plans of one graph, which differ in the length of its caches. See `engine.Engine`."""

    provider, traits = "tensorrt", Traits(parts_states=False)

    def __init__(self, trt: Any, device: Device, spec: GraphSpec, plans: Sequence[tuple[Plan, Any]]) -> None:
        """spec: of the portable graph. plans: each with TensorRT's engine, the shortest first.

        Raises GraphError for a plan with other tensors, FishrtError for too little memory.
        """
        self.spec = spec
        self._device = device
        self._plans: list[Loaded] = []
        self._results = [t.name for t in spec.results]
        self._captures = True
        """Whether runs are captured; False after a capture has failed."""
        for plan, engine in plans:
            if wrong := sorted(_differences(trt, engine, spec, plan)):
                raise GraphError(f"{plan.path} differs from its description: {'; '.join(wrong)}", hint=_REBUILD)
        with device.lock:
            # Contexts run one after the other, so all share this memory.
            needed = max(engine.device_memory_size_v2 for _, engine in plans)
            scratch = device.allocate(max(needed, 1), f"running {spec.file}")
            for plan, engine in plans:
                in_place = {pair.input for pair in spec.states if engine.get_aliased_input_tensor(pair.output) == pair.input}
                contexts = [_Context(trt, device, engine, n, scratch) for n in range(engine.num_optimization_profiles)]
                self._plans.append(Loaded(device, spec, plan, in_place, contexts, largest_sizes(spec, plan)))
        self._shared = None if spec.states else TrtState(self._plans, {})
        """The buffers of a graph without state."""

    @property
    def limits(self) -> Mapping[str, int]:
        """Return the largest size of each symbolic dimension in the longest plan's profiles."""
        return self._plans[-1].limits

    def new_state(self, **dims: int) -> TrtState:
        """See `engine.Engine.new_state`. Raises ValueError if `dims` does not name exactly the state's symbolic dimensions.

        Raises FishrtError for sizes beyond the plan's profiles or the device's memory.
        """
        return TrtState(self._plans, dims)

    def run(
        self, feeds: Mapping[str, Array | Resident], state: State | None = None, resident: Collection[str] = ()
    ) -> dict[str, Any]:
        """See `engine.Engine.run`. Results of a run with a state live in buffers that its next run may overwrite."""
        if self._shared is not None and state is not None:
            raise ValueError(f"{self.spec.file} carries no state, but one was given")
        used = state if self._shared is None else self._shared
        if not isinstance(used, TrtState) or used.plans is not self._plans:
            raise ValueError(f"{self.spec.file} needs a state that its own new_state made")
        if unknown := set(resident) - set(self._results):
            raise ValueError(f"{names(unknown)} cannot stay on the device; the results are {names(self._results)}")
        if foreign := [name for name, value in feeds.items() if not isinstance(value, (np.ndarray, DeviceArray))]:
            raise ValueError(f"{names(foreign)} of {self.spec.file} must be arrays, or results that stayed on the device")
        dims = check_feeds(self.spec, feeds, used.dims)
        self._check_writes(feeds, dims, used)
        with self._device.lock:
            used.move_for(dims)
            call = self._call(feeds, dims, used)
            self._give(feeds, call)
            self._execute(call, used)
            return self._take(call, resident)

    def _check_writes(self, feeds: Mapping[str, Array | Resident], dims: Mapping[str, int], state: TrtState) -> None:
        """Check that columns fit into the cache: TensorRT would write beyond its end. Raises ValueError otherwise."""
        writes = state.loaded.plan.writes
        if writes is None:
            return
        given = feeds[writes.write_index]
        index = given if isinstance(given, np.ndarray) else given.numpy()
        cache = next(t for t in self.spec.state_tensors if t.name == writes.cache)
        rows, more = cache.resolve(state.dims)[-2], dims[writes.length]
        if int(index.min()) < 0 or int(index.max()) + more > rows:
            raise ValueError(f"{self.spec.file}: {more} columns at {index.tolist()} do not fit into a cache of {rows} rows")

    def _call(self, feeds: Mapping[str, Array | Resident], dims: Mapping[str, int], state: TrtState) -> Call:
        """Return the buffers for the shapes of `feeds`, which are allocated at their first use."""
        shapes = tuple(feeds[t.name].shape for t in self.spec.feeds)
        call = state.calls.get(shapes)
        if call is None:
            call = state.calls[shapes] = self._bind(dims, state.loaded)
            if len(state.calls) > _CALLS_KEPT:
                state.calls.popitem(last=False)
        state.calls.move_to_end(shapes)
        return call

    def _bind(self, dims: Mapping[str, int], loaded: Loaded) -> Call:
        profile, described = loaded.plan.profile_for(dims), loaded.plan.spec
        shapes = {t.name: t.resolve(dims) for t in described.inputs}
        context = loaded.contexts[profile]
        context.set_shapes(shapes)
        feeds = {t.name: self._tensor(t, shapes[t.name]) for t in described.feeds}
        results = {t.name: self._tensor(t, context.shape(t.name)) for t in described.results}
        return Call(profile, shapes, feeds, results)

    def _tensor(self, spec: TensorSpec, shape: tuple[int, ...]) -> Tensor:
        if min(shape, default=1) < 1:
            raise GraphError(
                f"TensorRT gives {spec.name} of {self.spec.file} the shape {list(shape)}", hint="export the bundle again"
            )
        host = self._device.pinned(shape, np.dtype(spec.dtype))
        return Tensor(self._device.allocate(host.nbytes, f"{spec.name} of {self.spec.file}"), host)

    def _give(self, feeds: Mapping[str, Array | Resident], call: Call) -> None:
        """Copy feeds into the buffers of a call."""
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
        context = state.loaded.contexts[call.profile]
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
        """Return one run as a CUDA graph; None, with one warning, if it cannot be captured."""
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


def _differences(trt: Any, engine: Any, spec: GraphSpec, plan: Plan) -> Iterator[str]:
    """Yield the differences between an engine's tensors and the described ones."""
    needed = {t.name for t in plan.spec.inputs}  # what it takes for a constant is not fed
    tensors_of = [[t.name for t in (*(t for t in s.inputs if t.name in needed), *s.outputs)] for s in (spec, plan.spec)]
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
