"""`--target coreml`: graphs of codec_decode for calls of fixed lengths, with the portable graph's weights.

CoreML compiles for fixed sizes, and ONNX Runtime does not translate ONNX's newer operators for it. They become

    RMSNormalization   x / Sqrt(ReduceMean(x·x) + ε) · scale
    RotaryEmbedding    x·cos + (x·R)·sin, where the constant matrix R swaps the numbers of each pair and negates one of them
    TensorScatter      new·written + cache·(1 − written), for one column
    Attention          Softmax(q·kᵀ + bias)·v, with bias 0 for visible keys; queries that share a key head are rows of one matrix

Reciprocal is not used, since CoreML adds 1e-4 to its divisor. CoreML does not compute with integers: embeddings, masks and
positions are a separate graph, the front, for the CPU.

    integers ─► front ─► floats ─► back ─► results
                   latents, state ─►     ─► state

Each graph is compared with the portable one in ONNX Runtime on the CPU. ONNX Runtime's usability checker estimates from the names
of operators how many nodes CoreML would run, also for a step of the language model, whose graph is not kept since the CPU runs
it. These graphs have not been run on a Mac.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes import common as passes
from onnxscript.optimizer import optimize_ir

from fishrt.bundle.manifest import FixedPart, Form, Parity, Usability
from fishrt_engines import open_engine
from fishrt_engines.engine import GraphSpec, StatePair, TensorSpec
from fishrt_engines.ort.coreml import CACHE_KEY, Part

from ..errors import ExportError
from ..graph.report import Case, Feeds, Report
from .edit import constant, initializer, load

TARGET = "coreml"
LENGTHS = (1, 4, 16)
"""Frames of a call. Streams decode 4 to 16 at a time, and calls of these lengths add up to any number. There are few, since each
graph in use holds all weights in memory once more."""
_CALLS = 8
"""Successive calls that verify a graph."""
_STEP_CACHE = 1024
"""Rows of the slow AR's cache in the step of which nodes are counted."""
HIDDEN = -30000.0
"""Added to the scores of masked keys: far below any score, and finite in float16."""
_FOLDED = 4096
"""Largest number of elements of a folded constant. Larger ones stay references to weights."""


def check_codec(decode: GraphSpec) -> None:
    """Check that the codec can be decoded in calls of fixed length. Raises ExportError otherwise."""
    if not decode.states:
        raise ExportError(
            "this codec is centred: its last frames depend on the length of the call, so that no length can be fixed",
            hint=f"leave {TARGET} out; provider cpu speaks with this checkpoint",
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

    portable: the spec of codec_decode. case: one row of codes or latents, in any calls. fingerprint: for the cache key.
    progress receives the completed part, 0..1. Raises ExportError for a graph that differs from the portable one.
    """
    made = []
    for n, frames in enumerate(LENGTHS):
        progress(n / len(LENGTHS))
        made.append(_part(folder, portable, frames, case, tolerance, fingerprint))
    return Form(TARGET, portable, parts=tuple(made))


def _part(folder: Path, portable: GraphSpec, frames: int, case: Case, tolerance: float, fingerprint: str) -> FixedPart:
    front, back = _split(folder / portable.file, {"batch": 1, "frames": frames})
    name = Path(portable.file).stem
    front_spec = _spec(front, f"{name}_{frames}_front.onnx", ())
    back_spec = _spec(back, f"{name}_{frames}.onnx", portable.states)
    identity = hashlib.sha256(ir.to_proto(back).SerializeToString() + fingerprint.encode())
    back.metadata_props[CACHE_KEY] = identity.hexdigest()[:32]
    for model, spec in ((front, front_spec), (back, back_spec)):
        ir.save(model, folder / spec.file)  # with all that it does not share with the portable graph
    made = FixedPart(frames, front_spec, back_spec, usability(back), Parity(0.0, tolerance, "cpu"))
    return replace(made, parity=_parity(folder, portable, made, case))


def step_usability(folder: Path, spec: GraphSpec) -> Usability:
    """Return the checker's result for a call of one column of a language model's graph, without the part that takes integers."""
    sizes = {"batch": 1, "length": 1, "cache": _STEP_CACHE}
    _, back = _split(folder / spec.file, sizes)
    return usability(back)


def _split(path: Path, sizes: Mapping[str, int]) -> tuple[ir.Model, ir.Model]:
    model = load(path)
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
    report = Report(static.back, static.parity.tolerance)
    for feeds in _calls(case, portable, static.frames):
        expected, actual = whole.run(feeds, state), part.run(feeds, static_state)
        for tensor in portable.results:
            report.values(tensor.name, expected[tensor.name], actual[tensor.name])
    for tensor in portable.state_tensors:
        report.values(tensor.name, state.read(tensor.name), static_state.read(tensor.name))
    return report.parity()


def _calls(case: Case, spec: GraphSpec, frames: int) -> Iterator[Feeds]:
    """Yield the feeds of a case in calls of `frames` frames, at most _CALLS."""
    axes = {tensor.name: tensor.shape.index("frames") for tensor in spec.feeds}
    whole = {name: np.concatenate([call[name] for call in case.calls], axis=axis) for name, axis in axes.items()}
    count = min(*(array.shape[axes[name]] // frames for name, array in whole.items()), _CALLS)
    for start in range(0, count * frames, frames):
        span = range(start, start + frames)
        yield {name: np.ascontiguousarray(np.take(array, span, axes[name])) for name, array in whole.items()}


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
    absent = ir.ExternalTensor("none", 0, 0, made.dtype, shape=made.shape, name=f"{made.name}.made")
    ir.convenience.replace_all_uses_with(made, initializer(graph, absent))
    graph.remove(node, safe=True)


def to_primitives(model: ir.Model, sizes: Mapping[str, int]) -> None:
    """Give the symbolic dimensions of the inputs their `sizes` and replace operators, in place; see the module's docstring.

    Raises ExportError for a form of an operator that has no replacement, and for an output whose shape stays unknown.
    """
    graph = model.graph
    for value in (*graph.inputs, *graph.outputs):
        assert value.shape is not None
        value.shape = ir.Shape(sizes.get(str(d.value), None) if isinstance(d, ir.SymbolicDim) else d for d in value.shape)
    _fold(model)
    for node in list(graph):
        if node.op_type in _REPLACEMENTS:
            tape = _Tape(graph)
            replaced = _REPLACEMENTS[node.op_type](tape, node)
            ir.convenience.replace_nodes_and_values(graph, node, [node], tape.nodes, node.outputs[:1], [replaced])
    _fold(model)
    for value in graph.outputs:
        if value.shape is None or not value.shape.is_static():
            raise _fault(f"the shape of {value.name} is not known at sizes {dict(sizes)}")


def split_front(model: ir.Model) -> tuple[ir.Model, ir.Model]:
    """Split a model of `to_primitives`. Return the front, which all integers enter, and the back, which takes its results.

    Raises ExportError if a result depends on integers alone.
    """
    graph, of_integers = model.graph, set[ir.Node]()
    for node in reversed(graph):
        given = [value for value in node.inputs if value is not None and not _is_constant(value)]
        feeds_front = any(reader in of_integers for value in node.outputs for reader, _ in value.uses())
        if feeds_front or any(_is_integer(value) for value in given):
            of_integers.add(node)
    handed = [
        value
        for node in graph
        if node in of_integers
        for value in node.outputs
        if any(reader not in of_integers for reader, _ in value.uses())
    ]
    if any(value in graph.outputs for node in of_integers for value in node.outputs):
        raise _fault("a result depends on integers alone")
    early = [value for value in graph.inputs if any(reader in of_integers for reader, _ in value.uses())]
    late = [value for value in graph.inputs if any(reader not in of_integers for reader, _ in value.uses())]
    front = ir.convenience.extract(graph, early, handed)
    back = ir.convenience.extract(graph, [*handed, *late], graph.outputs)
    front_model, back_model = (ir.Model(part, ir_version=model.ir_version) for part in (front, back))
    for part in (front_model, back_model):
        part.producer_name, part.producer_version = model.producer_name, model.producer_version
        part.opset_imports.update(model.opset_imports)
    return front_model, back_model


def _is_constant(value: ir.Value) -> bool:
    return value.is_initializer() or value.const_value is not None


def _fold(model: ir.Model) -> None:
    optimize_ir(model, input_size_limit=_FOLDED, output_size_limit=_FOLDED)
    passes.CommonSubexpressionEliminationPass()(model)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True)(model)
    passes.RemoveUnusedNodesPass()(model)


class _Tape(ir.tape.Tape):
    """The nodes that replace one node."""

    def __init__(self, graph: ir.Graph) -> None:
        super().__init__()
        self._graph = graph

    def constant(self, name: str, values: npt.ArrayLike, dtype: type[np.generic] = np.float32) -> ir.Value:
        """Return an initialiser with these values. Nodes share the initialisers of one name."""
        return constant(self._graph, f"primitive.{name}", values, dtype)  # the graph itself has no such names

    def reshaped(self, value: ir.Value, shape: Sequence[int]) -> ir.Value:
        """Return the value with a fixed shape."""
        return self.op("Reshape", [value, self.constant(f"shape.{'x'.join(map(str, shape))}", shape, np.int64)])

    def unsqueezed(self, value: ir.Value, axes: Sequence[int]) -> ir.Value:
        """Return the value with these axes inserted, each of size 1."""
        return self.op("Unsqueeze", [value, self.constant(f"axes.{'x'.join(map(str, axes))}", axes, np.int64)])


def _rms_norm(tape: _Tape, node: ir.Node) -> ir.Value:
    x, scale = _inputs(node, 2)
    if node.attributes.get_int("axis", -1) != -1:
        raise _fault("RMSNormalization over other axes than the last")
    last = tape.constant("axes.-1", [-1], np.int64)
    mean = tape.op("ReduceMean", [tape.op("Mul", [x, x]), last], {"keepdims": 1})
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    root = tape.op("Sqrt", [tape.op("Add", [mean, tape.constant(f"epsilon.{epsilon:g}", [epsilon])])])
    return tape.op("Mul", [tape.op("Div", [x, root]), scale])


def _rotary(tape: _Tape, node: ir.Node) -> ir.Value:
    x, cos, sin, position_ids = _inputs(node, 4)
    if node.attributes.get_int("interleaved", 0) != 1 or node.attributes.get_int("rotary_embedding_dim", 0) != 0:
        raise _fault("RotaryEmbedding of pairs that are not adjacent")
    width = _shape(x)[-1]
    pairs = np.eye(width // 2)
    spread = tape.constant(f"spread.{width}", np.repeat(pairs, 2, axis=1))
    swap = tape.constant(f"swap.{width}", np.kron(pairs, [[0, 1], [-1, 0]]))
    factors = []
    for table in (cos, sin):
        rows = tape.op("Gather", [table, position_ids], {"axis": 0})
        factors.append(tape.unsqueezed(tape.op("MatMul", [rows, spread]), [1]))
    turned = tape.op("Mul", [tape.op("MatMul", [x, swap]), factors[1]])
    return tape.op("Add", [tape.op("Mul", [x, factors[0]]), turned])


def _scatter(tape: _Tape, node: ir.Node) -> ir.Value:
    cache, new, write_index = _inputs(node, 3)
    if node.attributes.get_int("axis", -2) != -2 or _shape(new)[-2] != 1:
        raise _fault(f"TensorScatter of {_shape(new)}: only one column can be written at a time")
    rows = tape.constant(f"rows.{_shape(cache)[-2]}", np.arange(_shape(cache)[-2])[:, None], np.int64)
    here = tape.op("Equal", [tape.unsqueezed(write_index, [1, 2, 3]), rows])
    written = tape.op("Cast", [here], {"to": ir.DataType.FLOAT})
    kept = tape.op("Sub", [tape.constant("one", [1.0]), written])
    return tape.op("Add", [tape.op("Mul", [new, written]), tape.op("Mul", [cache, kept])])


def _attention(tape: _Tape, node: ir.Node) -> ir.Value:
    q, keys, values, mask = _inputs(node, 4)
    (batch, heads, length, width), key_heads = _shape(q), _shape(keys)[1]
    if node.attributes.get_int("is_causal", 0) or len(node.outputs) > 1:
        raise _fault("Attention with more than a mask")
    if heads != key_heads:
        if length != 1:
            raise _fault("Attention of several columns whose queries share keys")
        q = tape.reshaped(q, (batch, key_heads, heads // key_heads, width))
    scale = node.attributes.get_float("scale", 1 / math.sqrt(width))
    scaled = tape.op("Mul", [q, tape.constant(f"scale.{scale:g}", [scale])])
    scores = tape.op("MatMul", [scaled, tape.op("Transpose", [keys], {"perm": [0, 1, 3, 2]})])
    bias = tape.op("Where", [mask, tape.constant("seen", [0.0]), tape.constant("hidden", [HIDDEN])])
    weights = tape.op("Softmax", [tape.op("Add", [scores, bias])], {"axis": -1})
    y = tape.op("MatMul", [weights, values])
    return y if heads == key_heads else tape.reshaped(y, (batch, heads, length, width))


def _only_row(tape: _Tape, node: ir.Node) -> ir.Value:
    """Replace GatherElements along an axis of size 1 by its data."""
    data, _ = _inputs(node, 2)
    if _shape(data) != _shape(node.outputs[0]) or _shape(data)[node.attributes.get_int("axis", 0)] != 1:
        raise _fault("GatherElements along an axis of more than one element")
    return tape.op("Identity", [data])


def _one_slice(tape: _Tape, node: ir.Node) -> ir.Value:
    """Replace a Gather of floats at one constant index by a Slice. Any other Gather stays: it is a lookup."""
    data, index = _inputs(node, 2)
    where = ir.convenience.get_const_tensor(index)
    if where is None or where.shape.rank() != 0 or _is_integer(data):
        return tape.op("Gather", [data, index], {"axis": node.attributes.get_int("axis", 0)})
    axis, at = node.attributes.get_int("axis", 0), int(where.numpy())
    at %= _shape(data)[axis]
    bounds = [tape.constant(f"axes.{n}", [n], np.int64) for n in (at, at + 1, axis)]
    return tape.op("Squeeze", [tape.op("Slice", [data, *bounds]), bounds[2]])


_REPLACEMENTS: dict[str, Callable[[_Tape, ir.Node], ir.Value]] = {
    "RMSNormalization": _rms_norm,
    "RotaryEmbedding": _rotary,
    "TensorScatter": _scatter,
    "Attention": _attention,
    "GatherElements": _only_row,
    "Gather": _one_slice,
}


def _is_integer(value: ir.Value) -> bool:
    """Return whether a value holds integers or booleans."""
    return value.dtype is not None and not value.dtype.is_floating_point()


def _inputs(node: ir.Node, count: int) -> list[ir.Value]:
    """Return all inputs of a node. Raises ExportError unless there are `count`."""
    given = [value for value in node.inputs if value is not None]
    if len(given) != count or len(node.inputs) != count:
        raise _fault(f"{node.op_type} with {len(given)} inputs")
    return given


def _shape(value: ir.Value) -> tuple[int, ...]:
    if value.shape is None or not value.shape.is_static():
        raise _fault(f"the shape of {value.name} is not known")
    return tuple(int(d) for d in value.shape)  # type: ignore[arg-type]


def _fault(what: str) -> ExportError:
    return ExportError(f"no static graph can be made: {what}", hint="this is a fault of the export; please report it")
