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
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ..edit import is_constant, numbers, only_reader, producer, tidy
from .rows import OUTPUTS, Floats, Frames, Read, Rows, tile_count

LEAST_ALPHA = 0.01
"""A Snake keeps its sine if an |α| is below this: the error of u − cos u, 6e-8, is divided by 2α."""
LEAST_CHANNELS = 64
"""A layer with fewer stays as it is: rows save products, of which it has few, and move each number more often."""
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


def by_rows(model: ir.Model, hop: int) -> dict[str, int]:
    """Replace a decoder's layers in place. Return the number of convolutions by the way that they are computed.

    hop: samples of a frame.
    """
    return _Decoder(model, hop).replace()


def way(kernel: int, dilation: int, length: int, inputs: int, outputs: int) -> str | None:
    """Return how a convolution is computed: as a "product", in "tiles" or by "shifts"; None: it stays.

    length: positions of a frame.
    """
    if min(inputs, outputs if outputs > 1 else inputs) < LEAST_CHANNELS:
        return None
    if kernel == 1:
        return "product"
    rows = (OUTPUTS + kernel - 1) * tile_count(length, dilation) * dilation
    return "tiles" if outputs > 1 and rows <= MOST_ROWS * kernel * length else "shifts"


class _Decoder:
    def __init__(self, model: ir.Model, hop: int) -> None:
        self._model, self._graph, self._on = model, model.graph, Rows(model.graph)
        strides = [node.attributes.get_ints("strides")[0] for node in self._graph if node.op_type == "ConvTranspose"]
        self._length = hop // math.prod(strides)
        self._snakes: dict[ir.Value, _Snake] = {}
        self._rows: dict[ir.Value, tuple[ir.Value, int]] = {}
        """Rows and channels of values that layers on rows make."""
        self._waves: dict[ir.Value, ir.Value] = {}
        """u = 2αx of values x that only a Snake reads, in rows. The layer that makes it has the factor."""
        self._ways = Counter[str]()

    def replace(self) -> dict[str, int]:
        """See by_rows."""
        for node in list(self._graph):
            if node.op_type == "Add":
                self._add(node)
            elif node.op_type == "Conv" and (how := self._convolution(node)):
                self._ways[how] += 1
            elif node.op_type == "ConvTranspose":
                if self._transposed(node):
                    self._ways["product"] += 1
                self._length *= node.attributes.get_ints("strides")[0]
        columns = [(value, self._on.columns(*made)) for value, made in self._rows.items()]
        self._on.finish()
        for value, made in columns:
            ir.convenience.replace_all_uses_with(value, made)
        tidy(self._model)
        return dict(self._ways)

    def _add(self, node: ir.Node) -> None:
        if snake := _snake(node):
            self._snakes[node.outputs[0]] = snake
        elif all(value in self._rows for value in node.inputs):
            (a, channels), (b, _) = (self._rows[value] for value in node.inputs)  # type: ignore[index]
            self._rows[node.outputs[0]] = self._on.op("Add", [a, b]), channels

    def _convolution(self, node: ir.Node) -> str | None:
        """Compute a convolution on rows. Return how; None if it stays."""
        x, weight = node.inputs[0], node.inputs[1]
        (outputs, inputs, kernel), dilation = _stored(weight).shape, node.attributes.get_ints("dilations")[0]
        how = way(kernel, dilation, self._length, inputs, outputs)
        if how is None or node.attributes.get_int("group", 1) != 1 or node.attributes.get_ints("strides") != (1,):
            return None
        state = _state(x, (kernel - 1) * dilation) if kernel > 1 else None
        source = state.x if state else x
        if source is None or not self._is_known(source) or (state is None and kernel > 1):
            return None
        y, read = node.outputs[0], self._read(source, node, inputs)
        after = self._sole_snake(y)
        gain = 2 * after.alpha if after else None
        w, bias = _folded(_stored(weight).transpose(2, 1, 0), _stored(node.inputs[2]), read.scale, gain)
        if state is None:
            made = self._on.product(read.name, read.rows, w, bias)
        else:
            layer = self._on.tiled if how == "tiles" else self._on.shifted
            made = layer(read.name, self._frames(read, state), w, bias, dilation)
        if gain is not None:
            self._waves[y] = made
            made = self._on.op("Div", [made, self._on.floats(f"{read.name}.gain", gain)])  # unless only waves are read
        self._rows[y] = made, outputs
        return how

    def _transposed(self, node: ir.Node) -> bool:
        """Compute a transposed convolution on rows. Return False if it stays."""
        x, weight = node.inputs[0], node.inputs[1]
        (inputs, outputs, kernel), stride = _stored(weight).shape, node.attributes.get_ints("strides")[0]
        trimmed, state = only_reader(node.outputs[0], "Slice"), _state(x, 1)
        if outputs < LEAST_CHANNELS or kernel != 2 * stride or trimmed is None or state is None or not self._is_known(state.x):
            return False
        read = self._read(state.x, node, inputs)
        w = _stored(weight).reshape(inputs, outputs, 2, stride).transpose(2, 0, 3, 1).reshape(1, 2 * inputs, stride * outputs)
        scale = None if read.scale is None else np.tile(read.scale, 2)
        w, bias = _folded(w, np.tile(_stored(node.inputs[2]), stride), scale)
        made = self._on.product(read.name, self._on.pairs(self._frames(read, state)), w, bias)
        self._rows[trimmed.outputs[0]] = self._on.reshape(made, -1, outputs), outputs
        return True

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
        name, snake = str(node.outputs[0].name), self._snakes.get(value)
        if snake is None:
            return Read(name, self._of(value, channels), channels)
        if snake.x in self._waves:
            u = self._waves[snake.x]
        elif snake.is_wave:
            u = self._on.op("Mul", [self._of(snake.x, channels), self._on.floats(f"{name}.twice", 2 * snake.alpha)])
        else:
            x, alpha = self._of(snake.x, channels), self._on.floats(f"{name}.alpha", snake.alpha)
            sine = self._on.op("Sin", [self._on.op("Mul", [x, alpha])])
            square = self._on.op("Div", [self._on.op("Mul", [sine, sine]), self._on.floats(f"{name}.over", snake.alpha + 1e-9)])
            return Read(name, self._on.op("Add", [x, square]), channels)
        return Read(name, self._on.op("Sub", [u, self._on.op("Cos", [u])]), channels, 1 / (2 * snake.alpha))

    def _of(self, value: ir.Value, channels: int) -> ir.Value:
        """Return the rows of a value."""
        return self._rows[value][0] if value in self._rows else self._on.of_columns(value, channels)

    def _sole_snake(self, value: ir.Value) -> _Snake | None:
        """Return the Snake that alone reads a value, and can take it as 2αx."""
        readers = {node for node, _ in value.uses()}
        found = [snake for node in readers if (snake := _snake(node)) and snake.x is value]
        return found[0] if found and found[0].is_wave and found[0].nodes == readers else None


def _folded(w: Floats, bias: Floats, scale: Floats | None, gain: Floats | None = None) -> tuple[Floats, Floats]:
    """Return weights [taps, inputs, outputs] and bias that read (x + 1) · scale, and give `gain` times larger results."""
    if scale is not None:
        w = w * scale[:, None]
        bias = bias + w.sum(axis=(0, 1))
    return (w, bias) if gain is None else (w * gain, bias * gain)


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
    return _Snake(x, _stored(inner.inputs[0]).ravel(), frozenset((inner, node)))


def _stored(value: ir.Value | None) -> Floats:
    """Return the numbers of a stored weight, maybe behind a cast."""
    cast = producer(value, "Cast")
    return numbers(cast.inputs[0] if cast else value).astype(np.float64)
