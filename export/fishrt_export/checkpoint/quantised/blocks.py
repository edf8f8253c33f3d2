"""The blocks of GGUF's types as integers. Every product of scales is exact in float32.

A block's bytes are the columns of an array [blocks, bytes]. d, dmin and m of Q4_1 and Q5_1 are float16.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..content import reading
from ..forms.gguf import KINDS, GgufTensor
from ..weights import Maker
from .integers import Integers, Packed

Bytes = npt.NDArray[np.uint8]
Numbers = npt.NDArray[np.integer[Any]]
Parts = tuple[npt.NDArray[np.int8], npt.NDArray[np.float32], npt.NDArray[np.float32] | None]
"""Integers [blocks, values], and scales and biases [blocks, groups]."""

_SIZES = {name: size for name, _, size in KINDS.values()}
_FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


def maker(path: Path, tensor: GgufTensor) -> Maker:
    """Return the maker of a tensor, of which the file is read at every call."""
    if tensor.kind in _READERS:
        return Packed(lambda: _integers(path, tensor))
    return lambda: _floats(path, tensor)


def _floats(path: Path, tensor: GgufTensor) -> Tensor:
    kind = _FLOATS.get(tensor.kind) or getattr(torch, tensor.kind.lower().replace("i", "int"))
    found = torch.from_numpy(_raw(path, tensor)).view(kind).view(tensor.shape)
    return found.float() if kind == torch.float64 else found


def _raw(path: Path, tensor: GgufTensor) -> Bytes:
    with reading(path):
        return np.fromfile(path, np.uint8, tensor.size, offset=tensor.offset)


def _integers(path: Path, tensor: GgufTensor) -> Integers:
    read, bits, offset = _READERS[tensor.kind]
    values, scales, biases = read(_raw(path, tensor).reshape(-1, _SIZES[tensor.kind]))
    outputs = int(np.prod(tensor.shape[:-1]))
    rows = [torch.from_numpy(np.ascontiguousarray(part)).view(outputs, -1) for part in (values, scales)]
    of_groups = None if biases is None else torch.from_numpy(biases).view(outputs, -1)
    return Integers(rows[0], rows[1], bits, offset=offset, biases=of_groups)


def _half(block: Bytes, at: int) -> npt.NDArray[np.float32]:
    """Return the float16 numbers at a byte of all blocks, float32 [blocks, 1]."""
    return np.ascontiguousarray(block[:, at : at + 2]).view(np.float16).astype(np.float32)


def _nibbles(block: Bytes, run: int = 0) -> Numbers:
    """Return the low halves of all bytes, then the high halves; of each run of bytes, if its length is given."""
    runs = block.reshape(len(block), -1, run or block.shape[1])
    return np.stack((runs & 15, runs >> 4), axis=2).reshape(len(block), -1)


def _pairs(block: Bytes, run: int) -> Numbers:
    """Return the numbers of 2 bits: for each run of bytes the lowest of all its bytes, then the next."""
    runs = block.reshape(len(block), -1, 1, run)
    return (runs >> np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1) & 3).reshape(len(block), -1)


def _fifth_bits(block: Bytes) -> Numbers:
    """Return the 32 bits of 4 bytes, the lowest first, each in the place of the fifth bit."""
    return np.unpackbits(block, axis=1, bitorder="little") << 4


def _signed(values: Numbers, middle: int) -> npt.NDArray[np.int8]:
    return values.astype(np.int8) - np.int8(middle)


def _q8_0(block: Bytes) -> Parts:
    return block[:, 2:].view(np.int8), _half(block, 0), None


def _q4_0(block: Bytes) -> Parts:
    return _signed(_nibbles(block[:, 2:]), 8), _half(block, 0), None


def _q4_1(block: Bytes) -> Parts:
    return _signed(_nibbles(block[:, 4:]), 8), _half(block, 0), _half(block, 2)


def _q5_0(block: Bytes) -> Parts:
    return _signed(_nibbles(block[:, 6:]) | _fifth_bits(block[:, 2:6]), 16), _half(block, 0), None


def _q5_1(block: Bytes) -> Parts:
    return _signed(_nibbles(block[:, 8:]) | _fifth_bits(block[:, 4:8]), 16), _half(block, 0), _half(block, 2)


def _q2_k(block: Bytes) -> Parts:
    scales, d, least = block[:, :16], _half(block, 80), _half(block, 82)
    return _signed(_pairs(block[:, 16:80], 32), 2), d * (scales & 15), -(least * (scales >> 4))


def _q3_k(block: Bytes) -> Parts:
    low, high = _nibbles(block[:, 96:104]), _pairs(block[:, 104:108], 4)
    scales = (low | high << 4).astype(np.int8) - np.int8(32)
    # A third bit that is not set takes 4 off.
    third = (block[:, None, :32] >> np.arange(8, dtype=np.uint8)[:, None] & 1).reshape(len(block), 256)
    return (_pairs(block[:, 32:96], 32) | third << 2).astype(np.int8) - np.int8(4), _half(block, 108) * scales, None


def _scales_of_6_bits(block: Bytes) -> tuple[Bytes, Bytes]:
    """Return the 8 scales and the 8 minima of 12 bytes."""
    first, second, last = block[:, :4], block[:, 4:8], block[:, 8:12]
    scales = np.concatenate((first & 63, last & 15 | first >> 6 << 4), axis=1)
    return scales, np.concatenate((second & 63, last >> 4 | second >> 6 << 4), axis=1)


def _q4_k(block: Bytes) -> Parts:
    scales, minima = _scales_of_6_bits(block[:, 4:16])
    return _signed(_nibbles(block[:, 16:], 32), 8), _half(block, 0) * scales, -(_half(block, 2) * minima)


def _q5_k(block: Bytes) -> Parts:
    scales, minima = _scales_of_6_bits(block[:, 4:16])
    fifth = (block[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1).reshape(len(block), 256)
    return _signed(_nibbles(block[:, 48:], 32) | fifth << 4, 16), _half(block, 0) * scales, -(_half(block, 2) * minima)


def _q6_k(block: Bytes) -> Parts:
    low, high = _nibbles(block[:, :128], 64), _pairs(block[:, 128:192], 32)
    return _signed(low | high << 4, 32), _half(block, 208) * block[:, 192:208].view(np.int8), None


_READERS: dict[str, tuple[Callable[[Bytes], Parts], int, int]] = {
    "Q8_0": (_q8_0, 8, 0),
    "Q4_0": (_q4_0, 4, 0),
    "Q4_1": (_q4_1, 4, 8),
    "Q5_0": (_q5_0, 5, 0),
    "Q5_1": (_q5_1, 5, 16),
    "Q2_K": (_q2_k, 2, 2),
    "Q3_K": (_q3_k, 3, 0),
    "Q4_K": (_q4_k, 4, 8),
    "Q5_K": (_q5_k, 5, 16),
    "Q6_K": (_q6_k, 6, 0),
}
"""For each type: how a block is read, the bits of its values, and what was taken off them."""
