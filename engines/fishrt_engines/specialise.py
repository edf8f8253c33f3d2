"""A portable graph → the same graph in the operators that ONNX Runtime is fastest with on a CPU.

Attention over a fixed-length cache costs time for every row of the cache in the standard operators, used or not, and copies heads
about. One GroupQueryAttention takes the place of

    linear ─ Reshape ─ Split ┬ [RMSNorm] ─ Transpose ─ RotaryEmbedding ─────────────────┐
                             ├ [RMSNorm] ─ Transpose ─ RotaryEmbedding ─ TensorScatter ─┼ Attention ─ Transpose ─ Reshape ─
                             └──────────── Transpose ─────────────────── TensorScatter ─┘

and reads only rows that are written. Columns must then follow each other: position_ids[b] = write_index[b], write_index[b] + 1, …
Residual sums and the norms behind them become one operator, too. Weights are untouched: they stay in the file beside the graph.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .onnx_proto import TENSOR_INT32, int64_tensor, int64_values, message, node

MICROSOFT = "com.microsoft"
_HEAD_MULTIPLE = 16
"""GroupQueryAttention with rotary positions takes heads of such widths only."""
_SWAP_HEADS = [0, 2, 1, 3]


@dataclass(frozen=True, slots=True)
class ColumnInputs:
    """The inputs that tell where the columns of a call go, by name, of a graph whose attention was replaced."""

    write_index: str
    """int64 [batch]"""
    position_ids: str
    """int64 [batch, length]"""


def specialise(model_bytes: bytes) -> tuple[bytes, ColumnInputs | None]:
    """The bytes of a graph file, rewritten, and, if attention was replaced, the inputs on which it now depends.

    A graph without such attention, or with another form of it, comes back with what else could be replaced.
    """
    model = message("Model").FromString(model_bytes)
    rewriter = _Rewriter(model.graph)
    rewriter.replace_attention()
    rewriter.fuse_residual_norms()
    rewriter.remove_unused()
    if not any(opset.domain == MICROSOFT for opset in model.opset_import):
        model.opset_import.add(domain=MICROSOFT, version=1)
    return model.SerializeToString(), rewriter.columns


class _Rewriter:
    """One graph and who makes and reads its values."""

    def __init__(self, graph: Any) -> None:
        self.graph = graph
        self.columns: ColumnInputs | None = None
        self._nodes: list[Any] = list(graph.node)
        self._outputs = _outer_names(graph)
        self._shapes = {i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in graph.input}
        self._constants = {t.name: t for t in graph.initializer}
        self._index()

    def _index(self) -> None:
        self._maker = {name: n for n in self._nodes for name in n.output if name}
        self._readers: dict[str, list[Any]] = {}
        for n in self._nodes:
            for name in n.input:
                self._readers.setdefault(name, []).append(n)

    def replace_attention(self) -> None:
        """See the module. Nodes that become unused are left for `remove_unused`."""
        replaced = []
        for n in self._nodes:
            made = self._grouped_query_attention(n) if n.op_type == "Attention" else None
            replaced += made or [n]
        if self.columns is not None:
            replaced = [*self._lengths(self.columns), *replaced]
        self._nodes = replaced
        self._index()

    def _grouped_query_attention(self, attention: Any) -> list[Any] | None:
        """What takes the place of an Attention node; None where its surroundings are not as expected."""
        query = self._made_by(attention.input[0], "RotaryEmbedding")
        keys, values = (self._made_by(name, "TensorScatter") for name in attention.input[1:3])
        rotated = keys and self._made_by(keys.input[1], "RotaryEmbedding")
        merge = self._only_reader(attention.output[0], "Transpose", _SWAP_HEADS)
        reshape = merge and self._only_reader(merge.output[0], "Reshape")
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
        assert self.columns in (None, columns)
        self.columns = columns
        sizes = int64_values(self._constants[split.input[1]])
        view = self._made_by(split.input[0], "Reshape")
        before: list[Any] = []
        if view is not None and heads == list(split.output):
            packed = [view.input[0], "", ""]
        else:
            packed = [f"{name}.rows" for name in heads]
            before = [
                node("Reshape", [str(name), "specialised.keep_two"], [flat]) for name, flat in zip(heads, packed, strict=True)
            ]
            self._constant(int64_tensor("specialised.keep_two", [0, 0, -1]))
        grouped = node(
            "GroupQueryAttention",
            [*packed, keys.input[0], values.input[0], "specialised.last_row", "specialised.total", *query.input[1:3]],
            [reshape.output[0], keys.output[0], values.output[0]],
            domain=MICROSOFT,
            num_heads=sizes[0],
            kv_num_heads=cache[1],
            do_rotary=1,
            rotary_interleaved=_attribute(query, "interleaved"),
        )
        # Their outputs now come from the new node.
        for old in (keys, values, reshape):
            old.output[0] = f"{old.output[0]}.replaced"
        return [*before, grouped]

    def _is_causal(self, mask: str, position_ids: str) -> bool:
        """Whether the mask is: rows of the cache up to the position of a column."""
        compare = self._made_by(mask, "LessOrEqual")
        inner = compare and self._made_by(compare.input[1], "Unsqueeze")
        while inner and inner.input[0] != position_ids:
            inner = self._made_by(inner.input[0], "Unsqueeze")
        rows = compare and (self._made_by(compare.input[0], "Range") or compare.input[0] in self._constants)
        return bool(inner and rows)

    def _lengths(self, columns: ColumnInputs) -> list[Any]:
        """int32 "specialised.last_row" [batch]: the last row that a call fills; "specialised.total": rows of the longest."""
        self._constant(int64_tensor("specialised.one", [1]))
        return [
            node("Shape", [columns.position_ids], ["specialised.length"], start=1, end=2),
            node("Add", [columns.write_index, "specialised.length"], ["specialised.ends"]),
            node("Sub", ["specialised.ends", "specialised.one"], ["specialised.last"]),
            node("Cast", ["specialised.last"], ["specialised.last_row"], to=TENSOR_INT32),
            node("ReduceMax", ["specialised.ends"], ["specialised.longest"], keepdims=0),
            node("Cast", ["specialised.longest"], ["specialised.total"], to=TENSOR_INT32),
        ]

    def fuse_residual_norms(self) -> None:
        """Add, RMSNormalization → one operator that gives both the sum and its norm."""
        for at, n in enumerate(self._nodes):
            if n.op_type != "RMSNormalization":
                continue
            axis, epsilon = _attribute(n, "axis"), _attribute(n, "epsilon")
            added = self._made_by(n.input[0], "Add")
            if axis != -1 or added is None or any(self._is_constant(name) for name in added.input):
                continue  # the operator adds two activations; it does not spread out a bias
            total = added.output[0]
            self._nodes[at] = node(
                "SkipSimplifiedLayerNormalization",
                [*added.input, n.input[1]],
                [n.output[0], "", "", total],
                domain=MICROSOFT,
                epsilon=float(epsilon),
            )
            added.output[0] = f"{total}.replaced"
        self._index()

    def remove_unused(self) -> None:
        """Drops nodes whose results nobody reads, and writes the others back in an order in which values are made before use."""
        wanted, kept = set(self._outputs), []
        for n in reversed(_sorted(self._nodes)):
            if wanted.intersection(n.output):
                kept.append(n)
                wanted.update(n.input)
        del self.graph.node[:]
        self.graph.node.extend(reversed(kept))
        used = [t for t in self.graph.initializer if t.name in wanted]
        del self.graph.initializer[:]
        self.graph.initializer.extend(used)

    def _is_constant(self, name: str) -> bool:
        maker = self._maker.get(name)
        if maker is not None and maker.op_type in ("Cast", "DequantizeLinear"):
            return maker.input[0] in self._constants
        return name in self._constants

    def _source_split(self, heads: list[str | None]) -> Any:
        """The one Split from which queries, keys and values come, perhaps through a norm."""
        found = []
        for name in heads:
            norm = name and self._made_by(name, "RMSNormalization")
            split = name and self._made_by(norm.input[0] if norm else name, "Split")
            if not split or split.input[1] not in self._constants:
                return None
            found.append(split)
        return found[0] if all(split is found[0] for split in found) else None

    def _before_swap(self, name: str) -> str | None:
        swap = self._made_by(name, "Transpose")
        return swap.input[0] if swap and _ints(swap, "perm") == _SWAP_HEADS else None

    def _made_by(self, name: str, op_type: str) -> Any:
        maker = self._maker.get(name)
        return maker if maker is not None and maker.op_type == op_type else None

    def _only_reader(self, name: str, op_type: str, perm: list[int] | None = None) -> Any:
        readers = self._readers.get(name, [])
        fits = len(readers) == 1 and readers[0].op_type == op_type and name not in self._outputs
        return readers[0] if fits and (perm is None or _ints(readers[0], "perm") == perm) else None

    def _constant(self, tensor: Any) -> None:
        if tensor.name not in self._constants:
            self._constants[tensor.name] = tensor
            self.graph.initializer.append(tensor)


def _outer_names(graph: Any) -> set[str]:
    return {value.name for value in graph.output}


def _sorted(nodes: Iterable[Any]) -> list[Any]:
    """In topological order: each node after the makers of its inputs."""
    waiting = list(nodes)
    makers = {name for n in waiting for name in n.output if name}
    made: set[str] = set()
    done: list[Any] = []
    while waiting:
        ready = [n for n in waiting if all(name in made or name not in makers for name in n.input)]
        if not ready:
            raise ValueError("the graph has a cycle")
        for n in ready:
            done.append(n)
            made.update(n.output)
        names = {id(n) for n in ready}
        waiting = [n for n in waiting if id(n) not in names]
    return done


def _attribute(n: Any, name: str) -> Any:
    for attribute in n.attribute:
        if attribute.name == name:
            return attribute.f if attribute.type == 1 else attribute.i
    return {"axis": -1, "epsilon": 1e-5, "interleaved": 0}[name]


def _ints(n: Any, name: str) -> list[int]:
    return next((list(attribute.ints) for attribute in n.attribute if attribute.name == name), [])
