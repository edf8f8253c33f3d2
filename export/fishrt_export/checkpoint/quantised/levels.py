"""A weight of four bits that name the numbers of a table: NF4 and FP4 of bitsandbytes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..weights import one_thread

TABLES = {
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    "fp4": (
        *(0.0, 1 / 192, 2 / 3, 1.0, 1 / 3, 1 / 2, 1 / 6, 1 / 4),
        *(-0.0, -1 / 192, -2 / 3, -1.0, -1 / 3, -1 / 2, -1 / 6, -1 / 4),
    ),
}
"""The tables that ONNX Runtime multiplies by, under bundle.quantisation.LEVELS."""
BLOCKS = (16, 32, 64, 128, 256)
"""Block sizes that ONNX Runtime multiplies."""
_PIECE = 1 << 20
"""Numbers that are widened at a time."""


@dataclass(frozen=True, slots=True)
class Levels:
    """weight[n, k] = table[codes[n, k]] · largest[n, k // block], a product that is rounded once."""

    codes: Tensor
    """uint8 [outputs, ⌈inputs / 2⌉]: two codes, the first in the high half."""
    table: Tensor
    """float32 [16]."""
    largest: Tensor
    """float32 [outputs, inputs / block]."""
    inputs: int

    @property
    def block(self) -> int:
        """Return the inputs that share a largest number."""
        return self.inputs // self.largest.shape[1]

    @property
    def kind(self) -> str | None:
        """The name of the table in TABLES; None for another table, and for blocks that ONNX Runtime does not multiply."""
        if self.block not in BLOCKS:
            return None
        return next((name for name, known in TABLES.items() if torch.equal(self.table, torch.tensor(known))), None)

    def widened(self) -> Tensor:
        """Return the float32 weight [outputs, inputs]."""
        pairs = torch.cartesian_prod(self.table, self.table)
        weight = torch.empty((len(self.codes), self.inputs))
        rows = max(_PIECE // self.inputs, 1)
        with one_thread():
            for start in range(0, len(weight), rows):
                part = slice(start, start + rows)
                spread = self.largest[part].repeat_interleave(self.block, dim=1)
                torch.mul(pairs[self.codes[part].int()].flatten(1)[:, : self.inputs], spread, out=weight[part])
        return weight

    def rows(self, index: Tensor) -> Levels:
        """Return the levels of these outputs."""
        return replace(self, codes=self.codes[index], largest=self.largest[index])
