"""The form of a codec's decoder for CPUs: layers that compute on rows; see `rows`.

    Snake                    u − cos u, u = 2αx. What else it takes is in the weights of the layers around it
    convolution of 1 tap     one product
    convolution of 7 taps    minimal filtering in tiles of a frame, or products of all taps that are shifted and added
    transposed convolution   one product of each row and the one before

A layer of another form stays as it is, between two transpositions.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from ..edit import is_constant, numbers, only_reader, producer, tidy
from .rows import OUTPUTS, Floats, Frames, Range, Read, Rows, tile_count

LEAST_ALPHA = 0.01
"""A Snake keeps its sine if an |α| is below this: the error of u − cos u, 6e-8, is divided by 2α."""
LEAST_CHANNELS = 64
"""A decoder with fewer in its last block gains nothing: rows save products, of which it has few, and move more numbers."""
MOST_ROWS = 0.75
"""Minimal filtering pays if its products have at most this part of the rows of direct ones: tiles reach beyond a frame."""


@dataclass(frozen=True, slots=True)
class _Snake:
    """x + sin²(αx) / α of x [batch, channels, positions]. `nodes` read x."""

    x: ir.Value
    alpha: Floats
    nodes: frozenset[ir.Node]

    @property
    def is_wave(self) -> bool:
        """Whether it is computed as a u − cos u."""
        return float(np.abs(self.alpha).min()) >= LEAST_ALPHA


@dataclass(frozen=True, slots=True)
class _State:
    """Columns that a layer carries: before a call, what they are put in front of, and after it."""

    before: ir.Value
    x: ir.Value
    after: ir.Value
    count: int


@dataclass(frozen=True, slots=True)
class Made:
    """Layers that were replaced."""

    ways: dict[str, int]
    """The number of convolutions by the way that they are computed."""
    inner: list[Read]
    """What the layers of all blocks but the last read."""


def is_wide(model: ir.Model) -> bool:
    """Return whether a codec's decoder in float32 gains from layers on rows."""
    outputs = [stored(node.inputs[1]).shape[1] for node in model.graph if node.op_type == "ConvTranspose"]
    return min(outputs, default=0) >= LEAST_CHANNELS


def by_rows(model: ir.Model, hop: int, ranges: Mapping[str, Range] | None = None) -> Made:
    """Replace the layers of a decoder in place.

    hop: samples of a frame. ranges: of rows · scale of what layers read that are computed in integers, by the name of the layer.
    """
    return _Decoder(model, hop, ranges or {}).replace()


def way(kernel: int, dilation: int, length: int, outputs: int) -> str:
    """Return how a convolution is computed: as a "product", in "tiles" or by "shifts". length: positions of a frame."""
    if kernel == 1:
        return "product"
    rows = (OUTPUTS + kernel - 1) * tile_count(length, dilation) * dilation
    return "tiles" if outputs > 1 and rows <= MOST_ROWS * kernel * length else "shifts"


class _Decoder:
    def __init__(self, model: ir.Model, hop: int, ranges: Mapping[str, Range]) -> None:
        self._model, self._graph, self._on, self._ranges = model, model.graph, Rows(model.graph), ranges
        strides = [node.attributes.get_ints("strides")[0] for node in self._graph if node.op_type == "ConvTranspose"]
        self._length, self._blocks = hop // math.prod(strides), len(strides)
        """Positions of a frame where the next layer reads, and blocks from there on."""
        self._snakes: dict[ir.Value, _Snake] = {}
        self._rows: dict[ir.Value, tuple[ir.Value, int]] = {}
        """Rows and channels of values that layers on rows make."""
        self._waves: dict[ir.Value, ir.Value] = {}
        """u = 2αx of values x that only a Snake reads, in rows. The layer that makes it has the factor."""
        self._ways = Counter[str]()
        self._inner: list[Read] = []

    def replace(self) -> Made:
        """See by_rows."""
        for node in list(self._graph):
            if node.op_type == "Add":
                self._add(node)
            elif node.op_type == "Conv":
                self._convolution(node)
            elif node.op_type == "ConvTranspose":
                self._blocks -= 1
                self._transposed(node)
                self._length *= node.attributes.get_ints("strides")[0]
        columns = [(value, self._on.columns(*made)) for value, made in self._rows.items()]
        self._on.finish()
        for value, made in columns:
            ir.convenience.replace_all_uses_with(value, made)
        tidy(self._model)
        return Made(dict(self._ways), self._inner)

    def _add(self, node: ir.Node) -> None:
        if snake := _snake(node):
            self._snakes[node.outputs[0]] = snake
        elif all(value in self._rows for value in node.inputs):
            (a, channels), (b, _) = (self._rows[value] for value in node.inputs)  # type: ignore[index]
            self._rows[node.outputs[0]] = self._on.op("Add", [a, b]), channels

    def _convolution(self, node: ir.Node) -> None:
        """Compute a convolution on rows if its form is known."""
        x, weight = node.inputs[0], node.inputs[1]
        (outputs, inputs, kernel), dilation = stored(weight).shape, node.attributes.get_ints("dilations")[0]
        how = way(kernel, dilation, self._length, outputs)
        if node.attributes.get_int("group", 1) != 1 or node.attributes.get_ints("strides") != (1,):
            return
        state = _state(x, (kernel - 1) * dilation) if kernel > 1 else None
        source = state.x if state else x
        if source is None or not self._is_known(source) or (state is None and kernel > 1):
            return
        y, read = node.outputs[0], self._read(source, node, inputs)
        after = self._sole_snake(y)
        gain = 2 * after.alpha if after else 1.0
        w, bias = _folded(stored(weight).transpose(2, 1, 0), stored(node.inputs[2]), read, gain)
        if state is None:
            made = self._product(read, read.rows, w, bias)
        elif read.name in self._ranges:
            w = w.reshape(1, kernel * inputs, outputs)
            made = self._product(
                read, self._on.beside(self._quantised(read, self._frames(read, state)), kernel, dilation), w, bias
            )
        else:
            layer = self._on.tiled if how == "tiles" else self._on.shifted
            made = layer(read.name, self._frames(read, state), w, bias, dilation)
            self._ways[how] += 1
        if after:
            self._waves[y] = made
            made = self._on.op("Div", [made, self._on.floats(f"{read.name}.gain", gain)])  # unless only waves are read
        self._rows[y] = made, outputs

    def _transposed(self, node: ir.Node) -> None:
        """Compute a transposed convolution on rows if its form is known."""
        x, weight = node.inputs[0], node.inputs[1]
        (inputs, outputs, kernel), stride = stored(weight).shape, node.attributes.get_ints("strides")[0]
        trimmed, state = only_reader(node.outputs[0], "Slice"), _state(x, 1)
        if kernel != 2 * stride or trimmed is None or state is None or not self._is_known(state.x):
            return
        read = self._read(state.x, node, inputs)
        w = stored(weight).reshape(inputs, outputs, 2, stride).transpose(2, 0, 3, 1).reshape(1, 2 * inputs, stride * outputs)
        w, bias = _folded(w, np.tile(stored(node.inputs[2]), stride), read)
        made = self._product(read, self._on.pairs(self._quantised(read, self._frames(read, state))), w, bias)
        self._rows[trimmed.outputs[0]] = self._on.reshape(made, -1, outputs), outputs

    def _product(self, read: Read, x: ir.Value, w: Floats, bias: Floats) -> ir.Value:
        """Return the product of a layer: in integers if the range of what it reads is known, else as floats."""
        found = self._ranges.get(read.name)
        self._ways["product" if found is None else "integers"] += 1
        if found is None:
            return self._on.product(read.name, x, w, bias)
        if x is read.rows:
            x = self._on.quantised(read.name, x, found)
        return self._on.product_of_integers(read.name, x, found, w, bias)

    def _quantised(self, read: Read, x: Frames) -> Frames:
        """Return frames in integers if their range is known."""
        if (found := self._ranges.get(read.name)) is None:
            return x
        rows, before = (self._on.quantised(read.name, part, found) for part in (x.rows, x.before))
        return replace(x, rows=rows, before=before)

    def _frames(self, read: Read, state: _State) -> Frames:
        """Return what a layer reads, and put its state after the call in the place of the graph's."""
        frames, last = self._on.frames(read, state.before, state.count, self._length)
        last.name, last.type, last.shape = state.after.name, state.after.type, state.after.shape
        state.after.name = f"{last.name}.columns"
        self._graph.outputs[list(self._graph.outputs).index(state.after)] = last
        return frames

    # ── what a layer reads ──

    def _is_known(self, value: ir.Value) -> bool:
        """Return whether a value has rows, or can get them without a transposition of its own."""
        return value in self._snakes or value in self._rows

    def _read(self, value: ir.Value, node: ir.Node, channels: int) -> Read:
        """Return what a layer reads."""
        name, snake, on = str(node.outputs[0].name), self._snakes.get(value), self._on
        scale = offset = None
        if snake is None:
            rows = self._of(value, channels)
        elif snake.is_wave:
            scale = offset = 1 / (2 * snake.alpha)
            twice = on.floats(f"{name}.twice", 2 * snake.alpha)
            u = self._waves[snake.x] if snake.x in self._waves else on.op("Mul", [self._of(snake.x, channels), twice])
            rows = on.op("Sub", [u, on.op("Cos", [u])])
        else:
            x = self._of(snake.x, channels)
            sine = on.op("Sin", [on.op("Mul", [x, on.floats(f"{name}.alpha", snake.alpha)])])
            square = on.op("Div", [on.op("Mul", [sine, sine]), on.floats(f"{name}.over", snake.alpha + 1e-9)])
            rows = on.op("Add", [x, square])
        if name in self._ranges and scale is not None:
            rows, scale = on.op("Mul", [rows, on.floats(f"{name}.factor", scale)]), np.ones(channels)
        read = Read(name, rows, channels, scale, offset)
        if self._blocks:
            self._inner.append(read)
        return read

    def _of(self, value: ir.Value, channels: int) -> ir.Value:
        """Return the rows of a value."""
        return self._rows[value][0] if value in self._rows else self._on.of_columns(value, channels)

    def _sole_snake(self, value: ir.Value) -> _Snake | None:
        """Return the Snake that alone reads a value, and can take it as 2αx."""
        readers = {node for node, _ in value.uses()}
        found = [snake for node in readers if (snake := _snake(node)) and snake.x is value]
        return found[0] if found and found[0].is_wave and found[0].nodes == readers else None


def _folded(w: Floats, bias: Floats, read: Read, gain: Floats | float = 1.0) -> tuple[Floats, Floats]:
    """Return weights [taps, inputs, outputs] and bias that read rows, and give `gain` times larger results.

    Several rows of `read` may be beside each other.
    """
    if read.scale is not None and read.offset is not None:
        beside = w.shape[1] // read.channels
        bias = bias + np.einsum("tio,i->o", w, np.tile(read.offset, beside))
        w = w * np.tile(read.scale, beside)[:, None]
    return w * gain, bias * gain


def _state(value: ir.Value | None, count: int) -> _State | None:
    """Return the state of a layer that reads `value`: Concat of state and x, of which the last `count` columns are kept."""
    join = producer(value, "Concat")
    if join is None or len(join.inputs) != 2:
        return None
    before, x = join.inputs
    if before is None or x is None or not before.is_graph_input() or before.shape is None or before.shape[2] != count:
        return None
    readers = [node for node, _ in join.outputs[0].uses()]
    kept = [node.outputs[0] for node in readers if node.op_type == "Slice" and node.outputs[0].is_graph_output()]
    return _State(before, x, kept[0], count) if len(kept) == 1 and len(readers) == 2 else None


def _snake(node: ir.Node) -> _Snake | None:
    """Return the Snake that ends in an Add; None if the nodes before it are no Snake."""
    if node.op_type != "Add":
        return None
    x, square = node.inputs
    scaled = producer(square, "Mul")
    power = scaled and producer(scaled.inputs[0], "Pow")
    sine = power and producer(power.inputs[0], "Sin")
    inner = sine and producer(sine.inputs[0], "Mul")
    if not inner or x is None or inner.inputs[1] is not x or not is_constant(inner.inputs[0]):
        return None
    return _Snake(x, stored(inner.inputs[0]).ravel(), frozenset((inner, node)))


def stored(value: ir.Value | None) -> Floats:
    """Return the numbers of a stored weight, maybe behind a cast."""
    cast = producer(value, "Cast")
    return numbers(cast.inputs[0] if cast else value).astype(np.float64)
