"""Inference of the element types and shapes of a graph's values.

It covers the operators of graphs that fishrt exports. The results of other operators, and values that depend on them, are
unknown. Nothing is guessed: each inferred fact holds for every run of the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

from .graph_edit import attribute, ints
from .onnx_proto import DTYPES, TENSOR_INT64, int64_values

Shape = tuple[int | None, ...]
"""Sizes; None if a size is known only when the graph runs."""


@dataclass(frozen=True, slots=True)
class Value:
    """The known facts of one value."""

    dtype: str | None = None
    """A name of onnx_proto.DTYPES."""
    shape: Shape | None = None
    content: Shape | None = None
    """The elements of a small int64 tensor of rank 0 or 1; None for an unknown element."""


UNKNOWN = Value()
_SMALL = 64
"""Largest number of elements of an initializer whose content is read."""


def infer(graph: Any, outer: Mapping[str, Value] | None = None) -> dict[str, Value]:
    """Return all values of a graph, by name. outer: values of the enclosing graph. The nodes must be in topological order."""
    values = dict(outer or {})
    for given in graph.input:
        values[given.name] = declared(given)
    for tensor in graph.initializer:
        values[tensor.name] = of_tensor(tensor)
    for node in graph.node:
        inputs = [values.get(name, UNKNOWN) if name else UNKNOWN for name in node.input]
        made = _INFER[node.op_type](node, inputs) if node.op_type in _INFER and inputs else []
        for n, name in enumerate(node.output):
            values[name] = made[n] if n < len(made) else UNKNOWN
    return values


def declared(value_info: Any) -> Value:
    """Return an input or output as the file describes it."""
    tensor = value_info.type.tensor_type
    shape = tuple(dim.dim_value or None for dim in tensor.shape.dim)
    return Value(dtype_name(tensor.elem_type), shape)


def of_tensor(tensor: Any) -> Value:
    """Return the value of an initializer."""
    shape = tuple(tensor.dims)
    small = tensor.data_type == TENSOR_INT64 and len(shape) < 2 and not tensor.external_data and sum(shape) <= _SMALL
    return Value(dtype_name(tensor.data_type), shape, tuple(int64_values(tensor)) if small else None)


def dtype_name(code: int) -> str:
    """Return the name of an element type, also of one that onnx_proto does not list."""
    return DTYPES.get(code, f"element type {code}")


def broadcast(*shapes: Shape | None) -> Shape | None:
    """Return the shape of an elementwise result of values of these shapes."""
    known = [shape for shape in shapes if shape is not None]
    if len(known) < len(shapes):
        return None
    rank = max(map(len, known))
    axes = zip(*((1,) * (rank - len(shape)) + shape for shape in known), strict=True)
    # A size above 1 decides. Of 1 and an unknown size, the unknown one decides.
    return tuple(next((d for d in axis if d not in (1, None)), None if None in axis else 1) for axis in axes)


def _elements(value: Value) -> Shape | None:
    """Return the elements of a vector; unknown ones if only its length is known."""
    if value.content is None and value.dtype == "int64" and value.shape is not None and len(value.shape) == 1:
        size = value.shape[0]
        return None if size is None or size > _SMALL else (None,) * size
    return value.content


Inputs = list[Value]


def _same(_node: Any, inputs: Inputs) -> Inputs:
    return [Value(inputs[0].dtype, inputs[0].shape)]


def _elementwise(_node: Any, inputs: Inputs) -> Inputs:
    return [Value(inputs[0].dtype, broadcast(*(value.shape for value in inputs)))]


def _comparison(node: Any, inputs: Inputs) -> Inputs:
    return [Value("bool", _elementwise(node, inputs)[0].shape)]


def _where(_node: Any, inputs: Inputs) -> Inputs:
    return [Value(inputs[1].dtype, broadcast(*(value.shape for value in inputs)))]


def _cast(node: Any, inputs: Inputs) -> Inputs:
    dtype = dtype_name(attribute(node, "to", 0))
    return [Value(dtype, inputs[0].shape, inputs[0].content if dtype == "int64" else None)]


def _constant(node: Any, _inputs: Inputs) -> Inputs:
    return [of_tensor(found.t) for found in node.attribute if found.name == "value"]


def _constant_of_shape(node: Any, inputs: Inputs) -> Inputs:
    filled = _constant(node, inputs)
    return [Value(filled[0].dtype if filled else "float32", inputs[0].content)]


def _shape(node: Any, inputs: Inputs) -> Inputs:
    shape = inputs[0].shape
    if shape is None:
        return [Value("int64", (None,))]
    part = shape[attribute(node, "start", 0) : attribute(node, "end", len(shape))]
    return [Value("int64", (len(part),), part)]


def _range(_node: Any, inputs: Inputs) -> Inputs:
    start, limit, delta = (value.content[0] if value.content else None for value in inputs)
    if start is None or limit is None or not delta:
        return [Value(inputs[0].dtype, (None,))]
    content = tuple(range(start, limit, delta))
    return [Value("int64", (len(content),), content)]


def _reshape(node: Any, inputs: Inputs) -> Inputs:
    data, target = inputs[0], _elements(inputs[1])
    if target is None:
        return [Value(data.dtype)]
    keep = not attribute(node, "allowzero", 0)
    shape: list[int | None] = []
    for axis, size in enumerate(target):
        if size == 0 and keep:
            shape.append(data.shape[axis] if data.shape and axis < len(data.shape) else None)
        else:
            shape.append(None if size == -1 else size)
    if target.count(-1) == 1 and shape.count(None) == 1 and data.shape is not None and None not in data.shape:
        # The size -1 takes the remaining elements.
        whole, others = (prod(size for size in sizes if size is not None) for sizes in (data.shape, shape))
        shape[target.index(-1)] = whole // others if others else None
    return [Value(data.dtype, tuple(shape), data.content if len(shape) < 2 else None)]


def _axes(node: Any, inputs: Inputs) -> list[int] | None:
    """Return a node's axes: its second input or, before opset 13, its attribute; None if they are unknown."""
    if len(inputs) < 2:
        return ints(node, "axes")
    content = inputs[1].content
    return None if content is None or None in content else [axis for axis in content if axis is not None]


def _squeeze(node: Any, inputs: Inputs) -> Inputs:
    data, axes = inputs[0], _axes(node, inputs)
    if data.shape is None or axes is None:
        return [Value(data.dtype)]
    if not axes:
        if None in data.shape:
            return [Value(data.dtype)]
        shape = tuple(size for size in data.shape if size != 1)
    else:
        dropped = {axis % len(data.shape) for axis in axes}
        shape = tuple(size for axis, size in enumerate(data.shape) if axis not in dropped)
    return [Value(data.dtype, shape, data.content)]


def _unsqueeze(node: Any, inputs: Inputs) -> Inputs:
    data, axes = inputs[0], _axes(node, inputs)
    if data.shape is None or axes is None:
        return [Value(data.dtype)]
    rank = len(data.shape) + len(axes)
    rest, new = iter(data.shape), {axis % rank for axis in axes}
    shape = tuple(1 if axis in new else next(rest) for axis in range(rank))
    return [Value(data.dtype, shape, data.content if rank == 1 else None)]


def _transpose(node: Any, inputs: Inputs) -> Inputs:
    shape = inputs[0].shape
    if shape is None:
        return _same(node, inputs)
    perm = ints(node, "perm") or list(range(len(shape)))[::-1]
    return [Value(inputs[0].dtype, tuple(shape[axis] for axis in perm))]


def _concat(node: Any, inputs: Inputs) -> Inputs:
    shapes = [value.shape for value in inputs if value.shape is not None]
    if len(shapes) < len(inputs):
        return [Value(inputs[0].dtype)]
    axis = attribute(node, "axis", 0) % len(shapes[0])
    joined = [shape[axis] for shape in shapes]
    sizes = [next((shape[n] for shape in shapes if shape[n] is not None), None) for n in range(len(shapes[0]))]
    sizes[axis] = None if None in joined else sum(size for size in joined if size is not None)
    contents = [content for value in inputs if (content := _elements(value)) is not None]
    content = tuple(d for content in contents for d in content) if len(contents) == len(inputs) else None
    return [Value(inputs[0].dtype, tuple(sizes), content)]


def _split(node: Any, inputs: Inputs) -> Inputs:
    data, count = inputs[0], len(node.output)
    if data.shape is None:
        return [Value(data.dtype)] * count
    axis = attribute(node, "axis", 0) % len(data.shape)
    parts: Shape = (None,) * count
    if len(inputs) > 1 and inputs[1].content is not None:
        parts = inputs[1].content
    elif len(inputs) < 2 and (size := data.shape[axis]) is not None:
        each = ceil(size / count)
        parts = (*(each,) * (count - 1), size - each * (count - 1))
    return [Value(data.dtype, (*data.shape[:axis], part, *data.shape[axis + 1 :])) for part in parts]


def _slice(_node: Any, inputs: Inputs) -> Inputs:
    data, starts, ends = inputs[0], inputs[1].content, inputs[2].content
    if data.shape is None:
        return [Value(data.dtype)]
    axes = inputs[3].content if len(inputs) > 3 else tuple(range(len(starts or ())))
    steps = inputs[4].content if len(inputs) > 4 else (1,) * len(starts or ())
    if axes is None or None in axes:
        return [Value(data.dtype, (None,) * len(data.shape))]
    sizes = list(data.shape)
    for n, axis in enumerate(axes):
        bounds = [part[n] if part is not None else None for part in (starts, ends, steps)]
        size = sizes[axis or 0]
        known = size is not None and None not in bounds
        sizes[axis or 0] = len(range(size or 0)[slice(*bounds)]) if known else None
    return [Value(data.dtype, tuple(sizes))]


def _gather(node: Any, inputs: Inputs) -> Inputs:
    data, index = inputs
    if data.shape is None or index.shape is None:
        return [Value(data.dtype)]
    axis = attribute(node, "axis", 0) % len(data.shape)
    content = None
    if data.content is not None and index.content is not None and None not in index.content:
        content = tuple(data.content[place] for place in index.content if place is not None)
    return [Value(data.dtype, (*data.shape[:axis], *index.shape, *data.shape[axis + 1 :]), content)]


def _gather_elements(_node: Any, inputs: Inputs) -> Inputs:
    return [Value(inputs[0].dtype, inputs[1].shape)]


def _expand(_node: Any, inputs: Inputs) -> Inputs:
    return [Value(inputs[0].dtype, broadcast(inputs[0].shape, inputs[1].content))]


def _keep_rank(_node: Any, inputs: Inputs) -> Inputs:
    """Return the rank only, for Pad, Tile and pooling."""
    shape = inputs[0].shape
    return [Value(inputs[0].dtype, None if shape is None else (None,) * len(shape))]


def _matmul(_node: Any, inputs: Inputs) -> Inputs:
    a, b = inputs[0].shape, inputs[1].shape
    if a is None or b is None or min(len(a), len(b)) < 2:
        return [Value(inputs[0].dtype)]
    rows = broadcast(a[:-2], b[:-2])
    return [Value(inputs[0].dtype, (*(rows or ()), a[-2], b[-1]))]


def _gemm(node: Any, inputs: Inputs) -> Inputs:
    a, b = inputs[0].shape, inputs[1].shape
    if a is None or b is None:
        return [Value(inputs[0].dtype)]
    return [Value(inputs[0].dtype, (a[attribute(node, "transA", 0)], b[1 - attribute(node, "transB", 0)]))]


def _conv(node: Any, inputs: Inputs) -> Inputs:
    x, weight = inputs[0].shape, inputs[1].shape
    if x is None:
        return [Value(inputs[0].dtype)]
    channels = None
    if weight is not None and node.op_type == "Conv":
        channels = weight[0]
    elif weight is not None and weight[1] is not None:
        channels = weight[1] * attribute(node, "group", 1)
    return [Value(inputs[0].dtype, (x[0], channels, *(None,) * (len(x) - 2)))]


def _reduce(node: Any, inputs: Inputs) -> Inputs:
    arg = node.op_type in ("ArgMax", "ArgMin")
    dtype = "int64" if arg else inputs[0].dtype
    shape, axes = inputs[0].shape, [attribute(node, "axis", 0)] if arg else _axes(node, inputs)
    if shape is None or axes is None:
        return [Value(dtype)]
    if not axes and attribute(node, "noop_with_empty_axes", 0):
        return [Value(dtype, shape)]
    gone = {axis % len(shape) for axis in axes} if axes else set(range(len(shape)))
    keep = attribute(node, "keepdims", 1)
    return [Value(dtype, tuple(1 if n in gone else size for n, size in enumerate(shape) if keep or n not in gone))]


def _top_k(node: Any, inputs: Inputs) -> Inputs:
    data, k = inputs[0], inputs[1].content
    if data.shape is None:
        return [Value(data.dtype), Value("int64")]
    axis = attribute(node, "axis", -1) % len(data.shape)
    shape = (*data.shape[:axis], k[0] if k else None, *data.shape[axis + 1 :])
    return [Value(data.dtype, shape), Value("int64", shape)]


def _attention(_node: Any, inputs: Inputs) -> Inputs:
    q, v = inputs[0].shape, inputs[2].shape
    known = q is not None and v is not None and len(q) == len(v) == 4
    return [Value(inputs[0].dtype, (*q[:3], v[3]) if known and q and v else None)]


def _dequantize(node: Any, inputs: Inputs) -> Inputs:
    code = attribute(node, "output_dtype", 0)
    return [Value(dtype_name(code) if code else inputs[1].dtype, inputs[0].shape)]


_GROUPS: dict[Callable[[Any, Inputs], Inputs], str] = {
    _same: "Abs Ceil Clip Cos CumSum Elu Erf Exp Floor Gelu Identity LayerNormalization LeakyRelu Log LogSoftmax Neg Not "
    "Reciprocal Relu RMSNormalization RotaryEmbedding Round ScatterElements ScatterND Sigmoid Sign Sin Softmax Softplus Sqrt "
    "Swish Tan Tanh TensorScatter",
    _elementwise: "Add And Div Max Min Mod Mul Or Pow Sub Xor",
    _comparison: "Equal Greater GreaterOrEqual Less LessOrEqual IsNaN IsInf",
    _where: "Where",
    _cast: "Cast",
    _constant_of_shape: "ConstantOfShape",
    _shape: "Shape",
    _range: "Range",
    _reshape: "Reshape",
    _squeeze: "Squeeze",
    _unsqueeze: "Unsqueeze",
    _transpose: "Transpose",
    _concat: "Concat",
    _split: "Split",
    _slice: "Slice",
    _gather: "Gather",
    _gather_elements: "GatherElements",
    _expand: "Expand",
    _keep_rank: "Pad Tile",
    _matmul: "MatMul",
    _gemm: "Gemm",
    _conv: "Conv ConvTranspose",
    _reduce: "ArgMax ArgMin ReduceL1 ReduceL2 ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare",
    _top_k: "TopK",
    _attention: "Attention",
    _dequantize: "DequantizeLinear",
}
_INFER = {op_type: rule for rule, names in _GROUPS.items() for op_type in names.split()}
