"""Lowering of a portable graph to a form that TensorRT's importer accepts and computes well.

    KV caches      get a fixed number of rows: TensorRT updates only tensors of static length in place
    precision      float16 or bfloat16 by option; see precision.py. Feeds and results keep their types, caches do not
    attention      stays in float32 by option, since float16 was seen to err by 0.16 after a long prefix; see FORMS
    masks          get 4 axes
    Clip           of integers becomes Max and Min
    TensorScatter  into a tensor that is no input of the graph becomes Slice and Concat
    TopK           ranks as many as TensorRT can, instead of as many as a feed has elements: its importer needs a constant

Weights are untouched: a lowered graph refers to the files of the original one. Weights in integers stay so: int4 has fused
kernels; int8 is documented for size, not for speed. Without TensorRT, tensorrt_rules checks that lowered graphs follow its
documented rules, and tests run them in ONNX Runtime; all else needs a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import sqrt

import numpy as np
import onnx_ir as ir
from onnxscript.optimizer import fold_constants

from fishrt.language_model.drawing import MOST_RANKED
from fishrt_engines.engine import GraphSpec, TensorSpec
from fishrt_engines.trt.plans import PRECISIONS, LoweringOptions

from ...errors import ExportError
from ..edit import constant, infer, numbers, producer, tidy
from ..precision import compute_in

FORMS = ("fused", "decomposable", "primitive")
"""Forms of attention: one operator, which needs a fused kernel for its shapes; the same, which TensorRT may take apart; MatMul,
Add, Softmax and MatMul, which need no kernel of their own."""

_MASKED = -30000.0
"""Added to masked scores: zero after a softmax, and in the range of float16."""
_FOLDED = ("Cast", "Concat", "Gather", "Range", "Reshape", "Shape", "Squeeze", "Unsqueeze")
"""Operators of shape computations, replaced by constants where possible."""
_OTHER_FORMS = ("is_causal", "softcap", "softmax_precision")
"""Attributes of Attention that the primitive form does not implement."""


def lower_for_tensorrt(model: ir.Model, spec: GraphSpec, options: LoweringOptions, attention: str) -> GraphSpec:
    """Lower a graph in place. Return its description.

    attention: one of FORMS. Raises ExportError if neither graph nor options give the length of its caches, and for operators that
    cannot be decomposed.
    """
    graph = model.graph
    if options.precision not in PRECISIONS:
        raise ExportError(f"unknown precision {options.precision!r}", hint=f"choose one of: {', '.join(PRECISIONS)}")
    described = _fix_caches(graph, spec, options.max_len)
    if options.precision != "fp32":
        compute_in(model, PRECISIONS[options.precision])
    infer(model)
    described = _rank_most(graph, described)
    fold_constants(model, should_fold=lambda node: node.op_type in _FOLDED and node.outputs[0].dtype == ir.DataType.INT64)
    infer(model)
    lowering = _Lowering(graph, attention, wide=options.fp32_attention)
    for node in list(graph):
        lowering.lower(node)
    tidy(model)
    types = {str(value.name): value.dtype for value in (*graph.inputs, *graph.outputs)}

    def lowered(tensor: TensorSpec) -> TensorSpec:
        dtype = types[tensor.name]
        return tensor if dtype is None else replace(tensor, dtype=dtype.numpy().name)

    return replace(described, inputs=tuple(map(lowered, described.inputs)), outputs=tuple(map(lowered, described.outputs)))


def fix_sizes(graph: ir.Graph, sizes: dict[str, int]) -> None:
    """Give the symbolic dimensions of these names their sizes, in the graph's inputs and outputs."""
    for value in (*graph.inputs, *graph.outputs):
        if value.shape is not None:
            dims = [dim if isinstance(dim, int) else dim.value for dim in value.shape]
            value.shape = ir.Shape([sizes.get(dim, dim) if isinstance(dim, str) else dim for dim in dims])


def _fix_caches(graph: ir.Graph, spec: GraphSpec, max_len: int | None) -> GraphSpec:
    """Give caches their number of rows. Return the description with it."""
    caches = {node.inputs[0].name for node in graph if node.op_type == "TensorScatter" and node.inputs[0] is not None}
    open_rows = {dim for t in spec.state_tensors if t.name in caches and isinstance(dim := t.shape[2], str)}
    if not open_rows:
        return spec
    if max_len is None or max_len < 1:
        raise ExportError(
            f"{spec.file} leaves the length of its caches open, and TensorRT needs a fixed one; max_len is {max_len}",
            hint="give the largest number of positions as max_len",
        )
    fix_sizes(graph, dict.fromkeys(open_rows, max_len))

    def fixed(tensor: TensorSpec) -> TensorSpec:
        return replace(tensor, shape=tuple(max_len if dim in open_rows else dim for dim in tensor.shape))

    return replace(spec, inputs=tuple(map(fixed, spec.inputs)), outputs=tuple(map(fixed, spec.outputs)))


def _rank_most(graph: ir.Graph, spec: GraphSpec) -> GraphSpec:
    """Make constants of the frame graph's ranks; see `drawing.frame_spec`. Return the description without these inputs."""
    made: dict[ir.Value, int] = {}
    for node in graph:
        counted = producer(node.inputs[1], "Shape") if node.op_type == "TopK" else None
        ranks, likeliest = (None, None) if counted is None else (counted.inputs[0], node.inputs[0])
        if ranks is None or not ranks.is_graph_input():
            continue
        assert likeliest is not None
        assert likeliest.shape is not None
        candidates = likeliest.shape[-1]
        assert isinstance(candidates, int)
        made[ranks] = min(candidates, MOST_RANKED)
        node.replace_input_with(1, constant(graph, f"lowered.{ranks.name}.count", [made[ranks]], np.int64))
    for ranks, count in made.items():
        graph.inputs.remove(ranks)
        ir.convenience.replace_all_uses_with(ranks, constant(graph, str(ranks.name), np.arange(count)))
    return replace(spec, inputs=tuple(tensor for tensor in spec.inputs if tensor.name not in {ranks.name for ranks in made}))


class _Lowering:
    """The lowering of single operators. Every new value gets its type."""

    def __init__(self, graph: ir.Graph, attention: str, *, wide: bool) -> None:
        self._graph, self._form, self._wide = graph, attention, wide
        self._shared: dict[tuple[ir.Value, str], ir.Value] = {}
        """Masks and casts by the value they are made of: layers share a mask."""
        self._new: list[ir.Node] = []

    def lower(self, node: ir.Node) -> None:
        """Replace a node, if TensorRT needs another form of it."""
        self._new = []
        x = node.inputs[0] if node.inputs else None
        if node.op_type == "Clip" and x is not None and x.dtype in (ir.DataType.INT32, ir.DataType.INT64):
            made = self._clip(x, node.inputs[1:])
        elif node.op_type == "TensorScatter" and x is not None and not x.is_graph_input():
            made = self._inner_scatter(node)
        elif node.op_type == "Attention":
            made = self._attention(node)
        else:
            return
        ir.convenience.replace_nodes_and_values(self._graph, node, [node], self._new, node.outputs[:1], [made])

    def _add(
        self, op_type: str, inputs: Sequence[ir.Value | None], like: ir.Value, **attributes: int | Sequence[int]
    ) -> ir.Value:
        """Add a node whose result has the type of `like`."""
        self._new.append(ir.node(op_type, inputs, attributes))
        result = self._new[-1].outputs[0]
        result.type = like.type
        return result

    def _once(self, of: ir.Value, what: str, make: Callable[[], ir.Value]) -> ir.Value:
        """Return the value that `make` made of another one, from the first call."""
        if (of, what) not in self._shared:
            self._shared[of, what] = make()
        return self._shared[of, what]

    def _cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        def cast() -> ir.Value:
            made = self._add("Cast", [value], value, to=dtype)
            made.type = ir.TensorType(dtype)
            return made

        return value if value.dtype == dtype else self._once(value, dtype.name, cast)

    def _ints(self, name: str, numbers: int | list[int]) -> ir.Value:
        return constant(self._graph, f"lowered.{name}", numbers, np.int64)

    def _clip(self, x: ir.Value, bounds: Sequence[ir.Value | None]) -> ir.Value:
        made = x
        for op_type, bound in zip(("Max", "Min"), bounds, strict=False):
            if bound is not None:
                made = self._add(op_type, [made, bound], x)
        return self._add("Identity", [x], x) if made is x else made

    def _inner_scatter(self, scatter: ir.Node) -> ir.Value:
        """Write into a cache inside the graph, as in the frame graph, at known rows."""
        cache, new, *rest = scatter.inputs
        assert cache is not None
        assert new is not None
        start = _everywhere(rest[0]) if rest else 0
        rows, length = _sizes(cache)[2], _sizes(new)[2]
        if start is None or rows is None or length is None or scatter.attributes.get_int("axis", -2) not in (-2, 2):
            name = scatter.name or scatter.outputs[0].name
            raise ExportError(f"{name} writes to unknown rows; TensorRT supports that only for inputs of the graph")

        def part(first: int, end: int) -> list[ir.Value]:
            bounds = [self._ints(str(n), [n]) for n in (first, end, 2)]
            return [self._add("Slice", [cache, *bounds], cache)] if first < end else []

        return self._add("Concat", [*part(0, start), new, *part(start + length, rows)], cache, axis=2)

    def _attention(self, attention: ir.Node) -> ir.Value:
        query, keys, values, mask = [*attention.inputs, None][:4]
        assert query is not None
        assert keys is not None
        assert values is not None
        assert query.dtype is not None
        inside = ir.DataType.FLOAT if self._wide else query.dtype
        q, k, v = (self._cast(value, inside) for value in (query, keys, values))
        if mask is not None and mask.shape is not None and (missing := 4 - len(mask.shape)) > 0:
            given, axes = mask, self._ints(f"{missing}_axes", list(range(missing)))
            mask = self._once(mask, "of four axes", lambda: self._add("Unsqueeze", [given, axes], given))
        if mask is not None and mask.dtype != ir.DataType.BOOL:
            mask = self._cast(mask, inside)
        if self._form == "primitive":
            heads = [_sizes(value) for value in (query, keys, values)]
            made = self._primitive(attention, q, k, v, mask, heads)
        else:
            made = self._add("Attention", [q, k, v, mask, *attention.inputs[4:]], q)
            self._new[-1].attributes.update(attention.attributes)
            if self._form == "decomposable":
                self._new[-1].attributes["TRT_decomposable"] = ir.AttrInt64("TRT_decomposable", 1)
        return made if inside == query.dtype else self._add("Cast", [made], query, to=query.dtype)

    def _primitive(
        self, attention: ir.Node, q: ir.Value, k: ir.Value, v: ir.Value, mask: ir.Value | None, sizes: list[list[int | None]]
    ) -> ir.Value:
        """Queries are scaled first, since products might leave the range of float16. sizes: of queries, keys and values."""
        name = attention.name or attention.outputs[0].name
        if any(attention.inputs[4:]) or len(attention.outputs) > 1 or _has(attention, _OTHER_FORMS):
            raise ExportError(f"the attention {name} has a form that cannot be decomposed")
        (_, heads, _, _), (_, kv_heads, _, width), (_, _, _, value_width) = sizes
        if heads is None or kv_heads is None or width is None or value_width is None:
            raise ExportError(f"the attention {name} cannot be decomposed: the number and size of its heads are unknown")
        if heads != kv_heads:
            k, v = (self._repeat(value, size, kv_heads, heads) for value, size in ((k, width), (v, value_width)))
        scale = attention.attributes.get_float("scale", 0.0) or 1 / sqrt(width)
        scaled = self._add("Mul", [q, self._number(f"scale_{scale}", scale, q)], q)
        scores = self._add("MatMul", [scaled, self._add("Transpose", [k], k, perm=[0, 1, 3, 2])], q)
        if mask is not None:
            scores = self._add("Add", [scores, self._bias(mask, q)], q)
        return self._add("MatMul", [self._add("Softmax", [scores], q, axis=-1), v], q)

    def _repeat(self, value: ir.Value, width: int, kv_heads: int, heads: int) -> ir.Value:
        """Repeat [batch, kv_heads, rows, width] to [batch, heads, rows, width]: head j is KV head j // (heads / kv_heads)."""
        groups = heads // kv_heads
        grouped = self._add("Unsqueeze", [value, self._ints("2", [2])], value)
        repeated = self._add("Expand", [grouped, self._ints(f"{groups}_groups", [1, 1, groups, 1, 1])], value)
        return self._add("Reshape", [repeated, self._ints(f"{heads}_heads_of_{width}", [0, heads, -1, width])], value)

    def _bias(self, mask: ir.Value, like: ir.Value) -> ir.Value:
        """Return the additive form of a mask."""
        if mask.dtype != ir.DataType.BOOL:
            return mask
        seen, hidden = self._number("seen", 0.0, like), self._number("hidden", _MASKED, like)
        return self._once(mask, "bias", lambda: self._add("Where", [mask, seen, hidden], like))

    def _number(self, name: str, number: float, like: ir.Value) -> ir.Value:
        assert like.dtype is not None
        return constant(self._graph, f"lowered.{name}.{like.dtype.numpy()}", number, like.dtype.numpy())


def _sizes(value: ir.Value) -> list[int | None]:
    """Return the sizes of a value of four axes; unknown ones for another rank."""
    shape = value.shape
    return [dim if isinstance(dim, int) else None for dim in shape] if shape is not None and len(shape) == 4 else [None] * 4


def _has(node: ir.Node, attributes: Sequence[str]) -> bool:
    """Return whether one of these attributes is given, and not zero."""
    return any(node.attributes[name].value for name in attributes if name in node.attributes)


def _everywhere(value: ir.Value | None) -> int | None:
    """Return the number to which all elements of a value are equal; None if they differ or are unknown."""
    spread = producer(value, "Expand")
    source = value if spread is None else spread.inputs[0]
    found = set(numbers(source).ravel().tolist()) if source is not None and source.const_value is not None else set()
    return int(found.pop()) if len(found) == 1 else None
