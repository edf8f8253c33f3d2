"""State that causal layers carry from one call to the next, for streaming decoding.

A layer with context takes the columns before its input from the `Carry`; they are zeros at the start. The state tensors are in
the order of the layers' calls. Without a `Carry`, a layer takes a whole sequence and pads it with zeros.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, cast

from torch import Tensor, cat, nn


class Carry:
    """The state before and after one call."""

    def __init__(self, state: Iterable[Tensor] | None, position_ids: Tensor | None = None) -> None:
        """Begin a call.

        position_ids int64 [batch, frames]: counted from the start of the stream, for layers with attention.
        state: `after` of the call before. None: zeros, in the shapes that the layers need.
        """
        self.position_ids = position_ids
        self.after: list[Tensor] = []
        self.kinds: list[str] = []
        """Kind of each tensor of `after`: "columns", "key_cache" or "value_cache"."""
        self._before: Iterator[Tensor] | None = None if state is None else iter(state)

    def join(self, x: Tensor, count: int, *, kind: str = "columns", dim: int = -1) -> Tensor:
        """Return x with the `count` columns before it in front, along `dim` (negative). The last `count` columns are kept."""
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
    """A layer whose `forward(x, carry)` uses the carry, or passes it to its sub-layers."""


class Chain(nn.Sequential, Carrying):
    """Layers one after another."""

    def forward(self, x: Tensor, carry: Carry | None = None) -> Tensor:
        for layer in self:
            x = through(layer, x, carry)
        return x


def through(layer: nn.Module, x: Tensor, carry: Carry | None) -> Tensor:
    """Return the layer's output. Only a `Carrying` layer receives the carry."""
    return cast(Tensor, layer(x, carry) if isinstance(layer, Carrying) else layer(x))
