"""Graph files as ONNX Runtime on the CPU runs them, with the state carried from call to call."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from fishrt_engines import Array
from fishrt_engines.engine import GraphSpec


class Calls:
    """Successive calls of one graph file on a state of the sizes `dims`, which begins with zeros.

    spec: of the portable graph; the state may be of another type, and `rows` is the feed of a form that has such an input.
    """

    def __init__(self, path: Path, spec: GraphSpec, **dims: int) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")  # else activations are rounded to 8 bits
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        types = {i.name: np.float16 if i.type == "tensor(float16)" else np.float32 for i in self._session.get_inputs()}
        self._spec, self.state = spec, {t.name: np.zeros(t.resolve(dims), types[t.name]) for t in spec.state_tensors}

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Return the results of a call."""
        names = [output.name for output in self._session.get_outputs()]
        made = dict(zip(names, self._session.run(None, {**feeds, **self.state}), strict=True))
        for pair in self._spec.states:
            self.state[pair.input] = made.pop(pair.output)
        return made


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
