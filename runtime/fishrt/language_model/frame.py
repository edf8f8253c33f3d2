"""The frame graph: sampling and the fast AR at all of its positions in one graph, so that a frame costs two launches on a device.

    slow AR's logits ─► main token ─► code 0 ─► fast AR ─► draw ─► code 1 ─► fast AR ─► … ─► column
    noise, windows, settings ──┴──────────┴──────────────────┘

It is built from the file of the fast AR: it repeats the nodes for each position and shares the weights. It repeats the arithmetic
of `sampling` on the same noise, so both give the same codes. A frame begins with an empty cache.

If a code cannot be drawn, the column holds one of the negative values below.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fishrt_engines.engine import Dim, GraphSpec, TensorSpec
from fishrt_engines.rewrite.graph_edit import GraphEditor
from fishrt_engines.rewrite.onnx_proto import CODES, array_tensor, node, parse_model, value_info

from ..bundle.features import LanguageModel
from .sampling import main_ids

NOT_NUMBERS, TOO_MANY = -1, -2
"""A logit is NaN or +inf, or all are -inf; more than MOST_RANKED tokens are within top_p and top_k."""
MOST_RANKED = 3839
"""Most of the likeliest tokens that are ranked: TensorRT sorts no more."""


def frame_spec(slow: GraphSpec, fast: GraphSpec, lm: LanguageModel) -> GraphSpec:
    """Return the inputs and outputs of the frame graph, which has no state.

    main_noise, code_noise: noise for each draw of a main token (two draws with repetition-aware sampling) and of each code.
    recent: main tokens that repetition-aware sampling draws again; -1 stands for none. penalised_main, penalised_codes: indices
    of logits, maybe repeated; one past the last stands for none. least_code: codes below it are not drawn.
    """
    n = len(main_ids(lm))
    aware, penalty = lm.sampling.repetition_aware, lm.sampling.repetition_penalty
    by_name = {t.name: t for t in (*slow.outputs, *fast.inputs)}
    feeds: list[tuple[str, str, tuple[Dim, ...]]] = [
        ("logits", "float32", by_name["logits"].shape),
        ("hidden", "float32", by_name["hidden"].shape),
        ("main_noise", "float32", ("batch", 2 if aware else 1, n)),
        ("code_noise", "float32", ("batch", drawn_codes(lm), lm.fast_candidates)),
        ("temperature", "float32", ("batch", 1)),
        ("top_p", "float32", ("batch", 1)),
        ("top_k", "int64", ("batch", 1)),
    ]
    if aware:
        feeds.append(("recent", "int64", ("batch", aware.window)))
    if penalty:
        feeds.append(("penalty", "float32", ("batch", 1)))
        feeds.append(("penalised_codes", "int64", ("batch", lm.num_codebooks, penalty.window)))
    if penalty and penalty.main != "none":
        tokens = penalty.window if penalty.main == "row" else 1 + lm.num_codebooks
        feeds.append(("penalised_main", "int64", ("batch", tokens)))
    if lm.code_offset:
        feeds.append(("least_code", "int64", ("batch", 1)))
    return GraphSpec(
        file="frame.onnx",
        inputs=tuple(TensorSpec(*feed) for feed in feeds if 0 not in feed[2]),
        outputs=(TensorSpec("column", "int64", ("batch", 1 + lm.num_codebooks)),),
    )


def drawn_codes(lm: LanguageModel) -> int:
    """Return how many codes of a frame the fast AR draws: all, or all but the first."""
    return lm.num_codebooks - (lm.code_zero == "main")


def frame_model(fast_model: bytes, fast: GraphSpec, spec: GraphSpec, lm: LanguageModel) -> bytes:
    """Return the bytes of the frame graph, made from those of the fast AR's file. spec: from `frame_spec`."""
    return _Frame(GraphEditor(parse_model(fast_model, fast.file)), fast, spec, lm).build()


def frame_graph(graphs: Mapping[str, GraphSpec], lm: LanguageModel) -> tuple[GraphSpec, Callable[[bytes], bytes]]:
    """Return the spec of a bundle's frame graph, and the function that makes the graph from the bytes of the fast AR's file."""
    spec = frame_spec(graphs["slow_ar"], graphs["fast_ar"], lm)
    return spec, lambda model: frame_model(model, graphs["fast_ar"], spec, lm)


@dataclass(frozen=True, slots=True)
class _Ranked:
    """Candidates [batch, n], the likeliest first."""

    logits: str
    order: str
    """int64: their indices in the logits."""
    mass: str
    """float64: cumulative probability, the candidate included, times `total`."""
    total: str
    count: int
    """Number of ranked candidates."""
    of: int
    """Number of all candidates."""


class _Frame:
    """Builder of the frame graph. Values are passed by name; those of one token or code are [batch, 1]."""

    def __init__(self, editor: GraphEditor, fast: GraphSpec, spec: GraphSpec, lm: LanguageModel) -> None:
        self._edit, self._fast, self._spec, self._lm = editor, fast, spec, lm
        self._feeds = {t.name for t in spec.inputs}
        self._nodes: list[Any] = []
        self._repeated: list[Any] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._count = 0

    def build(self) -> bytes:
        fixed = {"", *self._edit.constants}
        for n in self._edit.nodes:  # nodes that depend on constants alone are not repeated
            if fixed.issuperset(n.input):
                fixed.update(n.output)
                self._nodes.append(n)
            else:
                self._repeated.append(n)
        known = self._lm.num_codebooks - drawn_codes(self._lm)
        self._batch = self._add("Shape", ["hidden"], start=0, end=1)
        main = self._main()
        codes = [self._code_zero(main)] if known else []
        caches = {t.name: self._filled(np.zeros((), np.float32), t.shape[1:]) for t in self._fast.state_tensors}
        for codebook in range(known, self._lm.num_codebooks):
            first = codebook == known
            fed = [self._filled(np.zeros((), np.int64), (1,)), *codes] if first else codes[-1:]
            logits = self._fast_ar(codebook + 1 - len(fed), self._concat(fed), len(fed), caches)
            codes.append(self._code(logits, codebook, codebook - known))
        column = self._concat([main, *codes])
        self._nodes.append(node("Identity", [column], ["column"]))
        for declared, tensors in ((self._edit.graph.input, self._spec.inputs), (self._edit.graph.output, self._spec.outputs)):
            del declared[:]
            declared.extend(value_info(t.name, t.dtype, t.shape) for t in tensors)
        self._edit.outputs = {value.name: value for value in self._edit.graph.output}
        self._edit.nodes = self._nodes
        return self._edit.finish()

    def _fast_ar(self, start: int, codes: str, length: int, caches: dict[str, str]) -> str:
        """Add the fast AR's nodes for positions from `start` on, update `caches`, and return the logits [batch, width]."""
        names = {
            "hidden": "hidden",
            "codes": codes,
            "position_ids": self._filled(np.arange(start, start + length)[None], (length,)),
            "write_index": self._filled(np.array(start, np.int64), ()),
            **caches,
        }
        for n in self._repeated:
            copy = type(n).FromString(n.SerializeToString())
            copy.name = f"{n.name}.at_{start}"
            copy.input[:] = [names.get(name, name) for name in n.input]
            copy.output[:] = [f"{name}.at_{start}" if name else "" for name in n.output]
            names |= zip(n.output, copy.output, strict=True)
            self._nodes.append(copy)
        for pair in self._fast.states:
            caches[pair.input] = names[pair.output]
        return names["logits"]

    def _main(self) -> str:
        """Add the nodes that draw the main token, and return it."""
        lm, ids = self._lm, main_ids(self._lm)
        logits = "logits"
        if lm.head == "full" and lm.main_tokens == "audio":
            logits = self._add("Gather", [logits, self._constant(ids)], axis=1)
        if "penalised_main" in self._feeds:
            logits = self._penalised(logits, "penalised_main", len(ids))
        ranked = self._rank(logits, len(ids))
        token = self._token(self._draw(ranked, self._noise("main_noise", 0), "temperature", "top_p"), ids)
        aware = lm.sampling.repetition_aware
        if aware is None:
            return token
        settings = (self._constant(np.float32(value)) for value in (max(aware.temperature, 1e-5), aware.top_p))
        again = self._token(self._draw(ranked, self._noise("main_noise", 1), *settings), ids)
        same = self._add("Cast", [self._add("Equal", [token, "recent"])], to=CODES["int32"])
        count = self._add("ReduceMax", [same, self._constant(np.array([1], np.int64))], keepdims=1)
        repeated = self._add("And", [self._add("Cast", [count], to=CODES["bool"]), self._is_semantic(token)])
        return self._add("Where", [repeated, again, token])

    def _token(self, place: str, ids: np.ndarray[Any, Any]) -> str:
        """Return the tokens at indices of the logits; negative values stay."""
        nought = self._constant(np.int64(0))
        token = self._add("Gather", [self._constant(ids), self._add("Max", [place, nought])], axis=0)
        return self._add("Where", [self._add("Less", [place, nought]), place, token])

    def _is_semantic(self, token: str) -> str:
        begin, end = (self._constant(np.int64(i)) for i in (self._lm.semantic_begin_id, self._lm.semantic_end_id))
        return self._add("And", [self._add("GreaterOrEqual", [token, begin]), self._add("LessOrEqual", [token, end])])

    def _code_zero(self, main: str) -> str:
        begin, end = self._lm.semantic_begin_id, self._lm.semantic_end_id
        clipped = self._add("Min", [self._add("Max", [main, self._constant(np.int64(begin))]), self._constant(np.int64(end))])
        code = self._add("Sub", [clipped, self._constant(np.int64(begin))])
        return self._add("Min", [code, self._constant(np.int64(self._lm.codebook_width - 1))])

    def _code(self, logits: str, codebook: int, draw: int) -> str:
        n = self._lm.fast_candidates
        if n < self._lm.codebook_width:
            logits = self._slice(logits, 0, n, 1)
        if "penalty" in self._feeds:
            places = self._add("Gather", ["penalised_codes", self._constant(np.int64(codebook))], axis=1)
            logits = self._penalised(logits, places, n)
        if "least_code" in self._feeds:
            forbidden = self._add("Less", [self._constant(np.arange(n)[None]), "least_code"])
            logits = self._add("Where", [forbidden, self._constant(np.float32(-np.inf)), logits])
        return self._draw(self._rank(logits, n), self._noise("code_noise", draw), "temperature", "top_p")

    def _penalised(self, logits: str, places: str, n: int) -> str:
        """See `sampling.penalised`. An index n stands for none."""
        one = self._constant(np.float32(1))
        none = self._filled(np.float32(0), (n + 1,))
        ones = self._add("Expand", [one, self._add("Shape", [places])])
        marked = self._slice(self._add("ScatterElements", [none, places, ones], axis=1), 0, n, 1)
        hit = self._add("Cast", [marked], to=CODES["bool"])
        below = self._add("Less", [logits, self._constant(np.float32(0))])
        weaker = self._add("Where", [below, self._add("Mul", [logits, "penalty"]), self._add("Div", [logits, "penalty"])])
        return self._add("Where", [hit, weaker, logits])

    def _rank(self, logits: str, n: int) -> _Ranked:
        count = min(n, MOST_RANKED)
        ranked, order = self._add_two("TopK", [logits, self._constant(np.array([count], np.int64))], axis=-1)
        first = self._slice(ranked, 0, 1, 1)
        weights = self._exp(logits, first)
        total = self._add("ReduceSum", [weights, self._constant(np.array([1], np.int64))], keepdims=1)
        mass = self._add("CumSum", [self._exp(ranked, first), self._constant(np.int64(1))])
        return _Ranked(ranked, order, mass, total, count, n)

    def _exp(self, logits: str, first: str) -> str:
        return self._add("Cast", [self._add("Exp", [self._add("Sub", [logits, first])])], to=CODES["float64"])

    def _draw(self, ranked: _Ranked, noise: str, temperature: str, top_p: str) -> str:
        """Return the drawn index, int64, or NOT_NUMBERS, TOO_MANY. See `sampling.sample`."""
        limit = self._add("Mul", [ranked.total, self._add("Cast", [top_p], to=CODES["float64"])])
        within = self._add("LessOrEqual", [ranked.mass, limit])
        allowed = self._add("Less", [self._constant(np.arange(ranked.count)[None]), "top_k"])
        kept = self._add("And", [within, allowed])
        first = np.arange(ranked.count)[None] == 0
        scaled = self._add("Div", [ranked.logits, temperature])
        weights = self._add("Exp", [self._add("Sub", [scaled, self._slice(scaled, 0, 1, 1)])])
        chosen = self._add("Where", [self._add("Or", [kept, self._constant(first)]), weights, self._constant(np.float32(0))])
        raced = self._add("Div", [chosen, self._add("GatherElements", [noise, ranked.order], axis=1)])
        winner = self._add("ArgMax", [raced], axis=1, keepdims=1)
        place = self._add("GatherElements", [ranked.order, winner], axis=1)
        if ranked.count < ranked.of:
            more = self._slice(kept, ranked.count - 1, ranked.count, 1)
            wanted = self._add("Less", [self._constant(np.int64(ranked.count)), "top_k"])
            place = self._add("Where", [self._add("And", [more, wanted]), self._constant(np.int64(TOO_MANY)), place])
        numbers = self._add("LessOrEqual", [ranked.total, self._constant(np.float64(ranked.of + 1))])  # false for NaN
        return self._add("Where", [numbers, place, self._constant(np.int64(NOT_NUMBERS))])

    def _noise(self, feed: str, draw: int) -> str:
        return self._add("Gather", [feed, self._constant(np.int64(draw))], axis=1)

    def _slice(self, name: str, start: int, end: int, axis: int) -> str:
        return self._add("Slice", [name, *(self._constant(np.array([value], np.int64)) for value in (start, end, axis))])

    def _concat(self, names: list[str]) -> str:
        return self._add("Concat", names, axis=1) if len(names) > 1 else names[0]

    def _filled(self, value: Any, shape: tuple[Dim, ...]) -> str:
        """Return `value`, which broadcasts to [1, *shape], expanded to [batch, *shape]."""
        rest = [self._constant(np.array(shape, np.int64))] if shape else []
        return self._add("Expand", [self._constant(np.asarray(value)), self._add("Concat", [self._batch, *rest], axis=0)])

    def _constant(self, value: Any) -> str:
        array = np.asarray(value)
        key = array.dtype.name, array.shape, array.tobytes()
        if key not in self._constants:
            self._constants[key] = self._edit.constant(array_tensor(f"frame.constant.{len(self._constants)}", array))
        return self._constants[key]

    def _add(self, op_type: str, inputs: list[str], **attributes: Any) -> str:
        self._count += 1
        name = f"frame.{op_type}.{self._count}"
        self._nodes.append(node(op_type, inputs, [name], **attributes))
        return name

    def _add_two(self, op_type: str, inputs: list[str], **attributes: Any) -> tuple[str, str]:
        values = self._add(op_type, inputs, **attributes)
        self._nodes[-1].output.append(f"{values}.places")
        return values, f"{values}.places"
