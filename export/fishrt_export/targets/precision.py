"""Conversion of a graph from float32 to float16 or bfloat16, and products with weights as a device reads them best.

For devices with products in 16 bits, `compute_in` converts

    feeds and results                                        unchanged
    state                                                    stored in the new type
    matrix products, attention, rotary positions, caches,
    and the operators between them                           in the new type
    all else (embedding sums, sampling)                      in float32

In bfloat16, the residual stream is in the new type, too, as the models were trained. In float16, it stays in float32 with its
norms: it can exceed 65,504, the largest float16. Weights stay in their file: a Cast widens or rounds them once, when the graph is
loaded. The scales of quantised weights are rounded here, since the type of a scale is that of the computation.

ONNX Runtime fuses DequantizeLinear and MatMul into MatMulNBits itself, but only if nothing else reads the weights. It expands
shared weights in every run, and has no CUDA kernel that expands blocks of 8 bits. `share_weights` makes all products with the
same weights, as in the frame graph, share one packed copy of them:

    [K, N], blocks along K ─► uint8 [N, blocks, bytes of a block], shifted from signed to unsigned

Weights that are not quantised are stored as [N, K], and ONNX Runtime makes a transposed copy of each before it copies that to a
device. `keep_layout` makes the products read them as they are stored.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from fishrt.bundle.quantisation import OFFSETS

from ..errors import ExportError
from .edit import MICROSOFT, infer, initializer, is_constant, numbers, producer, tidy

DTYPES = {"float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}
_ALWAYS = ("Attention", "Gemm", "MatMul", "RotaryEmbedding", "TensorScatter")
_MOVE = ("Concat", "Expand", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze")
"""Operators that only move values."""
_FOLLOW = (*_MOVE, "Mul", "RMSNormalization", "Sigmoid")
"""Operators that are computed in the type of their input. A norm always sums in float32, its stash_type."""
_BITS = {ir.DataType.INT4: 4, ir.DataType.INT8: 8}


def compute_in(model: ir.Model, dtype: str) -> None:
    """Compute a graph in `dtype`, float16 or bfloat16, in place. Raises ExportError for another dtype."""
    if dtype not in DTYPES:
        raise ExportError(f"graphs cannot be computed in {dtype!r}", hint="choose float16 or bfloat16")
    infer(model)
    _Lowering(model.graph, DTYPES[dtype]).run()
    tidy(model)


class _Lowering:
    """The conversion of one graph. The dtype of a value says at any time whether it is converted."""

    def __init__(self, graph: ir.Graph, low: ir.DataType) -> None:
        self._graph, self._low = graph, low
        self._casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def run(self) -> None:
        nodes = list(self._graph)
        for node in nodes:
            if node.op_type == "TensorScatter" and (cache := node.inputs[0]) is not None and cache.is_graph_input():
                cache.dtype = self._low
            if node.op_type == "DequantizeLinear":
                self._round_scales(node)
        for node in nodes:
            self._convert(node)
        self._restore_results()

    def _round_scales(self, node: ir.Node) -> None:
        scale = node.inputs[1]
        assert scale is not None
        if scale.dtype == ir.DataType.FLOAT:
            scale.const_value = ir.tensor(numbers(scale).astype(self._low.numpy()), name=scale.name)
            scale.dtype = self._low
        node.outputs[0].dtype = self._low

    def _convert(self, node: ir.Node) -> None:
        floats = [value for value in node.inputs if value is not None and value.dtype in (ir.DataType.FLOAT, self._low)]
        if node.op_type in ("Cast", "DequantizeLinear") or not floats:
            return
        wanted = self._low if self._is_low(node, floats) else ir.DataType.FLOAT
        for at, value in enumerate(node.inputs):
            if value in floats:
                node.replace_input_with(at, self._in(node, value, wanted))
        for value in node.outputs:
            if value.dtype == ir.DataType.FLOAT:
                value.dtype = wanted

    def _is_low(self, node: ir.Node, floats: list[ir.Value]) -> bool:
        if node.op_type in _ALWAYS:
            return True
        if node.op_type == "Transpose" and is_constant(node.inputs[0]):
            return all(reader.op_type in _ALWAYS for reader in node.outputs[0].consumers())
        if node.op_type == "Add":
            # A bias and offsets have the type of their product; a residual sum stays in float32 with float16.
            activations = [value for value in floats if not is_constant(value)]
            if self._low == ir.DataType.FLOAT16 and len(activations) > 1 and OFFSETS not in node.metadata_props:
                return False
            return any(value.dtype == self._low for value in activations)
        return node.op_type in _FOLLOW and any(value.dtype == self._low for value in floats)

    def _in(self, node: ir.Node, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Return a value after a cast to `dtype`. Inserts the Cast before `node` if it is new."""
        if value.dtype == dtype:
            return value
        widened = producer(value, "Cast") if value.dtype == ir.DataType.FLOAT else None
        if widened is not None and is_constant(value):
            value = widened.inputs[0]  # type: ignore[assignment]  # one cast from the stored type, not two
            if value.dtype == dtype:
                return value
        if (value, dtype) not in self._casts:
            cast = ir.node("Cast", [value], {"to": dtype})
            self._graph.insert_before(node, cast)
            cast.outputs[0].dtype = dtype
            self._casts[value, dtype] = cast.outputs[0]
        return self._casts[value, dtype]

    def _restore_results(self) -> None:
        """Cast all outputs but states to float32."""
        for n, value in enumerate(self._graph.outputs):
            state = producer(value, "TensorScatter")
            if value.dtype == self._low and not (state and state.inputs[0] in self._graph.inputs):
                cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT})
                result = cast.outputs[0]
                result.name, result.shape, result.type = value.name, value.shape, ir.TensorType(ir.DataType.FLOAT)
                value.name = f"{value.name}.low"
                self._graph.outputs[n] = result
                self._graph.append(cast)


def keep_layout(model: ir.Model) -> None:
    """Make products with transposed weights read the weights themselves, in place."""
    for product in [node for node in model.graph if node.op_type == "MatMul"]:
        turned = producer(product.inputs[1], "Transpose")
        if turned is None or not is_constant(turned.inputs[0]) or turned.attributes.get_ints("perm") != (1, 0):
            continue
        made = ir.node("FusedMatMul", [product.inputs[0], turned.inputs[0]], {"transB": 1}, domain=MICROSOFT)
        ir.convenience.replace_nodes_and_values(model.graph, product, [product], [made], product.outputs, made.outputs)
    model.opset_imports[MICROSOFT] = 1
    tidy(model)


def share_weights(model: ir.Model) -> None:
    """Fuse products that share quantised weights, in place. The packed weights are made when the graph is saved.

    Weights with zero points, or with scales of another form than fishrt's exports, stay unchanged.
    """
    for node in list(model.graph):
        readers = node.outputs[0].consumers() if node.op_type == "DequantizeLinear" else ()
        products = all(reader.op_type == "MatMul" and reader.inputs[1] is node.outputs[0] for reader in readers)
        if len(readers) > 1 and products and _is_ours(node):
            _fuse(model.graph, node, readers)
    model.opset_imports[MICROSOFT] = 1
    tidy(model)


def _is_ours(node: ir.Node) -> bool:
    """Return whether weights are signed integers [K, N] with one scale for `block_size` rows, without zero points."""
    block = node.attributes.get_int("block_size", 0)
    if len(node.inputs) != 2 or not block or node.attributes.get_int("axis", 1) != 0:
        return False
    weights, scales = (None if value is None else value.const_value for value in node.inputs)
    if weights is None or scales is None or weights.dtype not in _BITS:
        return False
    rows, outputs = weights.shape.numpy()
    return scales.shape.numpy() == (rows / block, outputs)


def _fuse(graph: ir.Graph, node: ir.Node, products: Sequence[ir.Node]) -> None:
    weights, scales = node.inputs
    assert weights is not None
    assert weights.const_value is not None
    assert scales is not None
    (inputs, outputs), bits = weights.const_value.shape.numpy(), _BITS[weights.const_value.dtype]
    block = node.attributes.get_int("block_size", 0)
    shape = (outputs, inputs // block, block * bits // 8)

    def packed() -> ir.TensorProtocol:
        return ir.tensor(_packed(numbers(weights), bits).reshape(shape))

    turned = ir.tensor(np.ascontiguousarray(numbers(scales).T), name=f"{scales.name}.turned")
    shared = [
        initializer(graph, ir.LazyTensor(packed, ir.DataType.UINT8, ir.Shape(shape), name=f"{weights.name}.packed")),
        initializer(graph, turned),
    ]
    for product in products:
        made = ir.node(
            "MatMulNBits",
            [product.inputs[0], *shared],
            {"K": inputs, "N": outputs, "bits": bits, "block_size": block},
            domain=MICROSOFT,
        )
        ir.convenience.replace_nodes_and_values(graph, product, [product], [made], product.outputs, made.outputs)


def _packed(integers: npt.NDArray[np.generic], bits: int) -> npt.NDArray[np.uint8]:
    """Return signed integers [K, N] as unsigned ones, uint8 [N, K · bits / 8]. The lower half of a byte is first."""
    rows: npt.NDArray[np.uint8] = (integers.astype(np.int8).T + np.int8(-128 if bits == 8 else 8)).view(np.uint8)
    return rows if bits == 8 else rows[:, ::2] | rows[:, 1::2] * np.uint8(16)
