"""What causal layers keep of a call for the next one, so that sound can be decoded as its codes come.

A layer that looks back asks the `Carry` for what came before its input, and finds zeros there at the start. The tensors stand in
the order of the calls, which is that of the network. Without a `Carry` a layer sees a whole sequence and fills it up with zeros.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, cast

from torch import Tensor, cat, nn


class Carry:
    """The state of one call: what it begins with, and what it leaves."""

    def __init__(self, state: Iterable[Tensor] | None, position_ids: Tensor | None = None) -> None:
        """position_ids int64 [batch, frames]: counted from the start of the stream, for layers with attention.

        state: as `after` of the call before. None: zeros, in whatever shapes the layers ask for.
        """
        self.position_ids = position_ids
        self.after: list[Tensor] = []
        self.kinds: list[str] = []
        """What each tensor holds: "columns", "key_cache" or "value_cache"."""
        self._before: Iterator[Tensor] | None = None if state is None else iter(state)

    def join(self, x: Tensor, count: int, *, kind: str = "columns", dim: int = -1) -> Tensor:
        """x with the `count` columns before it in front, along `dim` (negative). The last ones of both are kept."""
        if not count:
            return x
        if self._before is None:
            shape = list(x.shape)
            shape[dim] = count
            before = x.new_zeros(shape)
        else:
            before = next(self._before)
        whole = cat([before, x], dim=dim)
        last: Any = (..., slice(-count, None), *[slice(None)] * (-1 - dim))
        self.after.append(whole[last])
        self.kinds.append(kind)
        return whole


class Carrying(nn.Module):
    """A layer whose `forward(x, carry)` looks back, or hands the carry on to layers that do."""


class Chain(nn.Sequential, Carrying):
    """Layers one after another."""

    def forward(self, x: Tensor, carry: Carry | None = None) -> Tensor:
        for layer in self:
            x = through(layer, x, carry)
        return x


def through(layer: nn.Module, x: Tensor, carry: Carry | None) -> Tensor:
    """The layer's output; only a layer that carries is given the carry."""
    return cast(Tensor, layer(x, carry) if isinstance(layer, Carrying) else layer(x))
