"""Graph files as ONNX Runtime on the CPU runs them, with the state carried from call to call."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

from fishrt_engines import Array
from fishrt_engines.engine import GraphSpec
from fishrt_export.targets.edit import constant

FIRST_NORM = 14
"""The first of the two inputs of GroupQueryAttention that norm queries and keys."""


class Calls:
    """Successive calls of one graph file on a state of the sizes `dims`, which begins with zeros.

    spec: of the portable graph; the state may be of another type, and `rows` is the feed of a form that has such an input.
    """

    def __init__(self, path: Path, spec: GraphSpec, **dims: int) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")  # else activations are rounded to 8 bits
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
        self._session = onnxruntime.InferenceSession(norms_apart(path.read_bytes()), options, providers=["CPUExecutionProvider"])
        types = {i.name: np.float16 if i.type == "tensor(float16)" else np.float32 for i in self._session.get_inputs()}
        self._spec, self.state = spec, {t.name: np.zeros(t.resolve(dims), types[t.name]) for t in spec.state_tensors}

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Return the results of a call."""
        names = [output.name for output in self._session.get_outputs()]
        made = dict(zip(names, self._session.run(None, {**feeds, **self.state}), strict=True))
        for pair in self._spec.states:
            self.state[pair.input] = made.pop(pair.output)
        return made


def norms_apart(data: bytes) -> bytes:
    """Return a graph in which queries and keys are normed before the attention: on a CPU, ONNX Runtime refuses norms in it."""
    if b"qk_norm_epsilon" not in data:
        return data
    model = ir.from_proto(onnx.ModelProto.FromString(data))
    for node in list(model.graph):
        if node.op_type != "GroupQueryAttention" or len(node.inputs) <= FIRST_NORM:
            continue
        queries, keys = (node.attributes.get_int(name, 0) for name in ("num_heads", "kv_num_heads"))
        epsilon = {"epsilon": node.attributes.pop("qk_norm_epsilon").as_float()}
        tape = ir.tape.Tape()
        apart = constant(model.graph, f"apart.{queries}.{keys}", [0, 0, queries + 2 * keys, -1], np.int64)
        heads = constant(model.graph, f"heads.{queries}.{keys}", [queries, keys, keys], np.int64)
        together = constant(model.graph, "together", [0, 0, -1], np.int64)
        split = tape.op_multi_out("Split", [tape.op("Reshape", [node.inputs[0], apart]), heads], {"axis": 2}, num_outputs=3)
        weights = node.inputs[FIRST_NORM:]
        normed = [tape.op("RMSNormalization", pair, epsilon) for pair in zip(split, weights, strict=False)]
        node.resize_inputs(9)
        for at, value in enumerate([*normed, split[2]]):
            node.replace_input_with(at, tape.op("Reshape", [value, together]))
        model.graph.insert_before(node, tape.nodes)
    return ir.to_proto(model).SerializeToString()


def copied(path: Path, folder: Path) -> Path:
    """Return a copy of a graph and its weights: the shared bundle is not written to."""
    shutil.copy(path.with_name(f"{path.name}.data"), folder)
    return Path(shutil.copy(path, folder))


def operators(path: Path) -> Counter[str]:
    """Return the number of nodes of each operator in a graph file."""
    return Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)


def places(path: Path) -> dict[str, dict[str, str]]:
    """Return the place of each weight that is in another file than the graph."""
    tensors = onnx.load(path, load_external_data=False).graph.initializer
    return {t.name: {entry.key: entry.value for entry in t.external_data} for t in tensors if t.external_data}
