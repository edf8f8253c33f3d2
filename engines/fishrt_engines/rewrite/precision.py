"""Conversion of a graph from float32 to float16 or bfloat16, for devices with products in 16 bits.

    feeds and results                                        unchanged
    state                                                    stored in the new type
    matrix products, attention, rotary positions, caches,
    and the operators between them                           in the new type
    all else (embedding sums, sampling)                      in float32

In bfloat16, the residual stream is in the new type, too, as the models were trained. In float16, it stays in float32 with its
norms: it can exceed 65,504, the largest float16. Weights stay in their file: a Cast widens or rounds them once, when the graph is
loaded. The scales of quantised weights are rounded here, since the type of a scale is that of the computation.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..errors import GraphError
from ..ort.tensors import to_bytes
from .graph_edit import GraphEditor
from .graph_types import UNKNOWN, Value, infer
from .onnx_proto import CODES, message, node, parse_model, stored_bytes

_ALWAYS = ("Attention", "Gemm", "MatMul", "RotaryEmbedding", "TensorScatter")
_MOVE = ("Concat", "Expand", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze")
"""Operators that only move values."""
_FOLLOW = (*_MOVE, "Mul", "RMSNormalization", "Sigmoid")
"""Operators that are computed in the type of their input. A norm always sums in float32, its stash_type."""


def compute_in(model: bytes, dtype: str, folder: Path) -> bytes:
    """Return the bytes of a graph file that computes in `dtype`, float16 or bfloat16.

    folder: of the weights. Raises GraphError for another dtype.
    """
    if dtype not in ("float16", "bfloat16"):
        raise GraphError(f"graphs cannot be computed in {dtype!r}", hint="choose float16 or bfloat16")
    editor = GraphEditor(parse_model(model, "the graph"))
    return _Lowering(editor, dtype, folder).run()


class _Lowering:
    """The conversion of one graph. `self._low` holds the names of values that are in the new type."""

    def __init__(self, editor: GraphEditor, dtype: str, folder: Path) -> None:
        self._edit, self._dtype, self._folder = editor, dtype, folder
        self._values = infer(editor.graph)
        self._nodes: list[Any] = []
        self._low: set[str] = set()
        self._casts: dict[tuple[str, str], str] = {}

    def run(self) -> bytes:
        caches = {n.input[0]: n.output[0] for n in self._edit.nodes if n.op_type == "TensorScatter"}
        states = {before: after for before, after in caches.items() if before in self._edit.inputs}
        for name in states:
            self._declare(self._edit.inputs[name])
            self._low.add(name)
        self._round_scales()
        for n in self._edit.nodes:
            self._convert(n)
        self._restore_results(set(states.values()))
        self._edit.nodes = self._nodes
        return self._edit.finish()

    def _convert(self, n: Any) -> None:
        floats = [name for name in n.input if self._values.get(name, UNKNOWN).dtype == "float32"]
        wanted = self._dtype if floats and self._is_low(n, floats) else "float32"
        for at, name in enumerate(n.input):
            if name in floats:
                n.input[at] = self._in(name, wanted)
        if wanted == self._dtype:
            self._low.update(name for name in n.output if self._values.get(name, UNKNOWN).dtype == "float32")
        self._nodes.append(n)

    def _is_low(self, n: Any, floats: list[str]) -> bool:
        if n.op_type in _ALWAYS:
            return True
        if n.op_type == "Transpose" and self._edit.is_constant(n.input[0]):
            return all(reader.op_type in _ALWAYS for reader in self._edit.readers(n.output[0]))
        if n.op_type == "Add":
            # A bias has the type of its product; a residual sum stays in float32 with float16.
            activations = [name for name in floats if not self._edit.is_constant(name)]
            if self._dtype == "float16" and len(activations) > 1:
                return False
            return any(name in self._low for name in activations)
        return n.op_type in _FOLLOW and any(name in self._low for name in floats)

    def _in(self, name: str, dtype: str) -> str:
        """Return the name of a float32 value of the file after a cast to `dtype`. Adds the Cast node if it is new."""
        is_low = name in self._low
        if is_low == (dtype == self._dtype):
            return name
        maker = self._edit.made_by(name, "Cast")
        if not is_low and maker is not None and maker.input[0] in self._edit.constants:
            source = str(maker.input[0])  # one cast from the stored type, not two
            if self._values[source].dtype == dtype:
                return source
        else:
            source = name
        cast = self._casts.get((source, dtype))
        if cast is None:
            cast = self._casts[source, dtype] = f"{source}.in_{dtype}"
            self._nodes.append(node("Cast", [source], [cast], to=CODES[dtype]))
        return cast

    def _restore_results(self, states: set[str]) -> None:
        """Declare the outputs of states in the new type, and cast all other outputs to float32."""
        for name in self._edit.outputs.keys() & self._low:
            if name in states:
                self._declare(self._edit.outputs[name])
                continue
            inner = f"{name}.in_{self._dtype}"
            for n in self._nodes:
                n.input[:] = [inner if taken == name else taken for taken in n.input]
                n.output[:] = [inner if made == name else made for made in n.output]
            self._nodes.append(node("Cast", [inner], [name], to=CODES["float32"]))

    def _declare(self, value_info: Any) -> None:
        value_info.type.tensor_type.elem_type = CODES[self._dtype]

    def _round_scales(self) -> None:
        for n in self._edit.nodes:
            if n.op_type != "DequantizeLinear":
                continue
            scale = self._edit.constants[n.input[1]]
            if scale.data_type == CODES["float32"]:
                stored = np.frombuffer(stored_bytes(scale, self._folder), np.float32)
                raw = to_bytes(stored, self._dtype).tobytes()
                rounded = message("Tensor")(name=scale.name, data_type=CODES[self._dtype], dims=scale.dims, raw_data=raw)
                self._edit.constants[scale.name] = rounded
                self._values[scale.name] = Value(self._dtype, tuple(scale.dims))
            self._low.add(n.output[0])
