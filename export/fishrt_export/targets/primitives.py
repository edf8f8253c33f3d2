"""Conversion of a graph to fixed sizes and to operators that CoreML supports.

CoreML compiles for fixed sizes, and ONNX Runtime does not translate ONNX's newer operators for it. They become

    RMSNormalization   x / Sqrt(ReduceMean(x·x) + ε) · scale
    RotaryEmbedding    x·cos + (x·R)·sin, where the constant matrix R swaps the numbers of each pair and negates one of them
    TensorScatter      new·written + cache·(1 − written), for one column
    Attention          Softmax(q·kᵀ + bias)·v, with bias 0 for visible keys; queries that share a key head are rows of one matrix

Reciprocal is not used, since CoreML adds 1e-4 to its divisor. CoreML does not compute with integers: embeddings, masks and
positions are a separate graph, the front, for the CPU. Weights stay in the data file of the portable graph.

    integers ─► front ─► floats ─► back ─► results
                            state ─►     ─► state
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes import common as passes
from onnxscript.optimizer import optimize_ir

from ..errors import ExportError

HIDDEN = -30000.0
"""Added to the scores of masked keys: far below any score, and finite in float16."""
_FOLDED = 4096
"""Largest number of elements of a folded constant. Larger ones stay references to weights."""


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
        name = f"primitive.{name}"  # the graph itself has no such names
        if name not in self._graph.initializers:
            array = np.asarray(values, dtype)
            tensor = ir.tensor(array, name=name)
            value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
            self._graph.register_initializer(value)
        return self._graph.initializers[name]

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
