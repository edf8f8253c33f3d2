"""Rewriting of a portable graph into ONNX Runtime's fastest operators, for a CPU and for a CUDA device.

In the standard operators, attention over a fixed-length cache computes every row of the cache, used or not, and transposes heads.
One GroupQueryAttention replaces

    linear ─ Reshape ─ Split ┬ [RMSNorm] ─ Transpose ─ RotaryEmbedding ─────────────────┐
                             ├ [RMSNorm] ─ Transpose ─ RotaryEmbedding ─ TensorScatter ─┼ Attention ─ Transpose ─ Reshape ─
                             └──────────── Transpose ─────────────────── TensorScatter ─┘

and reads only written rows. Columns must then be consecutive: position_ids[b] = write_index[b], write_index[b] + 1, …
A residual sum and the norm after it are fused, too. Weights are untouched: they stay in their own file.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..engine import ColumnInputs
from .graph_edit import GraphEditor, attribute, ints
from .onnx_proto import TENSOR_INT32, int64_tensor, int64_values, message, node

MICROSOFT = "com.microsoft"
_HEAD_MULTIPLE = 16
"""With rotary positions, GroupQueryAttention requires the width of a head to be a multiple of this."""
_SWAP_HEADS = [0, 2, 1, 3]
_ROWS = "specialised.rows"


def specialise(model_bytes: bytes, *, feed_rows: bool = False) -> tuple[bytes, ColumnInputs | None]:
    """Return the bytes of the rewritten graph file, and the inputs of its new attention; None if no attention was replaced.

    Attention of another form stays unchanged; other operators are rewritten nevertheless.
    feed_rows: leave `ColumnInputs.rows` to the caller. Computed in the graph, it would make a device wait for the CPU, which a
    CUDA graph cannot contain.
    """
    editor = GraphEditor(message("Model").FromString(model_bytes))
    columns = _Attention(editor, feed_rows).replace()
    _fuse_residual_norms(editor)
    editor.use_opset(MICROSOFT, 1)
    return editor.finish(), columns


class _Attention:
    """The replacement of attention in one graph; see the module."""

    def __init__(self, editor: GraphEditor, feed_rows: bool) -> None:
        self._edit = editor
        self._feed_rows = feed_rows
        self._shapes = {name: [d.dim_value for d in i.type.tensor_type.shape.dim] for name, i in editor.inputs.items()}
        self._columns: ColumnInputs | None = None

    def replace(self) -> ColumnInputs | None:
        """Replace all attention of the known form. Return its inputs; None if there is none."""
        replaced = []
        for n in self._edit.nodes:
            made = self._grouped_query_attention(n) if n.op_type == "Attention" else None
            replaced += made or [n]
        if self._columns is not None:
            replaced = [*self._lengths(self._columns), *replaced]
        self._edit.nodes = replaced
        self._edit.index()
        return self._columns

    def _grouped_query_attention(self, attention: Any) -> list[Any] | None:
        """Return the nodes that replace an Attention node; None if the nodes around it have another form."""
        query = self._edit.made_by(attention.input[0], "RotaryEmbedding")
        keys, values = (self._edit.made_by(name, "TensorScatter") for name in attention.input[1:3])
        rotated = keys and self._edit.made_by(keys.input[1], "RotaryEmbedding")
        merge = self._edit.only_reader(attention.output[0], "Transpose", _SWAP_HEADS)
        reshape = merge and self._edit.only_reader(merge.output[0], "Reshape")
        if not (query and keys and values and rotated and reshape) or list(query.input[1:]) != list(rotated.input[1:]):
            return None
        heads = [self._before_swap(name) for name in (query.input[0], rotated.input[0], values.input[1])]
        cache = self._shapes.get(keys.input[0])
        columns = ColumnInputs(keys.input[2], query.input[3])
        known = all(name in self._shapes for name in (columns.write_index, columns.position_ids))
        split = self._source_split(heads)
        causal = self._is_causal(attention.input[3], columns.position_ids)
        if not (split and known and causal and values.input[2] == columns.write_index) or not cache or cache[3] % _HEAD_MULTIPLE:
            return None
        if self._feed_rows:
            columns = replace(columns, rows=_ROWS, cache=self._columns.cache if self._columns else keys.input[0])
        assert self._columns in (None, columns)
        self._columns = columns
        sizes = int64_values(self._edit.constants[split.input[1]])
        view = self._edit.made_by(split.input[0], "Reshape")
        before: list[Any] = []
        if view is not None and heads == list(split.output):
            packed = [view.input[0], "", ""]
        else:
            packed = [f"{name}.rows" for name in heads]
            before = [
                node("Reshape", [str(name), "specialised.keep_two"], [flat]) for name, flat in zip(heads, packed, strict=True)
            ]
            self._edit.constant(int64_tensor("specialised.keep_two", [0, 0, -1]))
        grouped = node(
            "GroupQueryAttention",
            [*packed, keys.input[0], values.input[0], "specialised.last_row", _ROWS, *query.input[1:3]],
            [reshape.output[0], keys.output[0], values.output[0]],
            domain=MICROSOFT,
            num_heads=sizes[0],
            kv_num_heads=cache[1],
            do_rotary=1,
            rotary_interleaved=attribute(query, "interleaved", 0),
        )
        # The new node produces these outputs.
        for old in (keys, values, reshape):
            old.output[0] = f"{old.output[0]}.replaced"
        return [*before, grouped]

    def _is_causal(self, mask: str, position_ids: str) -> bool:
        """Return whether the mask admits exactly the cache rows up to the position of each column."""
        compare = self._edit.made_by(mask, "LessOrEqual")
        inner = compare and self._edit.made_by(compare.input[1], "Unsqueeze")
        while inner and inner.input[0] != position_ids:
            inner = self._edit.made_by(inner.input[0], "Unsqueeze")
        rows = compare and (self._edit.made_by(compare.input[0], "Range") or compare.input[0] in self._edit.constants)
        return bool(inner and rows)

    def _lengths(self, columns: ColumnInputs) -> list[Any]:
        """Return nodes for int32 "specialised.last_row" [batch], the last row that a call fills, and its maximum + 1."""
        self._edit.constant(int64_tensor("specialised.end", [-1], scalar=True))
        last = [
            node("Gather", [columns.position_ids, "specialised.end"], ["specialised.last"], axis=1),
            node("Cast", ["specialised.last"], ["specialised.last_row"], to=TENSOR_INT32),
        ]
        if self._feed_rows:
            added = self._edit.graph.input.add(name=_ROWS)
            added.type.tensor_type.elem_type = TENSOR_INT32
            added.type.tensor_type.shape.SetInParent()
            return last
        self._edit.constant(int64_tensor("specialised.one", [1], scalar=True))
        return [
            *last,
            node("ReduceMax", ["specialised.last"], ["specialised.longest"], keepdims=0),
            node("Add", ["specialised.longest", "specialised.one"], ["specialised.ends"]),
            node("Cast", ["specialised.ends"], [_ROWS], to=TENSOR_INT32),
        ]

    def _source_split(self, heads: list[str | None]) -> Any:
        """Return the one Split that produces queries, keys and values, directly or through a norm; None if there is none."""
        found = []
        for name in heads:
            norm = name and self._edit.made_by(name, "RMSNormalization")
            split = name and self._edit.made_by(norm.input[0] if norm else name, "Split")
            if not split or split.input[1] not in self._edit.constants:
                return None
            found.append(split)
        return found[0] if all(split is found[0] for split in found) else None

    def _before_swap(self, name: str) -> str | None:
        swap = self._edit.made_by(name, "Transpose")
        return swap.input[0] if swap and ints(swap, "perm") == _SWAP_HEADS else None


def _fuse_residual_norms(editor: GraphEditor) -> None:
    """Fuse each Add and the RMSNormalization after it into one operator that returns both the sum and its norm."""
    for at, n in enumerate(editor.nodes):
        if n.op_type != "RMSNormalization":
            continue
        added = editor.made_by(n.input[0], "Add")
        if attribute(n, "axis", -1) != -1 or added is None or any(editor.is_constant(name) for name in added.input):
            continue  # the fused operator adds two activations; it does not broadcast a bias
        total = added.output[0]
        editor.nodes[at] = node(
            "SkipSimplifiedLayerNormalization",
            [*added.input, n.input[1]],
            [n.output[0], "", "", total],
            domain=MICROSOFT,
            epsilon=float(attribute(n, "epsilon", 1e-5)),
        )
        added.output[0] = f"{total}.replaced"
    editor.index()
