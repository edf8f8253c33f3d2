"""Verification of a large model's graph in stretches of a few blocks, of which only one is in memory.

The graph is cut at the inputs of blocks, the residual stream. Each stretch is a graph of its own that refers to the same file of
weights. It runs all calls of all cases before the next stretch is opened. The graph's stretches run on the graph's stream and the
module's on the module's, so that the last results are those of the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from torch import Tensor, nn

from fishrt.bundle.manifest import Parity
from fishrt.progress import PartDone
from fishrt_engines import Array, open_engine
from fishrt_engines.engine import GraphSpec, TensorSpec

from ..models.stack import Stack
from .report import PROVIDER, Case, Expected, Report, run
from .verify import expect, run_module

FUSED_NORM = "SkipSimplifiedLayerNormalization"
"""ONNX Runtime's operator for a residual sum and the norm of it."""
BUDGET = 1 << 30
"""Bytes of float32 weights in one stretch, unless a single part of the model is larger."""


def split(stack: Stack, budget: int) -> list[range]:
    """Return stretches of at most `budget` bytes as ranges of parts.

    Part 0 makes the stream, part i + 1 is block i, and the last part also makes the results.
    """
    parts = len(stack.layers) + 1
    stretches, start = [], 0
    for part in range(1, parts):
        if stretch_bytes(stack, range(start, part + 1)) > budget:
            stretches.append(range(start, part))
            start = part
    return [*stretches, range(start, parts)]


def stretch_bytes(stack: Stack, parts: range) -> int:
    """Return the bytes of a stretch's weights in float32."""
    sizes = stack.state_dict()
    return sum(4 * sizes[name].numel() for name in _names(stack, parts))


def verify_stack(
    build: Callable[[], Stack],
    specs: Sequence[GraphSpec],
    folder: Path,
    weights: Mapping[str, Tensor],
    cases: Sequence[Case],
    tolerance: float,
    *,
    budget: int = BUDGET,
    progress: PartDone = lambda _: None,
) -> list[Parity]:
    """Verify graphs as verify.verify does, with the weights looked up for each stretch. The first of `specs` is portable.

    build: makes the module with arbitrary weights. progress receives the completed part, 0..1. Raises ExportError.
    """
    reports = [Report(spec, tolerance) for spec in specs]
    of_module, of_graphs = list(cases), [list(cases) for _ in specs]
    stretches = split(build(), budget)
    for parts in stretches:
        progress(parts.start / stretches[-1].stop)
        stack = _loaded(build, weights, parts)
        expected: list[Expected] = []
        for spec, report, of_graph in zip(specs, reports, of_graphs, strict=True):
            path, inner, stretch = folder / spec.file, spec, folder / f"{Path(spec.file).stem}.stretch.onnx"
            try:
                if len(stretches) > 1:  # otherwise the file itself is run
                    path, inner = stretch, _cut(path, stretch, spec, stack, parts)
                if not expected:  # the inputs and outputs of this stretch are those of all graphs
                    # The module takes all feeds: a graph may read the size of a dimension from another one than the module does.
                    wide = replace(inner, inputs=(*inner.inputs, *(t for t in spec.feeds if t not in inner.inputs)))
                    module = _Stretch(stack, parts, wide)
                    expected = [expect(module, wide, _fed(case, wide)) for case in of_module]
                    of_module = [_with(case, found.results) for case, found in zip(of_module, expected, strict=True)]
                engine = open_engine(path, inner, provider=PROVIDER)
                for n, case in enumerate(of_graph):
                    if spec.columns is None or cases[n].is_consecutive:
                        found = run(engine, _fed(case, inner))
                        report.add(expected[n], found)
                        of_graph[n] = _with(case, found.results)
                del engine
            finally:
                stretch.unlink(missing_ok=True)
        del stack
    return [report.parity() for report in reports]


def run_in_stretches(
    build: Callable[[], Stack], spec: GraphSpec, weights: Mapping[str, Tensor], feeds: Mapping[str, Array]
) -> dict[str, Array]:
    """Return the results of a module without state, with the interface of an engine and the weights of one stretch at a time."""
    stack, given = build(), dict(feeds)
    stream = TensorSpec("stream", "float32", (*stack.STREAM, stack.width))
    for parts in split(stack, BUDGET):
        stack = _loaded(build, weights, parts)
        inner = replace(
            spec,
            inputs=spec.inputs if 0 in parts else (stream, *spec.inputs),
            outputs=spec.outputs if _is_last(stack, parts) else (stream,),
        )
        results, _ = run_module(_Stretch(stack, parts, inner), inner, given)
        given |= results
    return results


def _loaded(build: Callable[[], Stack], weights: Mapping[str, Tensor], parts: range) -> Stack:
    """Return the module with the weights of some parts, float32; the others are arbitrary."""
    stack = build()
    stack.load_state_dict({name: weights[name].float() for name in _names(stack, parts)}, strict=False, assign=True)
    return stack.requires_grad_(False)


class _Stretch(nn.Module):
    """Some parts of a stack as a module with the inputs and outputs of `spec`."""

    def __init__(self, stack: Stack, parts: range, spec: GraphSpec) -> None:
        super().__init__()
        self.stack, self.parts, self.spec = stack, parts, spec

    def forward(self, *arguments: Any) -> tuple[Tensor, ...]:
        stack, parts = self.stack, self.parts
        feeds = {tensor.name: value for tensor, value in zip(self.spec.feeds, arguments, strict=False)}
        x = stack.enter(*(feeds[name] for name in stack.ENTERS)) if 0 in parts else feeds[self.spec.inputs[0].name]
        updated: list[Tensor] = []
        if layers := _layers(parts):
            span = slice(layers.start, layers.stop)
            shared = {name: feeds[name] for name in stack.SHARED if name in feeds}
            x, updated = stack.run_layers(x, caches=arguments[-1] if self.spec.states else (), layers=span, **shared)
        results = stack.leave(x, *(feeds[name] for name in stack.LEAVES)) if _is_last(stack, parts) else (x,)
        return *results, *updated


def _layers(parts: range) -> range:
    return range(max(parts.start - 1, 0), parts.stop - 1)


def _is_last(stack: Stack, parts: range) -> bool:
    return parts.stop == len(stack.layers) + 1


def _parts_of(stack: Stack, name: str) -> tuple[int, ...]:
    """Return the parts that use a weight."""
    first, last = 0, len(stack.layers)
    if name.startswith("layers."):
        return (int(name.split(".")[1]) + 1,)
    if name.startswith(stack.ENTRY):
        return (first,)
    if isinstance(stack.get_submodule(name.rpartition(".")[0]), nn.Embedding):
        tied = name == "embeddings.weight" and getattr(stack, "output", None) is None
        return (first, last) if tied else (first,)
    return (last,)


def _names(stack: Stack, parts: range) -> list[str]:
    return [name for name in stack.state_dict() if not set(parts).isdisjoint(_parts_of(stack, name))]


def _cut(whole: Path, path: Path, spec: GraphSpec, stack: Stack, parts: range) -> GraphSpec:
    """Write the graph of a stretch to `path`, in the folder of the whole graph, and return its spec."""
    model = ir.load(whole)
    streams = _streams(model.graph)
    layers, last = _layers(parts), _is_last(stack, parts)
    own = [pair for pair in spec.states if int(pair.input.rpartition(".")[2]) in layers]
    result_names = [tensor.name for tensor in spec.results] if last else [streams[layers.stop].name or ""]
    outputs = [*result_names, *(pair.output for pair in own)]
    entry = None if 0 in parts else streams[layers.start]
    if entry is not None and (fused := entry.producer()) and fused.op_type == FUSED_NORM:
        entry = streams[layers.start] = _part(model.graph, fused)
    inputs = _needed(model.graph, outputs, entry)
    shape = (*stack.STREAM, stack.width)
    for value in streams.values():
        value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(shape)
    graph = ir.convenience.extract(model.graph, [value.name or "" for value in inputs], outputs)
    ir.save(ir.Model(graph, ir_version=model.ir_version), path)
    described = {tensor.name: tensor for tensor in (*spec.inputs, *spec.outputs)}

    def described_as(name: str) -> TensorSpec:
        return described.get(name) or TensorSpec(name, "float32", shape)

    placed = spec.columns is not None and {spec.columns.write_index, spec.columns.position_ids} <= {
        value.name for value in inputs
    }
    return replace(
        spec,
        columns=spec.columns if placed else None,  # attention needs the positions alone
        inputs=tuple(described_as(value.name or "") for value in inputs),
        outputs=tuple(described_as(name) for name in outputs),
        states=tuple(own),
    )


def _part(graph: ir.Graph, fused: ir.Node) -> ir.Value:
    """Part a norm that is fused with a sum, so that a stretch can begin at the sum, and return the sum."""
    tape = ir.tape.Tape()
    total = tape.op("Add", fused.inputs[:2])
    norm = tape.op("RMSNormalization", [total, fused.inputs[2]], {"epsilon": fused.attributes.get_float("epsilon", 1e-5)})
    ir.convenience.replace_nodes_and_values(
        graph, fused, [fused], tape.nodes, [fused.outputs[0], fused.outputs[3]], [norm, total]
    )
    return total


def _streams(graph: ir.Graph) -> dict[int, ir.Value]:
    """Return by block the value that enters it: what its first norm reads, or the sum that is fused with this norm."""
    streams = {}
    for node in graph:
        fused = node.op_type == FUSED_NORM
        if not fused and node.op_type != "RMSNormalization":
            continue
        scale, value = (node.inputs[2], node.outputs[3]) if fused and len(node.outputs) > 3 else (node.inputs[1], node.inputs[0])
        layer, _, rest = ((scale and scale.name) or "").removeprefix("layers.").partition(".")
        if layer.isdecimal() and rest.startswith("attention_norm.") and value is not None:
            streams[int(layer)] = value
    return streams


def _needed(graph: ir.Graph, outputs: Sequence[str], entry: ir.Value | None) -> list[ir.Value]:
    """Return the values that the outputs depend on: `entry`, if it is given, and inputs of the graph in their order."""
    values = ir.convenience.create_value_mapping(graph)
    seen: set[ir.Value] = set()
    left = [values[name] for name in outputs]
    while left:
        value = left.pop()
        if value in seen:
            continue
        seen.add(value)
        if value is not entry and (node := value.producer()) is not None:
            left += [needed for needed in node.inputs if needed is not None]
    return [*([entry] if entry is not None else []), *(value for value in graph.inputs if value in seen)]


def _fed(case: Case, spec: GraphSpec) -> Case:
    """Return the case with the feeds of a stretch. A cache of another stretch is zeros: only its size counts."""

    def feed(tensor: TensorSpec, feeds: Mapping[str, Array]) -> Array:
        return feeds[tensor.name] if tensor.name in feeds else np.zeros(tensor.resolve(case.dims), tensor.dtype)

    return replace(case, calls=tuple({tensor.name: feed(tensor, feeds) for tensor in spec.feeds} for feeds in case.calls))


def _with(case: Case, results: Sequence[Mapping[str, Array]]) -> Case:
    """Return the case with the results of a stretch among its feeds, for the stretches after it."""
    return replace(case, calls=tuple({**feeds, **given} for feeds, given in zip(case.calls, results, strict=True)))
