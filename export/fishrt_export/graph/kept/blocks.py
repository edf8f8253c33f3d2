"""Integers of a checkpoint as a graph stores them, without a second rounding.

    weight = (integer − zero) · scale + bias        blocks along the inputs, which may be in another order

DequantizeLinear computes all but the biases, and ONNX Runtime fuses it with the product. Its blocks are powers of two: a group of
96 inputs becomes three blocks of 32 with equal scales. The biases are multiplied with the sums of the inputs of each group, and
added to the product.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from ...checkpoint.quantised.integers import Integers, Packed
from ...checkpoint.weights import makers
from ..quantise import block_size, dequantise

K = TypeVar("K")


@dataclass(frozen=True, slots=True)
class Blocks:
    """The parts of a stored weight [outputs, inputs]."""

    integers: Tensor
    """int8 [inputs, outputs]; with zeros they stand for unsigned numbers less half their range."""
    scales: Tensor
    """float32 [inputs / block, outputs]."""
    zeros: Tensor | None = None
    """int8 [inputs / block, outputs], like the integers."""
    biases: Tensor | None = None
    """float32 [groups, outputs], of groups of equal size."""
    order: Tensor | None = None
    """int64 [inputs]: the input of each row of `integers`. None: in order."""

    @property
    def block(self) -> int:
        """Return the inputs that share a scale."""
        return len(self.integers) // len(self.scales)

    def widened(self) -> Tensor:
        """Return the float32 weight [outputs, inputs]."""
        integers = self.integers
        if self.zeros is not None:
            integers = integers.to(torch.int16) - self.zeros.to(torch.int16).repeat_interleave(self.block, 0)
        weight = dequantise(integers, self.scales)
        if self.biases is not None:
            weight += self.biases.repeat_interleave(len(integers) // len(self.biases), 0).T
        if self.order is None:
            return weight
        return torch.empty_like(weight).index_copy_(1, self.order, weight)


def blocks_of(found: Integers) -> Blocks | None:
    """Return integers in blocks, or None if they cannot be stored so."""
    order = found.order()
    if order is not None:
        found = found.ordered(order)
    inputs, count = found.values.shape[1], found.scales.shape[1]
    if found.groups is not None or inputs % count or not (block := block_size(inputs // count)):
        return None
    scales, zeros = (
        None if part is None else part.T.repeat_interleave(inputs // count // block, 0) for part in (found.scales, found.zeros)
    )
    assert scales is not None
    biases = found.shift()
    return Blocks(
        found.values.T.contiguous(),
        scales.contiguous(),
        None if zeros is None else zeros.to(torch.int8).contiguous(),
        None if biases is None else biases.T.contiguous(),
        order,
    )


def packed(weights: Mapping[str, Tensor], name: str) -> Packed | None:
    """Return the integers of a weight, not read yet, or None if the checkpoint has none."""
    make = makers(weights).get(name)
    return make if isinstance(make, Packed) else None


def kept(weights: Mapping[str, Tensor], name: str, kind: type[K]) -> K:
    """Return the integers or codes of a weight that is stored as the checkpoint has it."""
    made = packed(weights, name)
    found = None if made is None else made.read()
    assert isinstance(found, kind)
    return found


def stored_bits(found: Integers) -> int:
    """Return the bits in which integers are stored."""
    return 4 if found.bits <= 4 else 8
