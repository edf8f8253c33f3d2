"""Products with codes of a table, NF4 or FP4, by ONNX Runtime's MatMulBnb4, which widens a weight only while it multiplies by it.

The operator reads the codes and the largest number of each block as they are stored. In 16 bits, the largest numbers are rounded,
since they have the type of the activations.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from fishrt.bundle.quantisation import LEVELS

from .edit import MICROSOFT, Weight, constant, initializer, numbers, tidy

_TYPES = {"fp4": 0, "nf4": 1}
"""The operator's numbers of the tables."""


def multiply_levels(model: ir.Model) -> bool:
    """Replace the products with such weights, in place; see graph/kept/levels.py. Return whether there are any."""
    graph = model.graph
    marked = [(node, kind) for node in graph for kind in LEVELS if kind in node.metadata_props]
    for node, kind in marked:
        scaled = _before(_before(node))
        stored, scales = _before(_before(scaled), 1).inputs[0], scaled.inputs[1]
        assert stored is not None
        assert stored.shape is not None
        assert scales is not None
        outputs, blocks, half = stored.shape.numpy()
        codes, largest = _flat(graph, stored), _flat(graph, scales)
        attributes = {"K": 2 * half * blocks, "N": outputs, "block_size": 2 * half, "quant_type": _TYPES[kind]}
        readers = list(node.outputs[0].consumers())
        casts = [reader for reader in readers if reader.op_type == "Cast"]  # to 16 bits
        halves = [product for cast in casts for product in cast.outputs[0].consumers()]
        for product in (*(reader for reader in readers if reader not in casts), *halves):
            block_scales = _in_16_bits(graph, largest) if product in halves else largest
            made = ir.node("MatMulBnb4", [product.inputs[0], codes, block_scales], attributes, domain=MICROSOFT)
            ir.convenience.replace_nodes_and_values(graph, product, [product], [made], product.outputs, made.outputs)
    model.opset_imports[MICROSOFT] = 1
    tidy(model)
    return bool(marked)


def _before(node: ir.Node, place: int = 0) -> ir.Node:
    """Return the node that produces an input."""
    value = node.inputs[place]
    found = None if value is None else value.producer()
    assert found is not None
    return found


def _flat(graph: ir.Graph, value: ir.Value) -> ir.Value:
    """Return the same numbers on one axis, as the operator takes them."""
    name, tensor = f"{value.name}.flat", value.const_value
    if name in graph.initializers:
        return graph.initializers[name]
    if not isinstance(tensor, ir.ExternalTensor):
        return constant(graph, name, numbers(value).ravel())
    place = tensor.location, tensor.offset, tensor.length, tensor.dtype
    return initializer(graph, Weight(*place, shape=ir.Shape([tensor.size]), name=name, base_dir=tensor.base_dir))


def _in_16_bits(graph: ir.Graph, largest: ir.Value) -> ir.Value:
    """Return the initialiser of the largest numbers in float16."""
    return constant(graph, f"{largest.name}.float16", numbers(largest), np.float16)
