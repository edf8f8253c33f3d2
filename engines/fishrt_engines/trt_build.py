"""Building plans: portable graph ─► lowering ─► TensorRT's importer ─► its builder ─► `trt_plans`.

What was built is kept, so that a second call with the same graph, options, TensorRT and device takes no time. Timings of kernels
are kept beside the plans, so that a similar graph is built faster.

Driven end to end by tests with a simulation of TensorRT only: the library itself was not at hand.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from .cuda_device import Device, open_device
from .errors import FishrtError, GraphError, ProviderError
from .onnx_proto import parse_model
from .spec import GraphSpec
from .trt_api import Builder, BuilderConfig, TensorRT, checked, load_tensorrt, log_of
from .trt_lowering import LoweringOptions, lower_for_tensorrt
from .trt_plans import (
    ColumnWrites,
    Plan,
    PlanKey,
    Profile,
    external_files,
    graph_hash,
    keep_plan,
    kept_plan,
    machine_of,
    plan_folder,
    read_portable,
    weights_identity,
)

log = logging.getLogger(__name__)

Told = Callable[[str, float], None]
"""Is told what TensorRT does, and which part of it is done, 0 to 1."""

_LEAST_CAPABILITY = {"fp32": (7, 5), "fp16": (7, 5), "bf16": (8, 0)}
"""By the dtype that a plan computes in. TensorRT 11 knows no older devices than 7.5."""
_LEAST_WORKSPACE = 1 << 30
"""Bytes that the estimate takes for kernels where the user sets no limit."""
_FAILED_HINT = "fishrt build-trt --primitive-attention asks less of TensorRT; --debug shows all that it says"


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """One graph to be built."""

    path: Path
    """The file of the portable graph."""
    spec: GraphSpec
    lowering: LoweringOptions
    profiles: tuple[Profile, ...]
    workspace: int | None = None
    """Bytes that kernels may use, at most. None: all that the device has."""
    identity: str | None = None
    """A hash that stands for the file and its weights; None computes one."""
    build: Callable[[bytes], bytes] | None = None
    """Makes the graph from the file's bytes."""


def build_plan(request: PlanRequest, told: Told = lambda stage, part: None) -> tuple[Plan, bool]:
    """The plan of a graph for this machine, and whether it was built now: it may be kept already.

    Raises ProviderError for what is not here or what the device cannot compute in, GraphError with all that TensorRT says for a
    graph that it does not take, FishrtError where memory or disk do not suffice. An interrupt ends the build at its next step.
    """
    trt, device = load_tensorrt(), open_device()
    check_precision(request.lowering.precision, device)
    portable, folder = read_portable(request.path, request.build), request.path.parent
    weights = _weight_bytes(portable, folder)
    key = PlanKey(
        graph_hash(portable),
        request.identity or weights_identity(portable, folder),
        machine_of(trt.__version__, device),
        request.lowering,
        request.workspace,
        request.profiles,
    )
    if kept := kept_plan(key):
        return kept, False
    device.check_room(weights + (request.workspace or _LEAST_WORKSPACE), f"building {request.spec.file}")
    _check_disk(weights)
    told("lowering", 0.0)
    lowered, spec = lower_for_tensorrt(portable, request.spec, request.lowering, folder)
    serialized = _serialize(trt, lowered_model(lowered, request.profiles), spec, request, _TimingFile(key), told)
    return keep_plan(key, spec, column_writes(portable, request.spec), serialized), True


def check_precision(precision: str, device: Device) -> None:
    """Raises ProviderError where the device does not compute in this dtype."""
    needed, has = _LEAST_CAPABILITY[precision], device.compute_capability
    if has < needed:
        raise ProviderError(
            f"{precision} needs compute capability {needed[0]}.{needed[1]}; {device.name} has {has[0]}.{has[1]}",
            hint="use --precision fp16" if precision == "bf16" else "use provider cuda or cpu",
        )


def lowered_model(model: bytes, profiles: Iterable[Profile]) -> bytes:
    """The graph with a number in place of each dimension that has but one size in all profiles: TensorRT does best with those."""
    fixed = _fixed(profiles)
    parsed = parse_model(model, "the graph")
    for value in (*parsed.graph.input, *parsed.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in fixed:
                size = fixed[dim.dim_param]
                dim.ClearField("dim_param")
                dim.dim_value = size
    return bytes(parsed.SerializeToString())


def _fixed(profiles: Iterable[Profile]) -> dict[str, int]:
    """The dimensions that have but one size."""
    ranges: dict[str, set[int]] = {}
    for profile in profiles:
        for name, sizes in profile.dims.items():
            ranges.setdefault(name, set()).update(sizes)
    return {name: min(sizes) for name, sizes in ranges.items() if len(sizes) == 1}


def column_writes(model: bytes, spec: GraphSpec) -> ColumnWrites | None:
    """How a portable graph tells where in its caches it writes; None if it does not, or works it out by itself."""
    feeds = {t.name: t for t in spec.feeds}
    states = {t.name: t for t in spec.state_tensors}
    in_states = {d for t in spec.state_tensors for d in t.shape}
    for node in parse_model(model, "the graph").graph.node:
        if node.op_type == "TensorScatter" and node.input[0] in states and node.input[2] in feeds:
            (length,) = {d for t in spec.feeds for d in t.shape if isinstance(d, str) and d not in in_states}
            return ColumnWrites(node.input[2], length, node.input[0])
    return None


def _weight_bytes(model: bytes, folder: Path) -> int:
    """Of the files beside a graph."""
    try:
        return sum((folder / name).stat().st_size for name in external_files(model))
    except OSError as error:
        raise GraphError(f"weights are missing: {error.filename}", hint="copy or export the bundle again") from None


def _check_disk(need: int) -> None:
    """A plan is about as large as the weights; a build takes many minutes, which should not end with a full disk."""
    root = next(folder for folder in (plan_folder(), *plan_folder().parents) if folder.is_dir())
    free = shutil.disk_usage(root).free
    if need > free:
        raise FishrtError(
            f"the plan needs about {need / 1e9:.2f} GB of disk, and {free / 1e9:.2f} GB are free in {root}",
            hint="make room there, or set FISHRT_CACHE to another folder",
        )


def _serialize(trt: TensorRT, model: bytes, spec: GraphSpec, request: PlanRequest, timing: _TimingFile, told: Told) -> Any:
    """What TensorRT makes of a lowered graph: a buffer."""
    kept = log_of(trt)
    builder = checked(trt, "making a builder", lambda: trt.Builder(kept))
    network = checked(trt, "making a network", lambda: builder.create_network(0))
    told("parsing", 0.0)
    parser = checked(trt, "making a parser", lambda: trt.OnnxParser(network, kept))
    # It looks for weights beside the path. Nothing is written there: the lowered graph is in memory, and small.
    if not parser.parse(model, str(request.path)):
        raise _parse_error(trt, parser, request.spec.file)
    config = checked(trt, "making a configuration", builder.create_builder_config)
    if request.workspace is not None:
        pool, size = trt.MemoryPoolType.WORKSPACE, request.workspace
        checked(trt, "limiting the workspace", lambda: config.set_memory_pool_limit(pool, size) is not False)
    for profile in request.profiles:
        _add_profile(trt, builder, config, spec, profile, _fixed(request.profiles))
    timing.use(trt, config)
    monitor = _monitor(trt, told)
    config.progress_monitor = monitor
    serialized: Any = None
    try:
        serialized = checked(
            trt, f"building {request.spec.file}", lambda: builder.build_serialized_network(network, config), _FAILED_HINT
        )
    finally:
        if monitor.raised is not None:
            raise monitor.raised  # such as the user's interrupt, for which the build was ended
    timing.update(config)
    return serialized


def _add_profile(
    trt: TensorRT, builder: Builder, config: BuilderConfig, spec: GraphSpec, profile: Profile, fixed: Mapping[str, int]
) -> None:
    if missing := {d for t in spec.inputs for d in t.shape if isinstance(d, str)} - profile.dims.keys():
        raise ValueError(f"profile {profile.name} of {spec.file} does not give {', '.join(sorted(missing))}")
    shapes = checked(trt, f"making profile {profile.name}", builder.create_optimization_profile)
    sizes = [{name: sizes[n] for name, sizes in profile.dims.items()} for n in range(3)]
    for tensor in spec.inputs:
        if any(isinstance(d, str) and d not in fixed for d in tensor.shape):
            set_shape = partial(shapes.set_shape, tensor.name, *(tensor.resolve(dims) for dims in sizes))
            # It tells by raising; the setters of other objects, by False.
            checked(trt, f"setting {tensor.name} in profile {profile.name}", lambda f=set_shape: f() is not False)  # type: ignore[misc]
    checked(trt, f"adding profile {profile.name}", lambda: config.add_optimization_profile(shapes) >= 0)


def _parse_error(trt: TensorRT, parser: Any, name: str) -> GraphError:
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    found = [f"{error.node_operator()} {error.node_name()}: {error.desc()}" for error in errors]
    reasons = found or log_of(trt).take_errors() or ["it gave no reason"]
    return GraphError(
        f"TensorRT cannot import {name}: {'; '.join(reasons)}", hint="fishrt inspect --trt lists what it does not take"
    )


class _TimingFile:
    """Timings of kernels, kept for one TensorRT on one device."""

    def __init__(self, key: PlanKey) -> None:
        machine = key.machine
        words = (machine.tensorrt, machine.gpu, machine.compute_capability)
        self._path = plan_folder() / ("-".join(("timing", *words)).replace(" ", "_").replace("/", "_") + ".cache")

    def use(self, trt: TensorRT, config: BuilderConfig) -> None:
        """Gives the builder what is kept; nothing, if it is not taken."""
        blob = self._path.read_bytes() if self._path.is_file() else b""
        cache = config.create_timing_cache(blob)
        if cache is not None and config.set_timing_cache(cache, False):
            return
        log.warning("the timings in %s are of another TensorRT or device, or damaged; they are made anew", self._path)
        empty = checked(trt, "making a timing cache", lambda: config.create_timing_cache(b""))
        checked(trt, "setting a timing cache", lambda: config.set_timing_cache(empty, False))

    def update(self, config: BuilderConfig) -> None:
        """Keeps what the builder has measured. Nothing depends on it."""
        cache = config.get_timing_cache()
        if cache is None:
            return
        aside = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            aside.write_bytes(memoryview(cache.serialize()))
            aside.replace(self._path)
        except OSError as error:
            log.warning("the timings cannot be kept in %s: %s", self._path, error)
            aside.unlink(missing_ok=True)


def _monitor(trt: TensorRT, told: Told) -> Any:
    """What TensorRT reports its progress to, from several threads. Phases have a number of steps, and lie in each other."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]  # known only now
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.raised: BaseException | None = None
            """What `told` raised. It must not go through TensorRT, so the build is ended first."""
            self._lock = threading.Lock()
            self._running: dict[str, tuple[str | None, int, int]] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with self._lock:
                self._running[phase_name] = (parent_phase, num_steps, 0)
            self._tell(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            with self._lock:
                parent, steps, _ = self._running.get(phase_name, (None, 1, 0))
                self._running[phase_name] = (parent, steps, step + 1)
            self._tell(phase_name)
            return self.raised is None

        def phase_finish(self, phase_name: str) -> None:
            with self._lock:
                self._running.pop(phase_name, None)

        def _tell(self, phase: str) -> None:
            try:
                with self._lock:
                    part = self._part(next((name for name, (parent, _, _) in self._running.items() if parent is None), phase))
                told(phase, part)
            except BaseException as error:  # the user's interrupt is one
                self.raised = self.raised or error

        def _part(self, phase: str) -> float:
            _, steps, done = self._running.get(phase, (None, 1, 0))
            within = [self._part(name) for name, (parent, _, _) in self._running.items() if parent == phase]
            return min((done + max(within, default=0.0)) / max(steps, 1), 1.0)

    return Monitor()
