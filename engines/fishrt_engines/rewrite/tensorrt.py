"""Lowering of a portable graph to a form that TensorRT's importer accepts and computes well.

    KV caches      get a fixed number of rows: TensorRT updates only tensors of static length in place
    precision      float16 or bfloat16 by option; see precision.py. Feeds and results keep their types, caches do not
    attention      stays in float32 by option, since float16 was seen to err by 0.16 after a long prefix. It stays one operator,
                   which needs a fused kernel for its shapes, or is decomposed into primitive operators, which need none
    masks          get 4 axes
    Clip           of integers becomes Max and Min
    TensorScatter  into a tensor that is no input of the graph becomes Slice and Concat
    float64        becomes float32, as in TensorRT, so that ONNX Runtime computes the same from a lowered graph

Weights are untouched: a lowered graph refers to the files of the original one. Weights in integers stay so: int4 has fused
kernels; int8 is documented for size, not for speed. Without TensorRT, tensorrt_rules checks that lowered graphs follow its
documented rules, and tests run them in ONNX Runtime; all else needs a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np

from ..engine import Dim, GraphSpec, TensorSpec
from ..errors import GraphError
from .graph_edit import GraphEditor, attribute
from .graph_types import UNKNOWN, Shape, Value, declared, infer
from .onnx_proto import CODES, array_tensor, int64_tensor, int64_values, node, parse_model

LOWERING = 1
"""Version of the lowering; part of a plan's key."""
PRECISIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""Precisions by name, and their element types."""

_MASKED = -30000.0
"""Added to masked scores: zero after a softmax, and in the range of float16."""
_FOLDED = ("Cast", "Concat", "Constant", "Gather", "Range", "Reshape", "Shape", "Squeeze", "Unsqueeze")
"""Operators of shape computations, replaced by constants where possible."""
_FORMS = ("is_causal", "softcap", "softmax_precision")
"""Attributes of Attention that the primitive form does not implement."""


@dataclass(frozen=True, slots=True)
class LoweringOptions:
    """The options of a lowering."""

    max_len: int | None
    """Rows of KV caches whose number the graph leaves open."""
    precision: str
    """A key of PRECISIONS."""
    fp32_attention: bool
    """Whether attention is computed in float32 nevertheless. Recommended with fp16."""
    primitive_attention: bool
    """Whether attention is decomposed into primitive operators: necessary if no fused kernel has its shapes."""


def lower_for_tensorrt(model: bytes, spec: GraphSpec, options: LoweringOptions, folder: Path) -> tuple[bytes, GraphSpec]:
    """Return the bytes of a lowered graph file, and its description.

    model: bytes of the graph file `spec.file`, whose weights are in `folder`. Raises GraphError if neither graph nor options give
    the length of its caches, and for operators that cannot be decomposed.
    """
    editor = GraphEditor(parse_model(_computed_in(model, options.precision, folder), spec.file))
    rows = _fix_cache(editor, spec, options.max_len)
    values = infer(editor.graph)
    _fold_shapes(editor, values)
    _take_integer_clips_apart(editor, values)
    _take_inner_scatters_apart(editor, values)
    _narrow_doubles(editor)
    _Attention(editor, values, options).lower()
    lowered = editor.finish()
    return lowered, _described(editor, spec, rows)


def _computed_in(model: bytes, precision: str, folder: Path) -> bytes:
    if precision not in PRECISIONS:
        raise GraphError(f"unknown precision {precision!r}", hint=f"choose one of: {', '.join(PRECISIONS)}")
    if precision == "fp32":
        return model
    from .precision import compute_in

    return compute_in(model, PRECISIONS[precision], folder)


def _fix_cache(editor: GraphEditor, spec: GraphSpec, max_len: int | None) -> dict[Dim, int]:
    """Give caches their number of rows. Return the size of the dimension that was open, by its name."""
    caches = {n.input[0] for n in editor.nodes if n.op_type == "TensorScatter"}
    open_rows: set[Dim] = {t.shape[2] for t in spec.state_tensors if t.name in caches and isinstance(t.shape[2], str)}
    if not open_rows:
        return {}
    if max_len is None or max_len < 1:
        raise GraphError(
            f"{spec.file} leaves the length of its caches open, and TensorRT needs a fixed one; max_len is {max_len}",
            hint="give the largest number of positions as max_len",
        )
    rows = dict.fromkeys(open_rows, max_len)
    for value in (*editor.inputs.values(), *editor.outputs.values()):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in rows:
                dim.Clear()
                dim.dim_value = max_len
    return rows


def _fold_shapes(editor: GraphEditor, values: dict[str, Value]) -> None:
    """Replace shape computations of known values by constants, such as the positions of a cache of known length."""
    kept = []
    for n in editor.nodes:
        value = values[n.output[0]]
        content = value.content if value.dtype == "int64" and n.op_type in _FOLDED else None
        if content is None or None in content or n.output[0] in editor.outputs:
            kept.append(n)
        else:
            editor.constant(int64_tensor(n.output[0], [d for d in content if d is not None], scalar=value.shape == ()))
    editor.nodes = kept
    editor.index()


def _take_integer_clips_apart(editor: GraphEditor, values: dict[str, Value]) -> None:
    nodes = []
    for n in editor.nodes:
        if n.op_type != "Clip" or values.get(n.input[0], UNKNOWN).dtype not in ("int32", "int64"):
            nodes.append(n)
            continue
        bounds = [(op_type, bound) for op_type, bound in zip(("Max", "Min"), n.input[1:], strict=False) if bound]
        for step, (op_type, bound) in enumerate(bounds, 1):
            last = step == len(bounds)
            result = n.output[0] if last else f"{n.output[0]}.from_below"
            nodes.append(node(op_type, [n.input[0] if step == 1 else f"{n.output[0]}.from_below", bound], [result]))
        if not bounds:
            nodes.append(node("Identity", [n.input[0]], [n.output[0]]))
    editor.nodes = nodes
    editor.index()


def _take_inner_scatters_apart(editor: GraphEditor, values: dict[str, Value]) -> None:
    """Replace each TensorScatter into a cache inside the graph, as in the frame graph, by Slice and Concat at known rows."""
    nodes = []
    for n in editor.nodes:
        if n.op_type != "TensorScatter" or n.input[0] in editor.inputs:
            nodes.append(n)
            continue
        cache, new, result = (str(name) for name in (*n.input[:2], n.output[0]))
        start = _everywhere(editor, n.input[2]) if len(n.input) > 2 else 0
        rows, length = (_sizes(values, name)[2] for name in (cache, new))
        if start is None or rows is None or length is None or attribute(n, "axis", -2) not in (-2, 2):
            raise GraphError(f"{n.name or result} writes to unknown rows; TensorRT supports that only for inputs of the graph")
        parts = [new]
        for place, (first, end) in enumerate(((0, start), (start + length, rows))):
            if first < end:
                kept = f"{result}.{('before', 'behind')[place]}"
                bounds = [editor.constant(int64_tensor(f"lowered.{i}", [i])) for i in (first, end, 2)]
                nodes.append(node("Slice", [cache, *bounds], [kept]))
                parts.insert(place and len(parts), kept)
        nodes.append(node("Concat", parts, [result], axis=2))
    editor.nodes = nodes
    editor.index()


def _sizes(values: dict[str, Value], name: str) -> Shape:
    """Return the sizes of a value of four axes; unknown ones for another rank."""
    shape = values.get(name, UNKNOWN).shape
    return shape if shape is not None and len(shape) == 4 else (None,) * 4


def _everywhere(editor: GraphEditor, name: str) -> int | None:
    """Return the number to which all elements of a value are equal; None if they differ or are unknown."""
    spread = editor.made_by(name, "Expand")
    tensor = editor.constants.get(spread.input[0] if spread is not None else name)
    found = set(int64_values(tensor)) if tensor is not None and tensor.data_type == CODES["int64"] else set()
    return found.pop() if len(found) == 1 else None


def _narrow_doubles(editor: GraphEditor) -> None:
    for tensor in editor.constants.values():
        if tensor.data_type == CODES["float64"] and tensor.raw_data:
            tensor.CopyFrom(array_tensor(tensor.name, np.frombuffer(tensor.raw_data).astype(np.float32).reshape(tensor.dims)))
    for n in editor.nodes:
        for found in n.attribute:
            if n.op_type == "Cast" and found.name == "to" and found.i == CODES["float64"]:
                found.i = CODES["float32"]


class _Attention:
    """The lowering of attention in one graph."""

    def __init__(self, editor: GraphEditor, values: dict[str, Value], options: LoweringOptions) -> None:
        self._edit, self._values, self._options = editor, values, options
        self._nodes: list[Any] = []

    def lower(self) -> None:
        """Lower all Attention nodes; see the module."""
        for n in self._edit.nodes:
            if n.op_type == "Attention":
                self._lower(n)
            else:
                self._nodes.append(n)
        self._edit.nodes = self._nodes
        self._edit.index()

    def _lower(self, attention: Any) -> None:
        outside = self._dtype(attention.input[0])
        inside = "float32" if self._options.fp32_attention else outside
        query, keys, values = (self._cast(name, inside) for name in attention.input[:3])
        mask = self._of_four_axes(attention.input[3]) if len(attention.input) > 3 and attention.input[3] else ""
        if mask and self._dtype(mask) != "bool":
            mask = self._cast(mask, inside)
        result = str(attention.output[0])
        computed = result if inside == outside else f"{result}.computed"
        if self._options.primitive_attention:
            self._primitive(attention, query, keys, values, mask, computed)
        else:
            attention.input[:] = [query, keys, values, mask, *attention.input[4:]]
            attention.output[0] = computed
            self._nodes.append(attention)
        if inside != outside:
            self._nodes.append(node("Cast", [computed], [result], to=CODES[outside]))

    def _primitive(self, attention: Any, query: str, keys: str, values: str, mask: str, result: str) -> None:
        """Add MatMul, Add, Softmax, MatMul. Queries are scaled first, since products might leave the range of float16."""
        name, (q, k, v) = attention.name or result, (_sizes(self._values, given) for given in attention.input[:3])
        if any(attention.input[4:]) or any(attention.output[1:]) or any(attribute(attention, a, 0) for a in _FORMS):
            raise GraphError(f"the attention {name} has a form that cannot be decomposed")
        heads, kv_heads, width, value_width = q[1], k[1], k[3], v[3]
        if heads is None or kv_heads is None or width is None or value_width is None:
            raise GraphError(f"the attention {name} cannot be decomposed: the number and size of its heads are unknown")
        dtype = self._dtype(query)
        if heads != kv_heads:
            keys, values = (self._repeat(*given, kv_heads, heads) for given in ((keys, width), (values, value_width)))
        scale = self._cast(self._scalar(f"{result}.scale", attribute(attention, "scale", 0.0) or 1 / sqrt(width)), dtype)
        scaled = self._add("Mul", [query, scale], f"{result}.scaled", dtype)
        turned = self._add("Transpose", [keys], f"{keys}.turned", dtype, perm=[0, 1, 3, 2])
        products = self._add("MatMul", [scaled, turned], f"{result}.products", dtype)
        if mask:
            products = self._add("Add", [products, self._bias(mask, dtype)], f"{result}.masked", dtype)
        weights = self._add("Softmax", [products], f"{result}.weights", dtype, axis=-1)
        self._nodes.append(node("MatMul", [weights, values], [result]))

    def _repeat(self, name: str, width: int, kv_heads: int, heads: int) -> str:
        """Repeat [batch, kv_heads, rows, width] to [batch, heads, rows, width]: head j is KV head j // (heads / kv_heads)."""
        dtype = self._dtype(name)
        axis = self._edit.constant(int64_tensor("lowered.axis_of_groups", [2]))
        groups = self._edit.constant(int64_tensor(f"{name}.groups", [1, 1, heads // kv_heads, 1, 1]))
        shape = self._edit.constant(int64_tensor(f"{name}.all_heads_shape", [0, heads, -1, width]))
        grouped = self._add("Unsqueeze", [name, axis], f"{name}.in_groups", dtype)
        repeated = self._add("Expand", [grouped, groups], f"{name}.repeated", dtype)
        return self._add("Reshape", [repeated, shape], f"{name}.all_heads", dtype)

    def _of_four_axes(self, mask: str) -> str:
        shape = self._values.get(mask, UNKNOWN).shape
        if shape is None or len(shape) >= 4:
            return mask
        axes = self._edit.constant(int64_tensor(f"{mask}.missing_axes", list(range(4 - len(shape)))))
        return self._add("Unsqueeze", [mask, axes], f"{mask}.of_four_axes", self._dtype(mask))

    def _bias(self, mask: str, dtype: str) -> str:
        """Return the name of the additive form of a mask."""
        if self._dtype(mask) != "bool":
            return mask
        seen, hidden = self._scalar("lowered.seen", 0.0), self._scalar("lowered.hidden", _MASKED)
        return self._cast(self._add("Where", [mask, seen, hidden], f"{mask}.bias", "float32"), dtype)

    def _dtype(self, name: str) -> str:
        dtype = self._values.get(name, UNKNOWN).dtype
        if dtype is None:
            raise GraphError(f"the type of {name}, an input of attention, is unknown")
        return dtype

    def _scalar(self, name: str, value: float) -> str:
        self._values[name] = Value("float32", ())
        return self._edit.constant(array_tensor(name, np.array(value, np.float32)))

    def _cast(self, name: str, dtype: str) -> str:
        return name if self._dtype(name) == dtype else self._add("Cast", [name], f"{name}.in_{dtype}", dtype, to=CODES[dtype])

    def _add(self, op_type: str, inputs: list[str], result: str, dtype: str, **attributes: Any) -> str:
        """Add a node unless it exists, since layers share a mask. Return the name of its result."""
        if result not in self._values:
            self._values[result] = Value(dtype)
            self._nodes.append(node(op_type, inputs, [result], **attributes))
        return result


def _described(editor: GraphEditor, spec: GraphSpec, rows: dict[Dim, int]) -> GraphSpec:
    in_file = {**editor.inputs, **editor.outputs}

    def lowered(tensor: TensorSpec) -> TensorSpec:
        dtype = declared(in_file[tensor.name]).dtype or tensor.dtype
        return TensorSpec(tensor.name, dtype, tuple(rows.get(dim, dim) for dim in tensor.shape))

    return replace(spec, inputs=tuple(map(lowered, spec.inputs)), outputs=tuple(map(lowered, spec.outputs)))
