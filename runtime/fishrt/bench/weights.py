"""The bytes of weights that one run of a graph reads."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from fishrt_engines.rewrite.onnx_proto import message

# Bytes of an element during the computation, by ONNX's number of the type; `float_bytes` for all types that are not here.
_BYTES = {3: 1.0, 2: 1.0, 21: 0.5, 22: 0.5, 7: 8.0, 6: 4.0, 9: 1.0, 11: 8.0}
# Inputs of which a run reads a few rows only: embeddings, and the cosines and sines of positions.
_TABLES = {"Gather": (0,), "RotaryEmbedding": (1, 2)}


def bytes_read(graph: Path, float_bytes: float = 4.0) -> int:
    """Return the bytes of every constant of a graph file except tables. Only the graph is read, not its weights.

    float_bytes: size of a float during the computation; a CPU casts those of 16 bits to float32 when it loads the graph.
    """
    model: Any = message("Model").FromString(graph.read_bytes())
    stored = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "Cast"}
    whole = {
        stored.get(name, name)
        for node in model.graph.node
        if node.op_type != "Cast"
        for place, name in enumerate(node.input)
        if place not in _TABLES.get(node.op_type, ())
    }
    constants = [constant for constant in model.graph.initializer if constant.name in whole]
    return int(sum(math.prod(constant.dims) * _BYTES.get(constant.data_type, float_bytes) for constant in constants))
