"""Embedding tables of a checkpoint's integers: a lookup takes rows of the integers and of their scales, and widens those.

table[id] = integers[id] · scales[id] + biases[id]        a scale for each group of neighbours in a row
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from torch import Tensor

from ...checkpoint.quantised.integers import Integers

GROUPS = ".groups"
"""Suffix of a table's name for the group of each number of a row."""


def table_parts(found: Integers) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Return int8 [rows, width], and scales and biases float32 [rows, groups]; None if the integers are of another kind."""
    width, groups = found.values.shape[1], found.scales.shape[1]
    if found.zeros is not None or found.groups is not None or width % groups:
        return None
    return found.values, found.scales, found.shift()


def value_of(tensor: ir.TensorProtocol) -> ir.Value:
    """Return the value of a tensor, to be an initialiser."""
    return ir.Value(name=tensor.name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor)


def only_looked_up(value: ir.Value) -> bool:
    """Return whether all readers of an initialiser look up its rows."""
    return all(node.op_type == "Gather" and index == 0 and not node.attributes.get_int("axis", 0) for node, index in value.uses())


def read_rows(graph: ir.Graph, value: ir.Value, tensors: Mapping[str, ir.TensorProtocol]) -> None:
    """Make lookups in an initialiser take rows of stored integers.

    tensors: "integers", "scales", and "biases" if there are any.
    """
    parts = {what: value_of(tensor) for what, tensor in tensors.items()}
    width, groups = tensors["integers"].shape.numpy()[1], tensors["scales"].shape.numpy()[1]
    group_of = np.arange(width, dtype=np.int64) // (width // groups)
    spread = value_of(ir.tensor(group_of, name=f"{value.name}{GROUPS}"))
    for lookup, _ in list(value.uses()):
        ids, found, tape = lookup.inputs[1], lookup.outputs[0], ir.tape.Tape()
        rows = tape.op("Cast", [tape.op("Gather", [parts["integers"], ids])], {"to": ir.DataType.FLOAT})
        widened = tape.op("Mul", [rows, _spread(tape, parts["scales"], ids, spread)])
        if "biases" in parts:
            widened = tape.op("Add", [widened, _spread(tape, parts["biases"], ids, spread)])
        for n, node in enumerate(tape.nodes):
            node.outputs[0].name = f"{found.name}.rows.{n}"
        for node, index in list(found.uses()):
            node.replace_input_with(index, widened)
        graph.insert_after(lookup, tape.nodes)
        graph.remove(lookup, safe=True)
    graph.initializers.pop(value.name or "")
    for part in (*parts.values(), spread):
        graph.register_initializer(part)


def _spread(tape: ir.tape.Tape, table: ir.Value, ids: ir.Value | None, spread: ir.Value) -> ir.Value:
    """Return the numbers of each row's groups, repeated for their members."""
    found: ir.Value = tape.op("Gather", [tape.op("Gather", [table, ids]), spread], {"axis": -1})
    return found
