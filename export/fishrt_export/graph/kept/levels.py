"""Weights of a checkpoint that name numbers of a table, in standard operators.

    codes uint8 [outputs, blocks, block / 2] ─ Cast ─ Gather ─ Mul by the largest [outputs, blocks, 1, 1] ─ Reshape ─ Transpose

A byte has two codes, the first in its high half, and is the index of a pair of the table's numbers. The last node has a mark, by
which targets/levels.py finds the products. Codes have several axes, since ONNX takes an integer vector for a shape: to infer the
shapes of a graph, it would make an object of a hundred bytes of each number.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from fishrt.bundle.quantisation import LEVELS

from ...checkpoint.quantised.levels import TABLES
from .products import read_transposed
from .tables import value_of

LARGEST = {kind: f".{kind}" for kind in LEVELS}
"""By precision, the suffix of a weight's name for the initialiser of the largest number of each block."""


def read_levels(graph: ir.Graph, value: ir.Value, codes: ir.TensorProtocol, largest: ir.TensorProtocol, kind: str) -> None:
    """Make the readers of an initialiser [outputs, inputs] read stored codes."""
    assert value.shape is not None
    table = np.array(TABLES[kind], np.float32)
    constants = {
        f"{kind}.pairs": np.stack((table.repeat(16), np.tile(table, 16)), axis=1),
        f"{codes.name}.shape": np.array(value.shape.numpy()),
    }
    graph.initializers.pop(value.name or "")
    for tensor in (codes, largest, *(ir.tensor(numbers, name=name) for name, numbers in constants.items())):
        if tensor.name not in graph.initializers:
            graph.register_initializer(value_of(tensor))
    pairs, whole = (graph.initializers[name] for name in constants)
    stored, scales = (graph.initializers[str(tensor.name)] for tensor in (codes, largest))
    tape = ir.tape.Tape()
    scaled = tape.op("Mul", [tape.op("Gather", [pairs, tape.op("Cast", [stored], {"to": ir.DataType.INT32})]), scales])
    turned = ir.node("Transpose", [tape.op("Reshape", [scaled, whole])], {"perm": [1, 0]}, metadata_props={kind: ""})
    nodes = [*tape.nodes, turned]
    for n, node in enumerate(nodes):
        node.outputs[0].name = f"{codes.name}.widened.{n}"
    graph.insert_before(graph[0], nodes)
    for node, _ in list(value.uses()):
        read_transposed(graph, node, turned.outputs[0])
