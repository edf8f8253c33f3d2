"""Weight-only quantisation of linear layers: signed integers in blocks along the inputs, one float32 scale for each block.

    weight ≈ integer · scale        symmetric: TensorRT takes no zero points

A layer's weight [outputs, inputs] becomes integers [inputs, outputs] and scales [inputs / block, outputs], the layout that ONNX
Runtime fuses into MatMulNBits. With `int8-rows`, all blocks of an output have the same scale, so that a CPU can also multiply
whole columns by activations in 8 bits; see targets/rows.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fishrt.bundle.quantisation import ROWS

from ..checkpoint.weights import one_thread

BITS = {"int8": 8, ROWS: 8, "int4": 4}
BLOCKS = (128, 64, 32, 16)
"""Block sizes in order of preference: larger blocks have fewer scales to read. ONNX Runtime needs a power of two, at least 16."""

# Candidates for the largest integer's value, as parts of the block's largest. Clipping a little makes all other steps finer.
_CLIPS = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.76, 0.72)
_SMALLEST = 1e-30
"""A block whose values are all smaller becomes zeros."""
_PIECE = 1 << 18
"""Numbers that are processed at a time: they fit the processor's cache."""


def block_size(inputs: int) -> int | None:
    """Return the largest of BLOCKS that divides a layer's inputs, or None."""
    return next((block for block in BLOCKS if inputs % block == 0), None)


def quantise(weight: Tensor, bits: int, block: int) -> tuple[Tensor, Tensor]:
    """Quantise weight [outputs, inputs] to integers of 4 or 8 bits, int8 [inputs, outputs], and scales.

    The scales are float32 [inputs / block, outputs]. With 8 bits, a block's largest value gives its scale; with 4 bits, the scale
    is searched for the least squared error.
    """

    def rounded(part: Tensor) -> tuple[Tensor, Tensor]:
        q, scale = (_round_4 if bits == 4 else _round_8)(part.reshape(len(part), -1, block))
        return q.flatten(1), scale.squeeze(2)

    return _in_pieces(weight, block, rounded)


def quantise_columns(weight: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Quantise weight [outputs, inputs] to 8 bits as `quantise` does, with the same scale in all blocks of an output.

    Neighbours of one sign, of the inputs 2i and 2i + 1, add up to at most 128. A CPU without VNNI adds two products with
    activations of up to 255 in 16 bits: they fit, so that every CPU gives the same sums.
    """

    def rounded(part: Tensor) -> tuple[Tensor, Tensor]:
        pairs = part.reshape(len(part), -1, 2)
        sums = torch.stack([pairs.clamp(min=0).sum(2), pairs.clamp(max=0).sum(2).neg()]).amax((0, 2))
        scale = sums.clamp_(min=_SMALLEST).unsqueeze(1) / 127
        return (part / scale).round_().to(torch.int8), scale

    return _in_pieces(weight, block, rounded)


def _in_pieces(weight: Tensor, block: int, rounded: Callable[[Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return the integers and scales of a weight, some rows at a time.

    rounded: float32 [rows, inputs] → int8 of the same shape, and the scales of each row's blocks, or one for all.
    """
    outputs, inputs = weight.shape
    integers = torch.empty((inputs, outputs), dtype=torch.int8)
    scales = torch.empty((inputs // block, outputs))
    rows = max(_PIECE // inputs, 1)
    with one_thread():
        for start in range(0, outputs, rows):
            q, scale = rounded(weight[start : start + rows].float())
            integers[:, start : start + rows] = q.T
            scales[:, start : start + rows] = scale.T
    return integers, scales


def dequantise(integers: Tensor, scales: Tensor) -> Tensor:
    """Return the float32 weight [outputs, inputs] of int8 [inputs, outputs] and scales [inputs / block, outputs]."""
    blocks = integers.view(len(scales), -1, scales.shape[1])
    return (blocks * scales.unsqueeze(1)).flatten(0, 1).T


def pack(integers: Tensor) -> Tensor:
    """Pack integers of 4 bits in their order, two to a byte, the first in the low half: uint8 [⌈count / 2⌉]."""
    flat = integers.flatten().view(torch.uint8) & 15
    if len(flat) % 2:
        flat = torch.cat([flat, flat.new_zeros(1)])
    return flat[0::2] | flat[1::2] << 4


def unpack(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the int8 tensor of this `shape` from the bytes of `pack`."""
    pairs = torch.stack((packed & 15, packed >> 4), dim=1).view(torch.int8)
    count = torch.Size(shape).numel()
    return (((pairs ^ 8) - 8).flatten()[:count]).view(shape)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the root mean square of the difference divided by that of `expected`; 0.0 if both are zero."""
    rows = max(_PIECE * len(actual) // max(actual.numel(), 1), 1)
    lost = kept = 0.0
    with one_thread():
        for a, e in zip(torch.split(actual, rows), torch.split(expected, rows), strict=True):
            kept += float(e.float().square().sum())
            lost += float((a.float() - e.float()).square().sum())
    return (lost / kept) ** 0.5 if kept else float(lost > 0)


def _round_8(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = weight.abs().amax(2, keepdim=True).clamp_(min=_SMALLEST) / 127
    return (weight / scale).round_().to(torch.int8), scale


def _round_4(weight: Tensor) -> tuple[Tensor, Tensor]:
    largest = weight.abs().amax(2, keepdim=True).clamp_(min=_SMALLEST)
    best, least = largest, torch.full_like(largest, torch.inf)
    q = torch.empty_like(weight)
    for clip in _CLIPS:
        scale = largest * (clip / 7)
        torch.mul(weight, scale.reciprocal(), out=q)
        error = q.round_().clamp_(-8, 7).mul_(scale).sub_(weight).square_().sum(2, keepdim=True)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    torch.mul(weight, best.reciprocal(), out=q)
    q.round_().clamp_(-8, 7)
    # The scale with the least squared error for these integers.
    fitted = (weight * q).sum(2, keepdim=True) / q.square().sum(2, keepdim=True)
    return q.to(torch.int8), torch.where(fitted.isfinite() & (fitted > 0), fitted, best)
