"""Products of integers on a CPU: weights in 8 bits with a scale for each column, activations in 8 bits with one for each row.

    x [..., K] ─┬─ Abs ─ ReduceMax = m [..., 1] ───────────────────────────────┐
                └─ Div by m ─ QuantizeLinear ─ MatMulIntegerToFloat [..., N] ─ Mul

Sums of integers are exact, and the scale of a row depends on this row alone: a row gives the same bits alone and in any batch, on
every CPU. The weights of `quantise.quantise_columns` do not overflow 16 bits, in which a CPU without VNNI adds pairs of products.

A row of zeros is divided by zero. Whatever integers come of that, they are multiplied by m = 0.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from fishrt.bundle.quantisation import ROWS

from .edit import MICROSOFT, constant, initializer, numbers, tidy

_LARGEST, _ZERO = 127, 128
"""Largest magnitude of an activation's integer, and what is added to store it without a sign: the fast kernels multiply unsigned
activations by signed weights."""


def multiply_rows(model: ir.Model) -> None:
    """Replace the products with weights of the precision ROWS, in place."""
    graph = model.graph
    step = constant(graph, "rows.step", 1 / _LARGEST, np.float32)
    zero = constant(graph, "rows.zero", _ZERO, np.uint8)
    last = constant(graph, "rows.last", [-1], np.int64)
    rounded: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
    for node in list(graph):
        if ROWS not in node.metadata_props:
            continue
        weights, scales = node.inputs
        assert scales is not None
        columns = initializer(graph, ir.tensor(numbers(scales)[0].copy(), name=f"{scales.name}.columns"))
        for product in node.outputs[0].consumers():
            x = product.inputs[0]
            assert x is not None
            tape = ir.tape.Tape()
            if x not in rounded:  # products with the same activations share their integers
                largest = tape.op("ReduceMax", [tape.op("Abs", [x]), last], {"keepdims": 1})
                integers = tape.op("QuantizeLinear", [tape.op("Div", [x, largest]), step, zero])
                rounded[x] = integers, largest
            integers, largest = rounded[x]
            inputs = [integers, weights, step, columns, zero]
            made = tape.op("Mul", [tape.op("MatMulIntegerToFloat", inputs, domain=MICROSOFT), largest])
            ir.convenience.replace_nodes_and_values(graph, product, [product], tape.nodes, product.outputs, [made])
    model.opset_imports[MICROSOFT] = 1
    tidy(model)
