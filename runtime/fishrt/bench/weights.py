"""How many bytes of weights one run of a graph reads."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from fishrt_engines.onnx_proto import message

# By ONNX's number of the type: bytes of an element while computing, floats but float64 aside.
_BYTES = {3: 1.0, 2: 1.0, 21: 0.5, 22: 0.5, 7: 8.0, 6: 4.0, 9: 1.0, 11: 8.0}
# Inputs of which a run takes a few rows only: embeddings, and the cosines and sines of positions.
_TABLES = {"Gather": (0,), "RotaryEmbedding": (1, 2)}


def bytes_read(graph: Path, float_bytes: float = 4.0) -> int:
    """Of every constant of a graph file but tables. Nothing is read but the description of the graph.

    float_bytes: what a float takes while computing: a CPU casts those of 16 bits to float32 when the graph is loaded.
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
