"""The samples of forms of weights, and packers of each form for layers of any shape, written anew in numpy."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

SAMPLES = Path(__file__).parents[1] / "forms"
READ = sorted(folder.name for folder in SAMPLES.iterdir() if (folder / "right.json").is_file())
GOLDEN = Path(__file__).parents[1] / "golden/s2-pro"
TOKENIZER, CODEC = GOLDEN / "lm/checkpoint/tokenizer.json", GOLDEN / "codec/checkpoint"
HALVES = {"tokenizer": TOKENIZER, "codec": CODEC}
"""What the samples lack."""

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


def right(form: str) -> dict[str, str]:
    found: dict[str, str] = json.loads((SAMPLES / form / "right.json").read_text())
    return found


def pack_bits(values: Ints, bits: int) -> npt.NDArray[np.int32]:
    """Rows of numbers as one run of bits each, least significant first, in words of 32."""
    rows, count = values.shape
    stream = (values[:, :, None] >> np.arange(bits) & 1).reshape(rows, count * bits).astype(np.uint8)
    return np.packbits(stream, axis=1, bitorder="little").view(np.int32)


def gptq(
    rng: np.random.Generator, outputs: int, inputs: int, *, bits: int, group: int, act_order: bool, sym: bool, v1: bool
) -> tuple[dict[str, Any], Floats]:
    """The tensors of a layer, and its weight by the definition."""
    group = inputs if group == -1 else group
    count = -(-inputs // group)
    q = rng.integers(0, 1 << bits, (inputs, outputs))
    z = np.full((count, outputs), 1 << (bits - 1)) if sym else rng.integers(1, 1 << bits, (count, outputs))
    scales = rng.uniform(0.001, 0.1, (count, outputs)).astype(np.float16)
    g_idx = np.arange(inputs) // group
    if act_order:
        g_idx = rng.permutation(g_idx)
    weight = np.empty((outputs, inputs), np.float32)
    for k, g in enumerate(g_idx):
        weight[:, k] = scales[g].astype(np.float32) * (q[k] - z[g]).astype(np.float32)
    parts = {
        ".qweight": pack_bits(q.T, bits).T.copy(),
        ".qzeros": pack_bits(z - (1 if v1 else 0), bits),
        ".scales": scales,
        ".g_idx": g_idx.astype(np.int32),
    }
    return parts, weight


def mlx(rng: np.random.Generator, outputs: int, inputs: int, *, bits: int, group: int) -> tuple[dict[str, Any], Floats]:
    """As `gptq`, with float32 scales."""
    q = rng.integers(0, 1 << bits, (outputs, inputs))
    scales, biases = (rng.standard_normal((outputs, inputs // group)).astype(np.float16).astype(np.float32) for _ in range(2))
    weight = np.empty((outputs, inputs), np.float32)
    for k in range(inputs):
        weight[:, k] = q[:, k].astype(np.float32) * scales[:, k // group] + biases[:, k // group]
    return {".weight": pack_bits(q, bits).view(np.uint32), ".scales": scales, ".biases": biases}, weight


def tiles(
    rng: np.random.Generator, outputs: int, inputs: int, *, group: int, inner: int, padded: int
) -> tuple[dict[str, Any], Floats]:
    """As `gptq`, in the tiles of upstream's int4; `padded` inputs are stored."""
    q = rng.integers(0, 16, (outputs, padded))
    scales, zeros = (rng.standard_normal((padded // group, outputs)).astype(np.float16).astype(np.float32) for _ in range(2))
    words = np.zeros((outputs // 8, padded // (16 * inner), 32, inner // 2), np.int64)
    for a, b, t, j in np.ndindex(words.shape):
        n, k0 = 8 * a + t // 4, 16 * (b * inner + 2 * j) + 2 * (t % 4)
        for i, step in enumerate((0, 8, 16, 24, 1, 9, 17, 25)):
            words[a, b, t, j] |= q[n, k0 + step] << (4 * i)
    weight = np.empty((outputs, inputs), np.float32)
    for k in range(inputs):
        weight[:, k] = (q[:, k] - 8).astype(np.float32) * scales[k // group] + zeros[k // group]
    return {".weight": words.astype(np.uint32).view(np.int32), ".scales_and_zeros": np.stack((scales, zeros), axis=2)}, weight


def bnb4(
    rng: np.random.Generator,
    outputs: int,
    inputs: int,
    *,
    block: int,
    nested: int | None,
    kind: str = "nf4",
    table: Sequence[float] | None = None,
) -> tuple[dict[str, Any], Floats]:
    """As `gptq`, in blocks of the flattened weight. nested: blocks that share a scale; None: the largest values are float32.

    table: of 16 numbers; None: any.
    """
    count = outputs * inputs
    blocks = -(-count // block)
    q = rng.integers(0, 16, count)
    numbers = np.array(np.sort(rng.uniform(-1, 1, 16)) if table is None else table, np.float32)
    state: dict[str, Any] = {"quant_type": kind, "blocksize": block, "dtype": "float16", "shape": [outputs, inputs]}
    parts: dict[str, Any] = {".weight.quant_map": numbers}
    if nested is None:
        largest = rng.uniform(0.1, 2, blocks).astype(np.float32)
        parts[".weight.absmax"] = largest
    else:
        second = np.sort(rng.uniform(-1, 1, 256)).astype(np.float32)
        eight, scales = rng.integers(0, 256, blocks), rng.uniform(0.1, 2, -(-blocks // nested)).astype(np.float32)
        largest = (second[eight] * scales[np.arange(blocks) // nested]).astype(np.float32) + np.float32(0.37)
        parts |= {".weight.absmax": eight.astype(np.uint8), ".weight.nested_absmax": scales, ".weight.nested_quant_map": second}
        state |= {"nested_blocksize": nested, "nested_dtype": "float32", "nested_offset": 0.37}
    weight = (numbers[q] * largest[np.arange(count) // block]).astype(np.float32).reshape(outputs, inputs)
    halves = np.append(q, np.zeros(count % 2, np.int64)).reshape(-1, 2)
    parts[".weight"] = (halves[:, 0] << 4 | halves[:, 1]).astype(np.uint8)[:, None]
    parts[f".weight.quant_state.bitsandbytes__{kind}"] = np.frombuffer(json.dumps(state).encode(), np.uint8).copy()
    return parts, weight


GGUF = {
    **{"Q8_0": (32, 34, (0,)), "Q4_0": (32, 18, (0,)), "Q5_0": (32, 22, (0,))},
    **{"Q4_1": (32, 20, (0, 2)), "Q5_1": (32, 24, (0, 2))},
    **{"Q2_K": (256, 84, (80, 82)), "Q4_K": (256, 144, (0, 2)), "Q5_K": (256, 176, (0, 2))},
    **{"Q3_K": (256, 110, (108,)), "Q6_K": (256, 210, (208,))},
}
"""Values and bytes of a block of each type, and the places of its float16 numbers."""


def gguf_blocks(kind: str, outputs: int, inputs: int) -> bytes:
    """The blocks of a weight in a type of GGUF: any bytes, with small scales."""
    values, size, halves = GGUF[kind]
    draw = random.Random(kind)
    raw = np.frombuffer(draw.randbytes(outputs * inputs // values * size), np.uint8).reshape(-1, size).copy()
    for at in halves:
        scales = np.array([draw.uniform(-0.1, 0.1) for _ in raw], np.float16)
        raw[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
    return raw.tobytes()
