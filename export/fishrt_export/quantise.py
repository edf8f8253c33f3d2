"""Weight-only quantisation of linear layers: signed integers in blocks along the inputs, one float32 scale for each block.

    weight ≈ integer · scale        symmetric: no zero points, which TensorRT would refuse

A layer's weight [outputs, inputs] is kept as integers [inputs, outputs] with scales [inputs / block, outputs], the layout that
ONNX Runtime fuses into MatMulNBits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .threads import one_thread

BITS = {"int8": 8, "int4": 4}
BLOCKS = (128, 64, 32, 16)
"""The first that divides a layer's inputs is taken: fewer scales to read. ONNX Runtime wants a power of two of at least 16."""

# Parts of a block's largest value that the largest integer may stand for. Cutting off a little makes all other steps finer.
_CLIPS = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.76, 0.72)
_SMALLEST = 1e-30
"""A block whose values are all smaller becomes zeros."""
_PIECE = 1 << 18
"""Weights that are worked on at a time: they stay in the processor's cache."""


def block_size(inputs: int) -> int | None:
    """Weights of one output that share a scale; None where no block divides a layer's inputs."""
    return next((block for block in BLOCKS if inputs % block == 0), None)


def quantise(weight: Tensor, bits: int, block: int) -> tuple[Tensor, Tensor]:
    """weight [outputs, inputs] → int8 [inputs, outputs], of 4 or 8 bits each, and scales float32 [inputs / block, outputs].

    With 8 bits, the largest value of a block gives its scale. With 4, the scale of the least squared error is looked for.
    """
    outputs, inputs = weight.shape
    integers = torch.empty((inputs, outputs), dtype=torch.int8)
    scales = torch.empty((inputs // block, outputs))
    rows = max(_PIECE // inputs, 1)
    with one_thread():
        for start in range(0, outputs, rows):
            part = weight[start : start + rows].float().reshape(-1, inputs // block, block)
            q, scale = _round_4(part) if bits == 4 else _round_8(part)
            integers[:, start : start + rows] = q.flatten(1).T
            scales[:, start : start + rows] = scale.squeeze(2).T
    return integers, scales


def dequantise(integers: Tensor, scales: Tensor) -> Tensor:
    """The float32 weight [outputs, inputs] that int8 [inputs, outputs] and scales [inputs / block, outputs] stand for."""
    blocks = integers.view(len(scales), -1, scales.shape[1])
    return (blocks * scales.unsqueeze(1)).flatten(0, 1).T


def pack(integers: Tensor) -> Tensor:
    """Integers of 4 bits, in their order, two to a byte: uint8 [⌈count / 2⌉], the first in the low half."""
    flat = integers.flatten().view(torch.uint8) & 15
    if len(flat) % 2:
        flat = torch.cat([flat, flat.new_zeros(1)])
    return flat[0::2] | flat[1::2] << 4


def unpack(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The int8 tensor of this `shape` that `pack` was given."""
    pairs = torch.stack((packed & 15, packed >> 4), dim=1).view(torch.int8)
    count = torch.Size(shape).numel()
    return (((pairs ^ 8) - 8).flatten()[:count]).view(shape)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference, divided by that of `expected`; 0.0 where both are zero."""
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
    # For these integers, the scale of the least squared error.
    fitted = (weight * q).sum(2, keepdim=True) / q.square().sum(2, keepdim=True)
    return q.to(torch.int8), torch.where(fitted.isfinite() & (fitted > 0), fitted, best)
