"""Layers of a codec on rows, one for each position, [batch · positions, channels]: the nodes that compute them.

A layer that looks back reads its rows by frame, [batch, frames, length, channels], and in front of each frame the rows of those
before. Sums of a frame then do not depend on which frames come in the same call, so that a stream gives the bits of the whole.

Rows may be z = u − cos u of a Snake, whose value is (z + 1) ÷ 2α: the weights and the bias behind it make up for the difference.
State holds the value, and what a frame takes from the one before is always rounded as state is, within a call, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..edit import MICROSOFT, constant
from .winograd import transforms

_FEW_ROWS = 64
"""Rows of tiles of a frame below which those of all frames are one product: each product packs its weights."""
_SWAP = (0, 2, 1)
_END = 2**62

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Read:
    """What a layer reads: rows · scale + offset, or the rows if there is neither."""

    name: str
    """Name of the layer, for its constants."""
    rows: ir.Value
    channels: int
    scale: Floats | None = None
    offset: Floats | None = None


@dataclass(frozen=True, slots=True)
class Range:
    """Range of what a layer reads, for 8 bits; it includes 0."""

    low: float
    high: float

    @property
    def scale(self) -> float:
        """The difference of two successive integers."""
        return max((self.high - self.low) / 255, 1e-8)

    @property
    def zero_point(self) -> int:
        """The integer of 0."""
        return min(max(round(-self.low / self.scale), 0), 255)


@dataclass(frozen=True, slots=True)
class Frames:
    """Rows by frame, [batch, frames, length, channels], and those before each, [batch, frames, count, channels]."""

    rows: ir.Value
    before: ir.Value
    length: int


class Rows:
    """The nodes of one graph, in their order."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph, self._tape = graph, ir.tape.Tape()
        self._sizes: dict[tuple[int, ...], ir.Value] = {}

    def finish(self) -> None:
        """Add the nodes to the graph."""
        self._graph.extend(self._tape.nodes)

    def op(self, op_type: str, inputs: Sequence[ir.Value], domain: str = "", **attributes: Any) -> ir.Value:
        """Add a node, and return its output."""
        return self._tape.op(op_type, inputs, attributes, domain=domain)

    def floats(self, name: str, array: npt.ArrayLike) -> ir.Value:
        """Return the constant float32 of this name."""
        return constant(self._graph, f"rows.{name}", array, np.float32)

    def reshape(self, value: ir.Value, *sizes: int) -> ir.Value:
        """Return a value in another shape."""
        return self.op("Reshape", [value, self._ints(*sizes)])

    def of_columns(self, value: ir.Value, channels: int) -> ir.Value:
        """Return the rows of a value [batch, channels, positions]."""
        return self.reshape(self.op("Transpose", [value], perm=_SWAP), -1, channels)

    def columns(self, rows: ir.Value, channels: int) -> ir.Value:
        """Return rows as [batch, channels, positions]."""
        return self.op("Transpose", [self._each(rows, -1, channels)], perm=_SWAP)

    def frames(self, read: Read, first: ir.Value, count: int, length: int) -> tuple[Frames, ir.Value]:
        """Return what is read by frame of `length` rows with the `count` rows before each, and the state after the call.

        first: the state before the call. Both are [batch, channels, count], and may be the same memory.
        """
        rows, channels = self._each(read.rows, -1, length, read.channels), read.channels
        first = self.op("Transpose", [first], perm=_SWAP)
        if length >= count:
            ends = self._value(read, self._part(rows, 2, length - count, length))
            ends = self.op("Concat", [self.op("Unsqueeze", [first, self._ints(1)]), ends], axis=1)
            before, last = self._part(ends, 1, 0, -1), self._each(self._part(ends, 1, -1, _END), count, channels)
        else:
            ends = self.op("Concat", [first, self._value(read, self._each(read.rows, -1, channels))], axis=1)
            spans = [self._each(self._part(ends, 1, at, at - count), -1, length, channels) for at in range(0, count, length)]
            before, last = self._part(self.op("Concat", spans, axis=2), 2, 0, count), self._part(ends, 1, -count, _END)
        if read.scale is not None and read.offset is not None:
            before = self.op("Sub", [before, self.floats(f"{read.name}.offset", read.offset)])
            before = self.op("Div", [before, self.floats(f"{read.name}.scale", read.scale)])
        return Frames(rows, before, length), self.op("Transpose", [last], perm=_SWAP)

    # ── layers: rows in, rows out; w is [taps, inputs, outputs] ──

    def product(self, name: str, x: ir.Value, w: Floats, bias: Floats) -> ir.Value:
        """Return x · w + bias of rows; w has one tap."""
        return self.op(
            "Gemm", [self.reshape(x, -1, w.shape[1]), self.floats(f"{name}.w", w[0]), self.floats(f"{name}.bias", bias)]
        )

    def pairs(self, x: Frames) -> ir.Value:
        """Return each row and the one before beside each other."""
        shifted = self.op("Concat", [x.before, self._part(x.rows, 2, 0, -1)], axis=2)
        return self.op("Concat", [x.rows, shifted], axis=3)

    def beside(self, x: Frames, taps: int, dilation: int) -> ir.Value:
        """Return the rows that each row of a convolution reads, beside each other."""
        whole = self.op("Concat", [x.before, x.rows], axis=2)
        return self.op("Concat", [self._part(whole, 2, at, at + x.length) for at in range(0, taps * dilation, dilation)], axis=3)

    def quantised(self, name: str, x: ir.Value, values: Range) -> ir.Value:
        """Return x as uint8."""
        return self.op("QuantizeLinear", [x, self.floats(f"{name}.step", values.scale), self._zero(name, values)])

    def product_of_integers(self, name: str, x: ir.Value, values: Range, w: Floats, bias: Floats) -> ir.Value:
        """Return x · w + bias of rows in uint8, with weights in int8 that have a scale for each output; w has one tap."""
        steps = np.maximum(np.abs(w[0]).max(axis=0) / 127, 1e-12).astype(np.float32)
        whole = constant(self._graph, f"rows.{name}.int8", np.round(w[0] / steps), np.int8)
        zeros = constant(self._graph, f"rows.{name}.zeros", np.zeros(len(steps)), np.int8)
        scale = self.floats(f"{name}.step", values.scale)
        parts = [
            self.reshape(x, -1, w.shape[1]),
            whole,
            scale,
            self.floats(f"{name}.steps", steps),
            self._zero(name, values),
            zeros,
        ]
        return self.op("MatMulIntegerToFloat", [*parts, self.floats(f"{name}.bias", bias)], domain=MICROSOFT)

    def shifted(self, name: str, x: Frames, w: Floats, bias: Floats, dilation: int) -> ir.Value:
        """Return a convolution as the products of each row with all taps, which are then shifted and added."""
        taps, inputs, outputs = w.shape
        whole, beside = self.op("Concat", [x.before, x.rows], axis=2), w.transpose(1, 0, 2).reshape(inputs, taps * outputs)
        made = self.op("MatMul", [whole, self.floats(f"{name}.w", beside)])
        parts = [
            self._part(made, (2, 3), (tap * dilation, tap * outputs), (tap * dilation + x.length, (tap + 1) * outputs))
            for tap in range(taps)
        ]
        return self.reshape(self.op("Add", [self.op("Sum", parts), self.floats(f"{name}.bias", bias)]), -1, outputs)

    def tiled(self, name: str, x: Frames, w: Floats, bias: Floats, dilation: int) -> ir.Value:
        """Return a convolution by minimal filtering, in tiles of `OUTPUTS` rows of each of `dilation` phases.

        V = B x of each tile, P = V · U for each point, y = A P. What is behind a frame only fills its last tile; it is of the
        same frame, since it rounds the tile's sums.
        """
        taps, inputs, outputs = w.shape
        a, g, b = transforms(OUTPUTS, taps)
        n, tiles = len(b), tile_count(x.length, dilation)
        spare = tiles * OUTPUTS * dilation - x.length
        fill = [self._part(x.before, 2, 0, spare)] if spare else []
        whole = self.op("Concat", [x.before, x.rows, *fill], axis=2)
        whole = self.reshape(whole, -1, 1, tiles * OUTPUTS + taps - 1, dilation, inputs)
        v = self.op("Conv", [whole, self.floats(f"b{taps}", b.reshape(n, 1, n, 1, 1))], strides=(OUTPUTS, 1, 1))
        u, last = self.floats(f"{name}.w", np.tensordot(g, w, 1)), self.floats(f"a{taps}", a)
        if tiles * dilation < _FEW_ROWS:
            v = self.reshape(self.op("Transpose", [v], perm=(1, 0, 2, 3, 4)), n, -1, inputs)
            y = self.op("MatMul", [last, self.reshape(self.op("MatMul", [v, u]), n, -1)])
            y = self.op("Transpose", [self.reshape(y, OUTPUTS, -1, tiles, dilation * outputs)], perm=(1, 2, 0, 3))
        else:
            v = self.reshape(v, -1, n, tiles * dilation, inputs)
            y = self.op("MatMul", [last, self.reshape(self.op("MatMul", [v, u]), -1, n, tiles * dilation * outputs)])
            y = self.op("Transpose", [self.reshape(y, -1, OUTPUTS, tiles, dilation * outputs)], perm=(0, 2, 1, 3))
        if spare:
            y = self._part(self.reshape(y, -1, tiles * OUTPUTS * dilation, outputs), 1, 0, x.length)
        return self.op("Add", [self.reshape(y, -1, outputs), self.floats(f"{name}.bias", bias)])

    # ── nodes ──

    def _value(self, read: Read, rows: ir.Value) -> ir.Value:
        """Return the values of rows, as state holds them."""
        if read.scale is None or read.offset is None:
            return rows
        scaled = self.op("Mul", [rows, self.floats(f"{read.name}.scale", read.scale)])
        return self.op("Add", [scaled, self.floats(f"{read.name}.offset", read.offset)])

    def _zero(self, name: str, values: Range) -> ir.Value:
        return constant(self._graph, f"rows.{name}.zero", values.zero_point, np.uint8)

    def _part(
        self, value: ir.Value, axis: int | Sequence[int], start: int | Sequence[int], stop: int | Sequence[int]
    ) -> ir.Value:
        starts, stops, axes = (self._ints(*([n] if isinstance(n, int) else n)) for n in (start, stop, axis))
        return self.op("Slice", [value, starts, stops, axes])

    def _each(self, rows: ir.Value, *sizes: int) -> ir.Value:
        """Return rows as [batch, *sizes]."""
        if not self._sizes:
            self._sizes[()] = self.op("Shape", [self._graph.inputs[0]], start=0, end=1)
        if sizes not in self._sizes:
            self._sizes[sizes] = self.op("Concat", [self._sizes[()], self._ints(*sizes)], axis=0)
        return self.op("Reshape", [rows, self._sizes[sizes]])

    def _ints(self, *values: int) -> ir.Value:
        return constant(self._graph, f"rows.{'_'.join(map(str, values))}", values, np.int64)


OUTPUTS = 4
"""Rows of a tile. With 6, one thread decodes up to 16 % faster and two threads no faster, and 7 dB are lost."""


def tile_count(length: int, dilation: int) -> int:
    """Return the tiles of a frame."""
    return -(-length // (OUTPUTS * dilation))
