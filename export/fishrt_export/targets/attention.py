"""Rewriting of a portable graph into ONNX Runtime's fastest operators, for a CPU and for a CUDA device.

In the standard operators, attention over a fixed-length cache computes every row of the cache, used or not, and transposes heads.
One GroupQueryAttention replaces

    linear ─ Reshape ─ Split ┬ [RMSNorm] ─ Transpose ─ RotaryEmbedding ─────────────────┐
                             ├ [RMSNorm] ─ Transpose ─ RotaryEmbedding ─ TensorScatter ─┼ Attention ─ Transpose ─ Reshape ─
                             └──────────── Transpose ─────────────────── TensorScatter ─┘

and reads only written rows. Columns must then be consecutive: position_ids[b] = write_index[b], write_index[b] + 1, …
A residual sum and the norm after it are fused, too.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from fishrt_engines.engine import ColumnInputs

from .edit import MICROSOFT, constant, is_constant, numbers, only_reader, producer, tidy

_HEAD_MULTIPLE = 16
"""With rotary positions, GroupQueryAttention requires the width of a head to be a multiple of this."""
_SWAP_HEADS = (0, 2, 1, 3)
_ROWS = "specialised.rows"


def fast_operators(model: ir.Model, *, feed_rows: bool = False) -> ColumnInputs | None:
    """Replace operators in place. Return the inputs of the new attention; None if no attention was replaced.

    Attention of another form stays unchanged; other operators are replaced nevertheless.
    feed_rows: leave `ColumnInputs.rows` to the caller. Computed in the graph, it would make a device wait for the CPU, which a
    CUDA graph cannot contain.
    """
    columns = _Attention(model.graph, feed_rows).replace()
    _fuse_residual_norms(model.graph)
    model.opset_imports[MICROSOFT] = 1
    tidy(model)
    return columns


class _Attention:
    """The replacement of attention in one graph; see the module."""

    def __init__(self, graph: ir.Graph, feed_rows: bool) -> None:
        self._graph, self._feed_rows = graph, feed_rows
        self._columns: ColumnInputs | None = None
        self._last_row: ir.Value | None = None
        self._rows: ir.Value | None = None

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
        write_index, position_ids, cache = keys.inputs[2], query.inputs[3], keys.inputs[0]
        split = _source_split(heads)
        if not split or not _is_causal(attention.inputs[3], position_ids) or merge.attributes.get_ints("perm") != _SWAP_HEADS:
            return
        if values.inputs[2] is not write_index or not all(
            value is not None and value.is_graph_input() for value in (write_index, position_ids, cache)
        ):
            return
        assert write_index is not None
        assert position_ids is not None
        assert cache is not None
        assert cache.shape is not None
        key_heads, width = cache.shape[1], cache.shape[3]
        assert isinstance(key_heads, int)
        assert isinstance(width, int)
        if width % _HEAD_MULTIPLE:
            return
        self._count_rows(str(write_index.name), position_ids, str(cache.name))
        view = producer(split.inputs[0], "Reshape")
        if view is not None and heads == list(split.outputs):
            before, packed = [], [view.inputs[0], None, None]
        else:
            keep_two = constant(self._graph, "specialised.keep_two", [0, 0, -1], np.int64)
            before = [ir.node("Reshape", [head, keep_two]) for head in heads]
            packed = [node.outputs[0] for node in before]
        grouped = ir.node(
            "GroupQueryAttention",
            [*packed, cache, values.inputs[0], self._last_row, self._rows, *query.inputs[1:3]],
            {
                "num_heads": int(numbers(split.inputs[1])[0]),
                "kv_num_heads": key_heads,
                "do_rotary": 1,
                "rotary_interleaved": query.attributes.get_int("interleaved", 0),
            },
            domain=MICROSOFT,
            num_outputs=3,
        )
        old = [node.outputs[0] for node in (reshape, keys, values)]
        ir.convenience.replace_nodes_and_values(self._graph, attention, [], [*before, grouped], old, grouped.outputs)

    def _count_rows(self, write_index: str, position_ids: ir.Value, cache: str) -> None:
        """Make the int32 values `_last_row` [batch], the last row that a call fills, and `_rows` [], its maximum + 1, once."""
        columns = ColumnInputs(write_index, str(position_ids.name))
        if self._feed_rows:
            columns = replace(columns, rows=_ROWS, cache=self._columns.cache if self._columns else cache)
        assert self._columns in (None, columns)
        if self._columns is not None:
            return
        self._columns = columns
        tape = ir.tape.Tape()
        last = tape.op("Gather", [position_ids, constant(self._graph, "specialised.end", -1, np.int64)], {"axis": 1})
        self._last_row = tape.op("Cast", [last], {"to": ir.DataType.INT32})
        if self._feed_rows:
            self._rows = ir.Value(name=_ROWS, type=ir.TensorType(ir.DataType.INT32), shape=ir.Shape(()))
            self._graph.inputs.append(self._rows)
        else:
            longest = tape.op("ReduceMax", [last], {"keepdims": 0})
            ends = tape.op("Add", [longest, constant(self._graph, "specialised.one", 1, np.int64)])
            self._rows = tape.op("Cast", [ends], {"to": ir.DataType.INT32})
        self._graph.insert_before(self._graph[0], tape.nodes)


def _is_causal(mask: ir.Value | None, position_ids: ir.Value | None) -> bool:
    """Return whether the mask admits exactly the cache rows up to the position of each column."""
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
            {"epsilon": norm.attributes.get_float("epsilon", 1e-5)},
            domain=MICROSOFT,
            outputs=[ir.Value(), ir.Value(name=""), ir.Value(name=""), total],
        )
        old = [norm.outputs[0], added.outputs[0]]
        ir.convenience.replace_nodes_and_values(graph, added, [norm, added], [fused], old, [fused.outputs[0], total])
