"""Rewriting of a portable graph into ONNX Runtime's fastest operators, for a CPU and for a CUDA device.

In the standard operators, attention over a fixed-length cache computes every row of the cache, used or not, and transposes heads.
One GroupQueryAttention replaces

    linear ─ Reshape ─ Split ┬ [RMSNorm] ─ Transpose ─ RotaryEmbedding ─────────────────┐
                             ├ [RMSNorm] ─ Transpose ─ RotaryEmbedding ─ TensorScatter ─┼ Attention ─ Transpose ─ Reshape ─
                             └──────────── Transpose ─────────────────── TensorScatter ─┘

and reads only written rows. Columns must then be consecutive: position_ids[b] = write_index[b], write_index[b] + 1, …
In the frame, whose caches begin empty, the positions of each call are constants. On a CUDA device the operator also computes the
norms of queries and keys; on a CPU it refuses them. A residual sum and the norm after it are fused, too.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from fishrt_engines.engine import ColumnInputs

from .edit import MICROSOFT, constant, is_constant, numbers, only_reader, producer, tidy

_HEAD_MULTIPLE = 16
"""With rotary positions, GroupQueryAttention requires the width of a head to be a multiple of this."""
_SWAP_HEADS = (0, 2, 1, 3)
_ROWS = "specialised.rows"
Counts = tuple[ir.Value, ir.Value]
"""int32 [batch], the last row that a call fills, and int32 [], the largest of them + 1."""


def fast_operators(model: ir.Model, *, cuda: bool = False) -> ColumnInputs | None:
    """Replace operators in place. Return the inputs of the new attention; None if no attention was replaced.

    Attention of another form stays unchanged; other operators are replaced nevertheless.
    cuda: for a CUDA device. The attention takes norms, too, and `ColumnInputs.rows` is left to the caller: computed in the graph,
    it would make the device wait for the CPU, which a CUDA graph cannot contain.
    """
    columns = _Attention(model.graph, cuda).replace()
    _fuse_residual_norms(model.graph)
    model.opset_imports[MICROSOFT] = 1
    tidy(model)
    return columns


class _Attention:
    """The replacement of attention in one graph; see the module."""

    def __init__(self, graph: ir.Graph, cuda: bool) -> None:
        self._graph, self._cuda = graph, cuda
        self._columns: ColumnInputs | None = None
        self._counts: dict[tuple[ir.Value, ...], Counts | None] = {}

    def replace(self) -> ColumnInputs | None:
        """Replace all attention of the known form. Return its inputs; None if there is none."""
        for node in list(self._graph):
            if node.op_type == "Attention":
                self._replace(node)
        return self._columns

    def _replace(self, attention: ir.Node) -> None:
        """Replace an Attention node, unless the nodes around it have another form."""
        query = producer(attention.inputs[0], "RotaryEmbedding")
        keys, values = (producer(value, "TensorScatter") for value in attention.inputs[1:3])
        rotated = keys and producer(keys.inputs[1], "RotaryEmbedding")
        merge = only_reader(attention.outputs[0], "Transpose")
        reshape = merge and only_reader(merge.outputs[0], "Reshape")
        if not (query and keys and values and rotated and merge and reshape) or query.inputs[1:] != rotated.inputs[1:]:
            return
        heads = [_before_swap(value) for value in (query.inputs[0], rotated.inputs[0], values.inputs[1])]
        split, (write_index, cos, position_ids) = _source_split(heads), (keys.inputs[2], query.inputs[1], query.inputs[3])
        if split is None or values.inputs[2] is not write_index or merge.attributes.get_ints("perm") != _SWAP_HEADS:
            return
        table = _stored(cos)
        if table is None or 2 * table.shape.numpy()[1] % _HEAD_MULTIPLE:
            return
        call: tuple[Any, Any, Any] = attention.inputs[3], position_ids, write_index
        cache: Any = keys.inputs[0]
        if call not in self._counts:  # all layers share them
            self._counts[call] = self._count_rows(*call, cache)
        counts = self._counts[call]
        if counts is None:
            return
        norms = _norms(heads[:2], 2 * table.shape.numpy()[1]) if self._cuda else []
        view, sources = producer(split.inputs[0], "Reshape"), [*(norm.inputs[0] for norm in norms), *heads[len(norms) :]]
        if view is not None and sources == list(split.outputs):
            before, packed = [], [view.inputs[0], None, None]
        else:
            norms, keep_two = [], constant(self._graph, "specialised.keep_two", [0, 0, -1], np.int64)
            before = [ir.node("Reshape", [head, keep_two]) for head in heads]
            packed = [node.outputs[0] for node in before]
        query_heads, key_heads, _ = numbers(split.inputs[1]).tolist()
        grouped = ir.node(
            "GroupQueryAttention",
            [*packed, cache, values.inputs[0], *counts, *query.inputs[1:3], *_weights(norms)],
            {
                "num_heads": query_heads,
                "kv_num_heads": key_heads,
                "do_rotary": 1,
                "rotary_interleaved": query.attributes.get_int("interleaved", 0),
                **({"qk_norm_epsilon": _epsilon(norms[0])} if norms else {}),
            },
            domain=MICROSOFT,
            num_outputs=3,
        )
        old = [node.outputs[0] for node in (reshape, keys, values)]
        ir.convenience.replace_nodes_and_values(self._graph, attention, [], [*before, grouped], old, grouped.outputs)

    def _count_rows(self, mask: ir.Value, position_ids: ir.Value, write_index: ir.Value, cache: ir.Value) -> Counts | None:
        """Return the counts of a call; None for an unknown form."""
        positions, start = _expanded(position_ids), _expanded(write_index)
        if not _is_causal(mask, position_ids, positions):
            return None
        if positions is not None and start is not None and np.array_equal(positions, start + np.arange(positions.size)):
            return self._constant_rows(write_index, positions)
        if not all(value.is_graph_input() for value in (write_index, position_ids, cache)):
            return None
        columns = ColumnInputs(str(write_index.name), str(position_ids.name))
        if self._cuda:
            columns = replace(columns, rows=_ROWS, cache=str(cache.name))
        assert self._columns is None
        self._columns = columns
        return self._given_rows(position_ids)

    def _constant_rows(self, write_index: ir.Value, positions: npt.NDArray[np.int64]) -> Counts:
        new, rows = positions.size - 1, int(positions[-1]) + 1
        tape = ir.tape.Tape()
        last = tape.op("Add", [write_index, constant(self._graph, f"specialised.{new}", new, np.int64)])
        last_row = tape.op("Cast", [last], {"to": ir.DataType.INT32})
        self._graph.extend(tape.nodes)  # `tidy` sorts them
        return last_row, constant(self._graph, f"specialised.rows.{rows}", rows, np.int32)

    def _given_rows(self, position_ids: ir.Value) -> Counts:
        tape = ir.tape.Tape()
        last = tape.op("Gather", [position_ids, constant(self._graph, "specialised.end", -1, np.int64)], {"axis": 1})
        last_row = tape.op("Cast", [last], {"to": ir.DataType.INT32})
        if self._cuda:
            rows = ir.Value(name=_ROWS, type=ir.TensorType(ir.DataType.INT32), shape=ir.Shape(()))
            self._graph.inputs.append(rows)
        else:
            longest = tape.op("ReduceMax", [last], {"keepdims": 0})
            ends = tape.op("Add", [longest, constant(self._graph, "specialised.one", 1, np.int64)])
            rows = tape.op("Cast", [ends], {"to": ir.DataType.INT32})
        self._graph.extend(tape.nodes)
        return last_row, rows


def _is_causal(mask: ir.Value, position_ids: ir.Value, positions: npt.NDArray[np.int64] | None) -> bool:
    """Return whether the mask admits exactly the cache rows up to the position of each column.

    positions: the numbers of position_ids, if they are constants; the mask may then be one, too.
    """
    if mask.is_initializer():
        seen = numbers(mask)[0, 0]
        return positions is not None and np.array_equal(seen, np.arange(seen.shape[1]) <= positions[:, None])
    compare = producer(mask, "LessOrEqual")
    inner = compare and producer(compare.inputs[1], "Unsqueeze")
    while inner and inner.inputs[0] is not position_ids:
        inner = producer(inner.inputs[0], "Unsqueeze")
    rows = compare and compare.inputs[0]
    return bool(inner and rows and (producer(rows, "Range") or rows.is_initializer()))


def _source_split(heads: list[ir.Value | None]) -> ir.Node | None:
    """Return the one Split that produces queries, keys and values, directly or through a norm; None if there is none."""
    found = []
    for value in heads:
        norm = producer(value, "RMSNormalization")
        split = producer(norm.inputs[0] if norm else value, "Split")
        if split is None or not is_constant(split.inputs[1]):
            return None
        found.append(split)
    return found[0] if all(split is found[0] for split in found) else None


def _norms(heads: list[ir.Value | None], width: int) -> list[ir.Node]:
    """Return the norms of queries and keys; none unless both are over the `width` numbers of a head and have one epsilon."""
    norms = [norm for value in heads if (norm := producer(value, "RMSNormalization"))]
    weights = [_stored(norm.inputs[1]) for norm in norms]
    fit = all(weight is not None and weight.shape.numpy() == (width,) for weight in weights)
    fit &= all(norm.attributes.get_int("axis", -1) in (-1, 3) for norm in norms)
    return norms if len(norms) == len(heads) and fit and len({_epsilon(norm) for norm in norms}) == 1 else []


def _weights(norms: list[ir.Node]) -> list[ir.Value | None]:
    """Return the weights of norms, after the inputs that are left out before them. They have the type of what they weigh."""
    return [*[None] * 5, *(norm.inputs[1] for norm in norms)] if norms else []


def _epsilon(norm: ir.Node) -> float:
    return norm.attributes.get_float("epsilon", 1e-5)


def _stored(value: ir.Value | None) -> ir.TensorProtocol | None:
    """Return the tensor of an initializer, maybe behind a Cast."""
    cast = producer(value, "Cast")
    source = cast.inputs[0] if cast else value
    return None if source is None else source.const_value


def _expanded(value: ir.Value) -> npt.NDArray[np.int64] | None:
    """Return the numbers of a constant that is expanded to the batch; None for another value."""
    expand = producer(value, "Expand")
    source = expand.inputs[0] if expand else None
    return numbers(source).ravel() if source is not None and source.is_initializer() else None


def _before_swap(value: ir.Value | None) -> ir.Value | None:
    swap = producer(value, "Transpose")
    return swap.inputs[0] if swap and swap.attributes.get_ints("perm") == _SWAP_HEADS else None


def _fuse_residual_norms(graph: ir.Graph) -> None:
    """Fuse each Add and the RMSNormalization after it into one operator that returns both the sum and its norm."""
    for norm in list(graph):
        added = producer(norm.inputs[0], "Add") if norm.op_type == "RMSNormalization" else None
        if added is None or norm.attributes.get_int("axis", -1) != -1 or any(is_constant(value) for value in added.inputs):
            continue  # the fused operator adds two activations; it does not broadcast a bias
        total = ir.Value()
        fused = ir.node(
            "SkipSimplifiedLayerNormalization",
            [*added.inputs, norm.inputs[1]],
            {"epsilon": _epsilon(norm)},
            domain=MICROSOFT,
            outputs=[ir.Value(), ir.Value(name=""), ir.Value(name=""), total],
        )
        old = [norm.outputs[0], added.outputs[0]]
        ir.convenience.replace_nodes_and_values(graph, added, [norm, added], [fused], old, [fused.outputs[0], total])
