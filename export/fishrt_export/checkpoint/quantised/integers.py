"""A weight as a file stores it: integers of a few bits, and what each group of them is multiplied by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import gcd

import torch
from torch import Tensor

from ..weights import Lazy, Maker, makers, one_thread
from .levels import Levels

_PIECE = 1 << 20
"""Numbers that are widened at a time."""


@dataclass(frozen=True, slots=True)
class Integers:
    """weight[n, k] = (values[n, k] + offset − zeros[n, g]) · scales[n, g] + biases[n, g], where g is the group of input k.

    The sum of integers is exact, and the product and the last sum are rounded to float32 once each.
    """

    values: Tensor
    """int8 [outputs, inputs]."""
    scales: Tensor
    """float32 [outputs, groups]."""
    bits: int
    """Bits of a value."""
    offset: int = 0
    zeros: Tensor | None = None
    """int16 [outputs, groups]; None: 0."""
    biases: Tensor | None = None
    """float32 [outputs, groups]; None: 0."""
    groups: Tensor | None = None
    """int64 [inputs]: the group of each input. None: groups of equal size, in order."""

    def widened(self) -> Tensor:
        """Return the float32 weight [outputs, inputs]."""
        outputs, inputs = self.values.shape
        result = torch.empty((outputs, inputs))
        rows = max(_PIECE // max(inputs, 1), 1)
        with one_thread():
            for start in range(0, outputs, rows):
                part = slice(start, start + rows)
                values = self.values[part].to(torch.int16)
                if self.offset:
                    values += self.offset
                if self.zeros is not None:
                    values -= self._spread(self.zeros[part])
                torch.mul(values, self._spread(self.scales[part]), out=result[part])
                if self.biases is not None:
                    result[part] += self._spread(self.biases[part])
        return result

    def shift(self) -> Tensor | None:
        """Return the biases with `offset` in them: what is added to (values − zeros) · scales, float32 [outputs, groups]."""
        if not self.offset:
            return self.biases
        return self.offset * self.scales + (0 if self.biases is None else self.biases)

    def rows(self, index: Tensor) -> Integers:
        """Return the integers of these outputs."""
        zeros, biases = (None if part is None else part[index] for part in (self.zeros, self.biases))
        return replace(self, values=self.values[index], scales=self.scales[index], zeros=zeros, biases=biases)

    def order(self) -> Tensor | None:
        """Return the inputs in the order of their groups, int64 [inputs]; None if they are in it, or if the sizes differ."""
        inputs, count = self.values.shape[1], self.scales.shape[1]
        if self.groups is None or (torch.bincount(self.groups, minlength=count) * count != inputs).any():
            return None
        return torch.argsort(self.groups, stable=True)

    def ordered(self, order: Tensor) -> Integers:
        """Return the integers with their inputs in the order of `order`."""
        return replace(self, values=self.values[:, order], groups=None)

    def _spread(self, of_groups: Tensor) -> Tensor:
        """Return a value for each input, of values for each group."""
        if self.groups is not None:
            return of_groups[:, self.groups]
        return of_groups.repeat_interleave(self.values.shape[1] // of_groups.shape[1], dim=1)


@dataclass(frozen=True, slots=True)
class Packed:
    """A weight of a few bits, which makes its tensor when it is called: a Maker with one more method."""

    read: Callable[[], Integers | Levels]
    """Reads the weight as it is stored."""
    widen: Callable[[], Tensor] | None = None
    """Makes the tensor, if what is read would be rounded otherwise."""

    def __call__(self) -> Tensor:
        return self.read().widened() if self.widen is None else self.widen()


def rows_of(make: Maker, index: Tensor) -> Maker:
    """Return the maker of some rows of a matrix."""
    if not isinstance(make, Packed):
        return lambda: make()[index]
    read, widen = make.read, make.widen
    return Packed(lambda: read().rows(index), None if widen is None else lambda: widen()[index])


def joined(parts: Sequence[Maker]) -> Maker:
    """Return the maker of the rows of all parts: of integers, if all have the same kind of them."""

    def join() -> Integers:
        found = [made for part in parts if isinstance(part, Packed) and isinstance(made := part.read(), Integers)]
        values, scales = torch.cat([part.values for part in found]), torch.cat([part.scales for part in found])
        return replace(found[0], values=values, scales=scales)

    def whole() -> Tensor:
        return torch.cat([make() for make in parts])

    kinds = {_simple_kind(part.read()) if isinstance(part, Packed) else None for part in parts}
    return Packed(join, whole) if len(kinds) == 1 and None not in kinds else whole


def _simple_kind(found: Integers | Levels) -> tuple[int, int, int] | None:
    """Return bits, offset and number of groups of integers with scales alone; None for others."""
    if isinstance(found, Levels) or found.zeros is not None or found.biases is not None or found.groups is not None:
        return None
    return found.bits, found.offset, found.scales.shape[1]


def without_orders(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return a model's tensors with the inputs of every w2 in the order of their groups, as the outputs of w1 and w3 then are.

    The model computes the same, and w2 needs no other order of its inputs when it is stored.
    """
    found = makers(tensors)
    for name, make in list(found.items()):
        if not name.endswith("feed_forward.w2.weight") or not isinstance(make, Packed):
            continue
        order = _order(make.read())
        if order is None:
            continue
        found[name] = Packed(partial(_ordered, make, order))
        for other in ("w1", "w3"):
            sister = name.replace(".w2.", f".{other}.")
            found[sister] = rows_of(found[sister], order)
    return Lazy(found)


def _order(found: Integers | Levels) -> Tensor | None:
    return found.order() if isinstance(found, Integers) else None


def _ordered(make: Packed, order: Tensor) -> Integers:
    found = make.read()
    assert isinstance(found, Integers)
    return found.ordered(order)


def unpack(words: Tensor, bits: int) -> Tensor:
    """Return the int8 [rows, n · 32 / bits] in int32 words [rows, n]: numbers of `bits` bits, the lowest bits first.

    Numbers of 8 bits wrap around. A number may begin in one word and end in the next.
    """
    shared = gcd(bits, 32)
    per, count = bits // shared, 32 // shared  # words, and numbers in them, until a number begins with a word again
    rows = words.shape[0]
    chunks = words.reshape(rows, -1, per)
    result = torch.empty((rows, chunks.shape[1], count), dtype=torch.int8)
    mask = (1 << bits) - 1
    with one_thread():
        for i in range(count):
            word, shift = divmod(i * bits, 32)
            value = chunks[:, :, word] >> shift
            if shift + bits > 32:
                value = (value & ((1 << (32 - shift)) - 1)) | (chunks[:, :, word + 1] << (32 - shift))
            result[:, :, i] = (value & mask).to(torch.int8)
    return result.flatten(1)
