"""Building of plans: portable graph ─► lowering ─► TensorRT's importer ─► its builder ─► `trt.plans`.

Plans are kept: a second call with the same graph, options, TensorRT and device builds nothing. Timings of kernels are kept in the
same folder, so that a similar graph is built faster.

Tests run this file end to end with a simulation of TensorRT only.
"""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..aside import new_file
from ..engine import GraphSpec
from ..errors import FishrtError, GraphError, ProviderError
from ..trt.api import checked, load_tensorrt, log_of
from ..trt.device import Device, open_device
from ..trt.plans import (
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
from .onnx_proto import parse_model
from .tensorrt import LoweringOptions, lower_for_tensorrt

log = logging.getLogger(__name__)

Progress = Callable[[str, float], None]
"""Called with the name of a stage and the fraction of it that is done, 0 to 1."""

_LEAST_CAPABILITY = {"fp32": (7, 5), "fp16": (7, 5), "bf16": (8, 0)}
"""Lowest compute capability, by precision. TensorRT 11 supports no older devices than 7.5."""
_LEAST_WORKSPACE = 1 << 30
"""Estimated bytes for kernels if the user sets no limit."""
_FAILED_HINT = "fishrt build-trt --primitive-attention asks less of TensorRT; --debug shows all that it says"


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """The graph and the options of one build."""

    path: Path
    """The file of the portable graph."""
    spec: GraphSpec
    lowering: LoweringOptions
    profiles: tuple[Profile, ...]
    workspace: int | None = None
    """Largest workspace of kernels in bytes; None: all the device's memory."""
    identity: str | None = None
    """A hash of the file and its weights; None: compute it."""
    build: Callable[[bytes], bytes] | None = None
    """Makes the graph from the file's bytes."""


def build_plan(request: PlanRequest, progress: Progress = lambda stage, part: None) -> tuple[Plan, bool]:
    """Build the plan of a graph for this machine, unless it is kept already. Return the plan, and whether it was built now.

    Raises ProviderError if TensorRT or the device is missing or lacks the precision, GraphError with all of TensorRT's messages
    for a graph that it rejects, FishrtError if memory or disk do not suffice. An interrupt ends the build at its next step.
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
    progress("lowering", 0.0)
    lowered, spec = lower_for_tensorrt(portable, request.spec, request.lowering, folder)
    serialized = _serialize(trt, lowered_model(lowered, request.profiles), spec, request, _TimingFile(key), progress)
    return keep_plan(key, spec, column_writes(portable, request.spec), serialized), True


def check_precision(precision: str, device: Device) -> None:
    """Check that the device computes in this precision. Raises ProviderError otherwise."""
    needed, has = _LEAST_CAPABILITY[precision], device.compute_capability
    if has < needed:
        raise ProviderError(
            f"{precision} needs compute capability {needed[0]}.{needed[1]}; {device.name} has {has[0]}.{has[1]}",
            hint="use --precision fp16" if precision == "bf16" else "use provider cuda or cpu",
        )


def lowered_model(model: bytes, profiles: Iterable[Profile]) -> bytes:
    """Return the graph with fixed sizes for dimensions of one size in all profiles, with which TensorRT is fastest."""
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
    """Return the dimensions with one size in all profiles."""
    ranges: dict[str, set[int]] = {}
    for profile in profiles:
        for name, sizes in profile.dims.items():
            ranges.setdefault(name, set()).update(sizes)
    return {name: min(sizes) for name, sizes in ranges.items() if len(sizes) == 1}


def column_writes(model: bytes, spec: GraphSpec) -> ColumnWrites | None:
    """Return the inputs that place a portable graph's writes to its caches; None if no input places them."""
    feeds = {t.name: t for t in spec.feeds}
    states = {t.name: t for t in spec.state_tensors}
    in_states = {d for t in spec.state_tensors for d in t.shape}
    for node in parse_model(model, "the graph").graph.node:
        if node.op_type == "TensorScatter" and node.input[0] in states and node.input[2] in feeds:
            (length,) = {d for t in spec.feeds for d in t.shape if isinstance(d, str) and d not in in_states}
            return ColumnWrites(node.input[2], length, node.input[0])
    return None


def _weight_bytes(model: bytes, folder: Path) -> int:
    """Return the bytes of a graph's files of weights."""
    try:
        return sum((folder / name).stat().st_size for name in external_files(model))
    except OSError as error:
        raise GraphError(f"weights are missing: {error.filename}", hint="copy or export the bundle again") from None


def _check_disk(need: int) -> None:
    """Check that there is room for a plan before a build of many minutes. Raises FishrtError otherwise."""
    root = next(folder for folder in (plan_folder(), *plan_folder().parents) if folder.is_dir())
    free = shutil.disk_usage(root).free
    if need > free:
        raise FishrtError(
            f"the plan needs about {need / 1e9:.2f} GB of disk, and {free / 1e9:.2f} GB are free in {root}",
            hint="make room there, or set FISHRT_CACHE to another folder",
        )


def _serialize(trt: Any, model: bytes, spec: GraphSpec, request: PlanRequest, timing: _TimingFile, progress: Progress) -> Any:
    """Return a lowered graph as TensorRT's serialised plan, a buffer."""
    kept = log_of(trt)
    builder = checked(trt, "making a builder", lambda: trt.Builder(kept))
    network = checked(trt, "making a network", lambda: builder.create_network(0))
    progress("parsing", 0.0)
    parser = checked(trt, "making a parser", lambda: trt.OnnxParser(network, kept))
    # The path only locates the weights: the lowered graph is in memory and small.
    if not parser.parse(model, str(request.path)):
        raise _parse_error(trt, parser, request.spec.file)
    config = checked(trt, "making a configuration", builder.create_builder_config)
    if request.workspace is not None:
        pool, size = trt.MemoryPoolType.WORKSPACE, request.workspace
        checked(trt, "limiting the workspace", lambda: config.set_memory_pool_limit(pool, size) is not False)
    for profile in request.profiles:
        _add_profile(trt, builder, config, spec, profile, _fixed(request.profiles))
    timing.use(trt, config)
    monitor = _monitor(trt, progress)
    config.progress_monitor = monitor
    serialized: Any = None
    try:
        serialized = checked(
            trt, f"building {request.spec.file}", lambda: builder.build_serialized_network(network, config), _FAILED_HINT
        )
    finally:
        if monitor.raised is not None:
            raise monitor.raised  # such as the user's interrupt
    timing.update(config)
    return serialized


def _add_profile(trt: Any, builder: Any, config: Any, spec: GraphSpec, profile: Profile, fixed: Mapping[str, int]) -> None:
    if missing := {d for t in spec.inputs for d in t.shape if isinstance(d, str)} - profile.dims.keys():
        raise ValueError(f"profile {profile.name} of {spec.file} does not give {', '.join(sorted(missing))}")
    shapes = checked(trt, f"making profile {profile.name}", builder.create_optimization_profile)
    sizes = [{name: sizes[n] for name, sizes in profile.dims.items()} for n in range(3)]
    for tensor in spec.inputs:
        if any(isinstance(d, str) and d not in fixed for d in tensor.shape):
            set_shape = partial(shapes.set_shape, tensor.name, *(tensor.resolve(dims) for dims in sizes))
            # It fails by raising; the setters of other objects return False.
            checked(trt, f"setting {tensor.name} in profile {profile.name}", lambda f=set_shape: f() is not False)  # type: ignore[misc]
    checked(trt, f"adding profile {profile.name}", lambda: config.add_optimization_profile(shapes) >= 0)


def _parse_error(trt: Any, parser: Any, name: str) -> GraphError:
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    found = [f"{error.node_operator()} {error.node_name()}: {error.desc()}" for error in errors]
    reasons = found or log_of(trt).take_errors() or ["it gave no reason"]
    return GraphError(
        f"TensorRT cannot import {name}: {'; '.join(reasons)}", hint="`fishrt inspect --trt` lists unsupported nodes"
    )


class _TimingFile:
    """The file of kernel timings of one TensorRT on one device."""

    def __init__(self, key: PlanKey) -> None:
        machine = key.machine
        words = (machine.tensorrt, machine.gpu, machine.compute_capability)
        self._path = plan_folder() / ("-".join(("timing", *words)).replace(" ", "_").replace("/", "_") + ".cache")

    def use(self, trt: Any, config: Any) -> None:
        """Give the builder the kept timings, or empty ones if it rejects them."""
        blob = self._path.read_bytes() if self._path.is_file() else b""
        cache = config.create_timing_cache(blob)
        if cache is not None and config.set_timing_cache(cache, False):
            return
        log.warning("the timings in %s are from another TensorRT or device, or damaged; they are measured again", self._path)
        empty = checked(trt, "making a timing cache", lambda: config.create_timing_cache(b""))
        checked(trt, "setting a timing cache", lambda: config.set_timing_cache(empty, False))

    def update(self, config: Any) -> None:
        """Write the builder's timings to the file. A failure is only a warning."""
        cache = config.get_timing_cache()
        if cache is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with new_file(self._path) as aside:
                aside.write_bytes(memoryview(cache.serialize()))
        except OSError as error:
            log.warning("the timings cannot be written to %s: %s", self._path, error)


def _monitor(trt: Any, progress: Progress) -> Any:
    """Return a progress monitor that TensorRT calls from several threads. A phase has a number of steps, and nested phases."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # known only at run time
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.raised: BaseException | None = None
            """The exception of `progress`. It must not pass through TensorRT, so the build is ended first."""
            self._lock = threading.Lock()
            self._running: dict[str, tuple[str | None, int, int]] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with self._lock:
                self._running[phase_name] = (parent_phase, num_steps, 0)
            self._report(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            with self._lock:
                parent, steps, _ = self._running.get(phase_name, (None, 1, 0))
                self._running[phase_name] = (parent, steps, step + 1)
            self._report(phase_name)
            return self.raised is None

        def phase_finish(self, phase_name: str) -> None:
            with self._lock:
                self._running.pop(phase_name, None)

        def _report(self, phase: str) -> None:
            try:
                with self._lock:
                    part = self._part(next((name for name, (parent, _, _) in self._running.items() if parent is None), phase))
                progress(phase, part)
            except BaseException as error:  # also the user's interrupt
                self.raised = self.raised or error

        def _part(self, phase: str) -> float:
            _, steps, done = self._running.get(phase, (None, 1, 0))
            within = [self._part(name) for name, (parent, _, _) in self._running.items() if parent == phase]
            return min((done + max(within, default=0.0)) / max(steps, 1), 1.0)

    return Monitor()
