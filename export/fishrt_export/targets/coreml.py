"""`fishrt export --static coreml`: more graphs of codec_decode for calls of fixed lengths, with the portable graph's weights.

Each is compared with the portable graph in ONNX Runtime on the CPU. ONNX Runtime's usability checker estimates from the names of
operators how many nodes CoreML would run, also for a step of the language model, whose graph is not kept since the CPU runs it.
These graphs have not been run on a Mac.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from fishrt.bundle.manifest import FixedPart, Form, Parity, Usability
from fishrt_engines import open_engine
from fishrt_engines.engine import GraphSpec, StatePair, TensorSpec
from fishrt_engines.ort.coreml import CACHE_KEY, Part

from ..errors import ExportError
from ..graph.verify import Case, Feeds, Report
from .primitives import split_front, to_primitives

TARGETS = ("coreml",)
LENGTHS = (1, 4, 16)
"""Frames of a call. Streams decode 4 to 16 at a time, and calls of these lengths add up to any number. There are few, since each
graph in use holds all weights in memory once more."""
_CALLS = 8
"""Successive calls that verify a graph."""
_STEP_CACHE = 1024
"""Rows of the slow AR's cache in the step of which nodes are counted."""


def check_target(target: str | None, decode: GraphSpec) -> None:
    """Check the target. Raises ExportError if it is unknown, or if the codec cannot be decoded in calls of fixed length."""
    if target is None:
        return
    if target not in TARGETS:
        raise ExportError(f"unknown target {target!r} of static graphs", hint=f"choose one of: {', '.join(TARGETS)}")
    if not decode.states:
        raise ExportError(
            "this codec is centred: its last frames depend on the length of the call, so that no length can be fixed",
            hint="leave --static out; provider cpu speaks with this checkpoint",
        )


def static_form(
    folder: Path,
    portable: GraphSpec,
    case: Case,
    tolerance: float,
    fingerprint: str,
    progress: Callable[[float], None] = lambda _: None,
) -> Form:
    """Write the graphs of fixed sizes for codec_decode into a bundle's folder, and return the form.

    portable: the spec of codec_decode. case: one row of codes, in any calls. fingerprint: the codec's, for the cache key.
    progress receives the completed part, 0..1. Raises ExportError for a graph that differs from the portable one.
    """
    made = []
    for n, frames in enumerate(LENGTHS):
        progress(n / len(LENGTHS))
        made.append(_part(folder, portable, frames, case, tolerance, fingerprint))
    return Form(TARGETS[0], portable, parts=tuple(made))


def _part(folder: Path, portable: GraphSpec, frames: int, case: Case, tolerance: float, fingerprint: str) -> FixedPart:
    front, back = _split(folder / portable.file, {"batch": 1, "frames": frames})
    name = Path(portable.file).stem
    front_spec = _spec(front, f"{name}_{frames}_front.onnx", ())
    back_spec = _spec(back, f"{name}_{frames}.onnx", portable.states)
    identity = hashlib.sha256(ir.to_proto(back).SerializeToString() + fingerprint.encode())
    back.metadata_props[CACHE_KEY] = identity.hexdigest()[:32]
    for model, spec in ((front, front_spec), (back, back_spec)):
        ir.save(model, folder / spec.file)
    made = FixedPart(frames, front_spec, back_spec, usability(back), Parity(0.0, tolerance, "cpu"))
    return replace(made, parity=_parity(folder, portable, made, case))


def step_usability(folder: Path, spec: GraphSpec) -> Usability:
    """Return the checker's result for a call of one column of a language model's graph, without the part that takes integers."""
    sizes = {"batch": 1, "length": 1, "cache": _STEP_CACHE}
    _, back = _split(folder / spec.file, sizes)
    return usability(back)


def _split(path: Path, sizes: Mapping[str, int]) -> tuple[ir.Model, ir.Model]:
    model = ir.load(path)
    to_primitives(model, sizes)
    return split_front(model)


def _spec(model: ir.Model, file: str, states: tuple[StatePair, ...]) -> GraphSpec:
    inputs, outputs = (
        tuple(TensorSpec(str(v.name), v.dtype.numpy().name, tuple(v.shape.numpy())) for v in values)  # type: ignore[union-attr]
        for values in (model.graph.inputs, model.graph.outputs)
    )
    return GraphSpec(file, inputs, outputs, states)


def _parity(folder: Path, portable: GraphSpec, static: FixedPart, case: Case) -> Parity:
    """Compare calls of the static graph's length with the portable graph. Raises ExportError if they differ."""
    whole = open_engine(folder / portable.file, portable, provider="cpu")
    front, back = (open_engine(folder / spec.file, spec, provider="cpu") for spec in (static.front, static.back))
    part, state, static_state = Part(front, back), whole.new_state(batch=1), back.new_state()
    report = Report(static.back.file, static.parity.tolerance)
    for feeds in _calls(case, static.frames):
        expected, actual = whole.run(feeds, state), part.run(feeds, static_state)
        for tensor in portable.results:
            report.values(tensor.name, expected[tensor.name], actual[tensor.name])
    for tensor in portable.state_tensors:
        report.values(tensor.name, state.read(tensor.name), static_state.read(tensor.name))
    return report.parity()


def _calls(case: Case, frames: int) -> Iterator[Feeds]:
    """Yield the feeds of a case in calls of `frames` frames, at most _CALLS."""
    whole = {name: np.concatenate([call[name] for call in case.calls], axis=-1) for name in case.calls[0]}
    count = min(whole["codes"].shape[-1] // frames, _CALLS)
    for start in range(0, count * frames, frames):
        yield {name: np.ascontiguousarray(array[..., start : start + frames]) for name, array in whole.items()}


def usability(model: ir.Model) -> Usability:
    """Return the verdict of ONNX Runtime's usability checker on a graph of fixed sizes.

    Nodes whose inputs are all weights are not counted: they are computed when the graph is loaded.
    """
    from onnxruntime.tools.mobile_helpers.usability_checker import check_coreml_partitions

    graph = ir.from_proto(ir.to_proto(model)).graph
    for node in list(graph):
        if all(value is None or value.is_initializer() for value in node.inputs):
            _make_constant(graph, node)
    counted = ir.Model(graph, ir_version=model.ir_version)
    found = check_coreml_partitions(ir.to_proto(counted), True, "coreml_supported_mlprogram_ops.md")
    return Usability(
        partitions=found.num_partitions,
        covered=found.num_supported_nodes,
        nodes=found.num_nodes,
        verdict=found.suitability().name,
        outside=tuple(sorted(found.unsupported_ops)),
    )


def _make_constant(graph: ir.Graph, node: ir.Node) -> None:
    """Replace a node by an initialiser of the same shape, whose values are not read."""
    (made,) = node.outputs
    assert made.dtype is not None
    assert made.shape is not None
    name = f"{made.name}.made"
    absent = ir.ExternalTensor("none", 0, 0, made.dtype, shape=made.shape, name=name)
    weight = ir.Value(name=name, type=ir.TensorType(made.dtype), shape=made.shape, const_value=absent)
    graph.register_initializer(weight)
    ir.convenience.replace_all_uses_with(made, weight)
    graph.remove(node, safe=True)
