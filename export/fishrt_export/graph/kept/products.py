"""How products read stored integers: through a DequantizeLinear, with offsets and the order of their inputs beside it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from fishrt.bundle.quantisation import OFFSETS

from .tables import value_of


def read_integers(
    graph: ir.Graph,
    value: ir.Value,
    tensors: Sequence[ir.TensorProtocol],
    biases: ir.TensorProtocol | None,
    order: ir.TensorProtocol | None,
    mark: dict[str, str] | None = None,
) -> None:
    """Make the readers of an initialiser read stored integers, their scales and their zeros through a DequantizeLinear.

    mark: of that node. order: of the inputs; what the readers multiply goes through a Gather. biases: see kept/blocks.py.
    """
    name, block = value.name or "", tensors[0].shape.numpy()[0] // tensors[1].shape.numpy()[0]
    parts = [value_of(tensor) for tensor in tensors]
    attributes = {"axis": 0, "block_size": block}
    widen = ir.node("DequantizeLinear", parts, attributes, name=f"{name}.dequantize", metadata_props=mark)
    widen.outputs[0].name = f"{name}.float32"
    graph.insert_before(graph[0], widen)
    products = [product for node, _ in list(value.uses()) for product in read_transposed(graph, node, widen.outputs[0])]
    if order is not None:
        places = value_of(order)
        parts.append(places)
        for product in products:
            gather = ir.node("Gather", [product.inputs[0], places], {"axis": -1}, name=f"{product.name}.in_order")
            gather.outputs[0].name = f"{product.outputs[0].name}.in_order"
            graph.insert_before(product, gather)
            product.replace_input_with(0, gather.outputs[0])
    if biases is not None:
        parts.append(value_of(biases))
        parts += _add_biases(graph, products, parts[-1], tensors[0].shape.numpy()[0])
    graph.initializers.pop(name)
    for part in parts:
        graph.register_initializer(part)


def _add_biases(graph: ir.Graph, products: Sequence[ir.Node], biases: ir.Value, inputs: int) -> list[ir.Value]:
    """Add the biases of groups, times the sums of each group's inputs, to products. Return new initialisers."""
    assert biases.shape is not None
    name, count = biases.name or "", biases.shape.numpy()[0]
    apart, last = (
        value_of(ir.tensor(np.array(numbers, np.int64), name=f"{name}.{what}"))
        for what, numbers in (("shape", [-1, count, inputs // count]), ("axis", [-1]))
    )
    for product in products:
        result = product.outputs[0]
        readers = list(result.uses())
        tape = ir.tape.Tape()
        groups = tape.op("Reshape", [product.inputs[0], apart])
        sums = tape.op("ReduceSum", [groups, last], {"keepdims": 0})
        added = tape.op("Reshape", [tape.op("MatMul", [sums, biases]), tape.op("Shape", [result])])
        total = tape.op("Add", [result, added])
        for n, node in enumerate(tape.nodes):
            node.outputs[0].name = f"{result.name}.{name}.{n}"
        tape.nodes[-1].metadata_props[OFFSETS] = ""
        for node, index in readers:
            node.replace_input_with(index, total)
        for n, output in enumerate(graph.outputs):
            if output is result:
                total.name, result.name = result.name, f"{result.name}.product"
                total.shape, total.type = result.shape, result.type
                graph.outputs[n] = total
        graph.insert_after(product, tape.nodes)
    return [apart, last]


def read_transposed(graph: ir.Graph, node: ir.Node, weight: ir.Value) -> list[ir.Node]:
    """Connect the reader of a transposed weight [outputs, inputs] to `weight` [inputs, outputs], and drop the transposition.

    Return the products.
    """
    if node.op_type == "Transpose":
        readers = list(node.outputs[0].uses())
        for reader, index in readers:
            reader.replace_input_with(index, weight)
        graph.remove(node, safe=True)
        return [reader for reader, _ in readers]
    assert node.op_type == "Gemm", node
    assert node.attributes.get_int("transB", 0) == 1, node
    x, _, *bias = node.inputs
    nodes = [ir.node("MatMul", [x, weight])]
    if bias:
        nodes.append(ir.node("Add", [nodes[0].outputs[0], bias[0]]))
        nodes[0].outputs[0].name = f"{weight.name}.product"
    ir.convenience.replace_nodes_and_values(graph, node, [node], nodes, node.outputs, nodes[-1].outputs)
    return nodes[:1]
