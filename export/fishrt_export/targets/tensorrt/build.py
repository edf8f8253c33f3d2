"""The TensorRT plans of a bundle: which graphs in which precision for which sizes, and their building.

    slow AR        two profiles, for prompts and for single steps; caches of a fixed number of rows
    frame graph    replaces the fast AR
    codec          in float32; the pieces that streams are decoded in, and recordings as long as a prompt may be

    portable graph ─► lowering ─► TensorRT's importer ─► its builder ─► `fishrt_engines.trt.plans`

Plans are kept: a second call with the same graph, options, TensorRT and device builds nothing. Timings of kernels are kept in the
same folder, so that a similar graph is built faster. Tests run this file end to end with a fake of TensorRT only.
"""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir

from fishrt.bundle.features import LanguageModel
from fishrt.bundle.folder import Bundle
from fishrt.bundle.graphs import with_positions
from fishrt.bundle.manifest import Manifest
from fishrt.codec import chunk_frames
from fishrt.progress import Progress
from fishrt_engines import FishrtError, GraphError, ProviderError
from fishrt_engines.aside import new_file
from fishrt_engines.engine import GraphSpec
from fishrt_engines.trt.api import checked, load_tensorrt, log_of
from fishrt_engines.trt.device import Device, open_device
from fishrt_engines.trt.plans import (
    ColumnWrites,
    LoweringOptions,
    Plan,
    PlanKey,
    PlanRequest,
    Profile,
    keep_plan,
    kept_plan,
    machine_of,
    plan_folder,
)

from ..edit import load
from .lowering import FORMS, fix_sizes, lower_for_tensorrt

log = logging.getLogger(__name__)

_LEAST_CAPABILITY = {"fp32": (7, 5), "fp16": (7, 5), "bf16": (8, 0)}
"""Lowest compute capability, by precision. TensorRT 11 supports no older devices than 7.5."""
_FAILED = "--debug shows all that TensorRT says"
_LEAST_WORKSPACE = 1 << 30
"""Estimated bytes for kernels if the user sets no limit."""
USUAL_LEN = 4096
"""Default positions of prompt and speech together: three minutes. A step reads all of them, used or not."""
_USUAL_PROMPT = 256
_USUAL_RECORDING_S = 10
_BF16_CAPABILITY = (8, 0)


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """Options of a user for the plans of a bundle."""

    precision: str | None = None
    """bf16, fp16, fp8, int8 or int4. None: fp16 for weights in integers, else bf16 if the device has it, else fp16."""
    max_lens: tuple[int, ...] = ()
    """Positions of prompt and speech together, for each plan of the slow AR. None given: the model's, at most USUAL_LEN."""
    max_batch: int = 1
    """Most sequences at once."""
    workspace: int | None = None
    """Most bytes of device memory for kernels; None: no limit."""
    fp32_attention: bool | None = None
    """Whether attention is computed in float32. None: only if the rest is in float16."""
    primitive_attention: bool = False
    """Whether attention is built from simple operators at once, without trying the other forms."""


def plan_requests(bundle: Bundle, options: PlanOptions, capability: tuple[int, int]) -> list[tuple[str, PlanRequest]]:
    """Return the plans to build, each with its role. capability: the device's compute capability.

    The slow AR's plans come first, the longest last: see `trt.engine`. Raises ProviderError for a precision that the bundle or
    fishrt does not have; FishrtError for more positions than the model's.
    """
    manifest = bundle.manifest
    graphs, lm, precision = manifest.specs, manifest.language_model, _computed_in(manifest, options.precision, capability)
    limited = [with_positions(lm, length) for length in _lengths(lm, options.max_lens)]
    wide = options.fp32_attention if options.fp32_attention is not None else precision == "fp16"
    language = LoweringOptions(None, precision, wide, options.primitive_attention)
    sound = LoweringOptions(None, "fp32", False, options.primitive_attention)
    batch, longest = (1, 1, options.max_batch), max(limited[-1].max_prompt, 2)
    frame = manifest.graphs["fast_ar"].form("tensorrt", ())
    if frame is None:
        raise ProviderError(
            f"{manifest.name} has no frame graph, which TensorRT runs in place of the fast AR",
            hint="export the checkpoint with `fishrt export --target tensorrt`",
        )

    def request(spec: GraphSpec, lowering: LoweringOptions, *profiles: Profile) -> PlanRequest:
        return PlanRequest(bundle.file(spec.file), spec, lowering, profiles, options.workspace)

    def slow(lm: LanguageModel) -> PlanRequest:
        most = max(lm.max_prompt, 2)
        prefill = Profile("prefill", {"batch": batch, "length": (2, min(_USUAL_PROMPT, most), most)})
        step = Profile("step", {"batch": batch, "length": (1, 1, 1)})
        return request(graphs["slow_ar"], replace(language, max_len=lm.max_seq_len), prefill, step)

    return [
        *(("slow_ar", slow(lm)) for lm in limited),
        ("fast_ar", request(frame.spec, language, Profile("frame", {"batch": batch}))),
        ("codec_decode", request(graphs["codec_decode"], sound, _decoding(manifest))),
        ("codec_encode", request(graphs["codec_encode"], sound, _encoding(manifest, longest))),
    ]


def _lengths(lm: LanguageModel, asked: tuple[int, ...]) -> list[int]:
    if beyond := [length for length in asked if not 4 <= length <= lm.max_seq_len]:
        raise FishrtError(
            f"the length is {beyond[0]}; the model takes up to {lm.max_seq_len} positions",
            hint=f"--max-len 4 to {lm.max_seq_len}",
        )
    return sorted(set(asked or [min(lm.max_seq_len, USUAL_LEN)]))


def _computed_in(manifest: Manifest, asked: str | None, capability: tuple[int, int]) -> str:
    """Return the precision of the language model's plans, fp16 or bf16. Raises ProviderError; see `plan_requests`."""
    stored = manifest.graphs["slow_ar"].precision.removesuffix("-rows")
    if asked == "fp8":
        raise ProviderError(
            "fp8 needs scales for the activations of every layer, found by running the model on much speech; bundles have none",
            hint="use --precision bf16, or export the bundle with --precision int8 or int4 for smaller weights",
        )
    if asked in ("int8", "int4") and stored != asked:
        raise ProviderError(
            f"{asked} needs weights in {asked}, and those of this bundle's slow AR are in {stored}",
            hint=f"export the checkpoint with --precision {asked}, then build that bundle",
        )
    if asked in ("fp16", "bf16"):
        return asked
    # Scales of integers lose less in float16.
    return "fp16" if stored in ("int8", "int4") or capability < _BF16_CAPABILITY else "bf16"


def _decoding(manifest: Manifest) -> Profile:
    codec, spec = manifest.codec, manifest.specs["codec_decode"]
    _, most = chunk_frames(spec, codec)
    again = 0 if spec.states or codec.context is None else codec.context.left + codec.context.ahead
    return Profile("decode", {"batch": (1, 1, 1), "frames": (1, most, most + again)})


def _encoding(manifest: Manifest, longest: int) -> Profile:
    """Return the codec encoder's profile. longest: columns of the longest prompt, which a voice must fit into."""
    codec = manifest.codec
    least, usual, most = (
        -(-samples // codec.sample_multiple) * codec.sample_multiple
        for samples in (
            codec.min_samples,
            _USUAL_RECORDING_S * codec.sample_rate,
            min(codec.max_frames, longest) * codec.hop,
        )
    )
    return Profile("encode", {"batch": (1, 1, 1), "samples": (least, min(usual, most), most)})


def build_plan(request: PlanRequest, progress: Progress = lambda stage, part: None) -> tuple[Plan, bool]:
    """Build the plan of a graph for this machine, unless it is kept already. Return the plan, and whether it was built now.

    Unless the request says primitive attention, the forms of attention are tried in the order of FORMS. Raises ProviderError if
    TensorRT or the device is missing or lacks the precision, GraphError with all of TensorRT's messages for a graph that it
    rejects, FishrtError if memory or disk do not suffice. An interrupt ends the build at its next step.
    """
    trt, device = load_tensorrt(), open_device()
    check_precision(request.lowering.precision, device)
    machine = machine_of(trt.__version__, device)
    key = PlanKey(request.spec.identity, machine, request.lowering, request.workspace, request.profiles)
    if kept := kept_plan(key):
        return kept, False
    model = load(request.path)
    writes, forms = column_writes(model, request.spec), FORMS[-1:] if request.lowering.primitive_attention else FORMS
    if all(node.op_type != "Attention" for node in model.graph):
        forms = FORMS[:1]
    weights = sum(v.const_value.nbytes for v in model.graph.initializers.values() if isinstance(v.const_value, ir.ExternalTensor))
    device.check_room(weights + (request.workspace or _LEAST_WORKSPACE), f"building {request.spec.file}")
    _check_disk(weights)
    first: GraphError | None = None
    for attention in forms:
        progress("lowering", 0.0)
        model = load(request.path)
        spec = lower_for_tensorrt(model, request.spec, request.lowering, attention)
        fix_sizes(model.graph, _fixed(request.profiles))  # TensorRT is fastest with them
        try:
            serialized = _serialize(trt, ir.to_proto(model).SerializeToString(), spec, request, progress)
        except GraphError as error:
            first = first or error
            log.info("%s cannot be built with %s attention: %s", request.spec.file, attention, error)
            continue
        return keep_plan(key, spec, writes, attention, serialized), True
    assert first is not None
    raise first


def check_precision(precision: str, device: Device) -> None:
    """Check that the device computes in this precision. Raises ProviderError otherwise."""
    needed, has = _LEAST_CAPABILITY[precision], device.compute_capability
    if has < needed:
        raise ProviderError(
            f"{precision} needs compute capability {needed[0]}.{needed[1]}; {device.name} has {has[0]}.{has[1]}",
            hint="use --precision fp16" if precision == "bf16" else "use provider cuda or cpu",
        )


def _fixed(profiles: Iterable[Profile]) -> dict[str, int]:
    """Return the dimensions with one size in all profiles."""
    ranges: dict[str, set[int]] = {}
    for profile in profiles:
        for name, sizes in profile.dims.items():
            ranges.setdefault(name, set()).update(sizes)
    return {name: min(sizes) for name, sizes in ranges.items() if len(sizes) == 1}


def column_writes(model: ir.Model, spec: GraphSpec) -> ColumnWrites | None:
    """Return the inputs that place a portable graph's writes to its caches; None if no input places them."""
    feeds, states = ({t.name for t in tensors} for tensors in (spec.feeds, spec.state_tensors))
    in_states = {d for t in spec.state_tensors for d in t.shape}
    for node in model.graph:
        names = [value.name if value is not None else "" for value in node.inputs]
        if node.op_type == "TensorScatter" and names[0] in states and names[2] in feeds:
            (length,) = {d for t in spec.feeds for d in t.shape if isinstance(d, str) and d not in in_states}
            return ColumnWrites(str(names[2]), length, str(names[0]))
    return None


def _check_disk(need: int) -> None:
    """Check that there is room for a plan before a build of many minutes. Raises FishrtError otherwise."""
    root = next(folder for folder in (plan_folder(), *plan_folder().parents) if folder.is_dir())
    free = shutil.disk_usage(root).free
    if need > free:
        raise FishrtError(
            f"the plan needs about {need / 1e9:.2f} GB of disk, and {free / 1e9:.2f} GB are free in {root}",
            hint="make room there, or set FISHRT_CACHE to another folder",
        )


def _serialize(trt: Any, model: bytes, spec: GraphSpec, request: PlanRequest, progress: Progress) -> Any:
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
    timings = _use_timings(trt, config)
    monitor = _monitor(trt, progress)
    config.progress_monitor = monitor
    serialized: Any = None
    try:
        serialized = checked(
            trt, f"building {request.spec.file}", lambda: builder.build_serialized_network(network, config), _FAILED
        )
    finally:
        if monitor.raised is not None:
            raise monitor.raised  # such as the user's interrupt
    _keep_timings(config, timings)
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


def _use_timings(trt: Any, config: Any) -> Path:
    """Give the builder the timings of this TensorRT on this device, or empty ones if it rejects them. Return their file."""
    device = open_device()
    major, minor = device.compute_capability
    words = f"timing-{trt.__version__}-{device.name}-{major}.{minor}.cache"
    file = plan_folder() / words.replace(" ", "_").replace("/", "_")
    cache = config.create_timing_cache(file.read_bytes() if file.is_file() else b"")
    if cache is None or not config.set_timing_cache(cache, False):
        log.warning("the timings in %s are from another TensorRT or device, or damaged; they are measured again", file)
        empty = checked(trt, "making a timing cache", lambda: config.create_timing_cache(b""))
        checked(trt, "setting a timing cache", lambda: config.set_timing_cache(empty, False))
    return file


def _keep_timings(config: Any, file: Path) -> None:
    """Write the builder's timings. A failure is only a warning."""
    cache = config.get_timing_cache()
    if cache is None:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with new_file(file) as aside:
            aside.write_bytes(memoryview(cache.serialize()))
    except OSError as error:
        log.warning("the timings cannot be written to %s: %s", file, error)


def _monitor(trt: Any, progress: Progress) -> Any:
    """Return a progress monitor that TensorRT calls from several threads. A phase has a number of steps, and nested phases."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # known only at run time
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.raised: BaseException | None = None
            """The exception of `progress`. It must not pass through TensorRT, so the build is ended first."""
            self._lock = threading.Lock()
            self._running: dict[str, tuple[str | None, int, int]] = {}
            """Phases: the phase around each, its number of steps, and of finished ones."""

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._report(phase_name, parent_phase, num_steps, 0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            parent, steps, _ = self._running.get(phase_name, (None, 1, 0))
            self._report(phase_name, parent, steps, step + 1)
            return self.raised is None

        def phase_finish(self, phase_name: str) -> None:
            with self._lock:
                self._running.pop(phase_name, None)

        def _report(self, phase: str, parent: str | None, steps: int, done: int) -> None:
            try:
                with self._lock:
                    self._running[phase] = parent, steps, done
                    part = self._part(next((name for name, (outer, _, _) in self._running.items() if outer is None), phase))
                progress(phase, part)
            except BaseException as error:  # also the user's interrupt
                self.raised = self.raised or error

        def _part(self, phase: str) -> float:
            _, steps, done = self._running.get(phase, (None, 1, 0))
            within = [self._part(name) for name, (parent, _, _) in self._running.items() if parent == phase]
            return min((done + max(within, default=0.0)) / max(steps, 1), 1.0)

    return Monitor()
