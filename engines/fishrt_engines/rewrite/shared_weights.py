"""Fusion of products that share quantised weights, as in the frame graph, into MatMulNBits.

ONNX Runtime fuses DequantizeLinear and MatMul into MatMulNBits itself, but only if nothing else reads the weights. It expands
shared weights in every run, and has no CUDA kernel that expands blocks of 8 bits. Here, all products with the same weights share
one packed copy of them:

    [K, N], blocks along K ─► uint8 [N, blocks, bytes of a block], shifted from signed to unsigned
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..engine import Array
from .attention import MICROSOFT
from .graph_edit import GraphEditor, attribute
from .onnx_proto import CODES, array_tensor, message, node, stored_bytes

_BITS = {CODES["int4"]: 4, CODES["int8"]: 8}


def share_weights(model: bytes, folder: Path) -> bytes:
    """Return the bytes of a graph file with shared products fused; packed weights are in the file, the others in `folder`.

    Weights with zero points, or with scales of another form than fishrt's exports, stay unchanged.
    """
    editor = GraphEditor(message("Model").FromString(model))
    for dequantize in [n for n in editor.nodes if n.op_type == "DequantizeLinear"]:
        readers = editor.readers(dequantize.output[0])
        products = all(n.op_type == "MatMul" and n.input[1] == dequantize.output[0] for n in readers)
        if len(readers) > 1 and products and _is_ours(dequantize, editor):
            _replace(editor, dequantize, readers, folder)
    editor.use_opset(MICROSOFT, 1)
    return editor.finish()


def _is_ours(dequantize: Any, editor: GraphEditor) -> bool:
    """Return whether weights are signed integers [K, N] with one scale for `block_size` rows, without zero points."""
    weights, scales = (editor.constants.get(name) for name in dequantize.input[:2])
    block = attribute(dequantize, "block_size", 0)
    return (
        len(dequantize.input) == 2
        and weights is not None
        and scales is not None
        and weights.data_type in _BITS
        and attribute(dequantize, "axis", 1) == 0
        and block > 0
        and list(scales.dims) == [weights.dims[0] / block, weights.dims[1]]
    )


def _replace(editor: GraphEditor, dequantize: Any, products: list[Any], folder: Path) -> None:
    weights, scales = (editor.constants[name] for name in dequantize.input)
    (inputs, outputs), block, bits = weights.dims, attribute(dequantize, "block_size", 0), _BITS[weights.data_type]
    packed = _packed(stored_bytes(weights, folder), inputs, outputs, bits).reshape(outputs, inputs // block, -1)
    shared = [editor.constant(array_tensor(f"{weights.name}.packed", packed))]
    turned = np.frombuffer(stored_bytes(scales, folder), np.uint8).reshape(*scales.dims, -1).swapaxes(0, 1)
    shared.append(f"{scales.name}.turned")
    editor.constant(
        message("Tensor")(name=shared[1], data_type=scales.data_type, dims=turned.shape[:2], raw_data=turned.tobytes())
    )
    for product in products:
        made = node(
            "MatMulNBits",
            [product.input[0], *shared],
            list(product.output),
            domain=MICROSOFT,
            K=inputs,
            N=outputs,
            bits=bits,
            block_size=block,
        )
        editor.nodes[next(at for at, n in enumerate(editor.nodes) if n is product)] = made
    editor.index()


def _packed(raw: bytes, inputs: int, outputs: int, bits: int) -> Array:
    """Return stored integers [inputs, outputs] as uint8 [outputs, inputs · bits / 8]. The lower half of a byte is first."""
    stored = np.frombuffer(raw, np.uint8)
    if bits == 8:
        return stored.reshape(inputs, outputs).T ^ np.uint8(0x80)
    halves = np.stack([stored & 15, stored >> 4], axis=-1).reshape(-1)[: inputs * outputs]
    rows = halves.reshape(inputs, outputs).T ^ np.uint8(8)
    packed: Array = rows[:, ::2] | rows[:, 1::2] << 4
    return packed
