"""Checks of a graph against the documented rules of TensorRT's ONNX importer, with neither TensorRT nor a GPU.

A finding names the node, the rule and the source of the rule. The importer, or a later step of a build, refuses a node with an
"error". It accepts a node with a "note", but the node may behave otherwise than expected or is not documented to work. A graph
without errors may still fail to build: the checks follow the documentation of 11.0, not TensorRT itself. If the documentation
leaves the element types of an operator open, the narrower reading applies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..engine import GraphSpec
from .graph_edit import attribute
from .graph_types import UNKNOWN, Value, declared, dtype_name, infer
from .onnx_proto import parse_model
from .tensorrt_operators import DATA, DATA_DEPENDENT, FLOATS, OPERATORS, RANDOM, UNSUPPORTED

IMPORTER = "operator table of the ONNX importer, 11.0"
TYPES = "strong typing, TensorRT 11"
CACHE = "documentation of KVCacheUpdate"
QUANTISED = "documentation of the Dequantize layer"
REPORTED = "reported by users of TensorRT 11"

OPSETS = range(9, 25)
"""Opsets that 11.0 reads; later releases read one more."""
TOP_K = 3840
"""Exclusive upper bound of K."""
INT4_BLOCKS = (64, 128)
"""Documented block sizes of int4 weights."""

_NETWORK = {*FLOATS, "int32", "int64", "bool", "uint8"}
"""Element types of a network's inputs and outputs."""
_STORED = {"int8", "int4", "float8e4m3fn", "float4e2m1"}
"""Element types that only DequantizeLinear may read and only QuantizeLinear may produce."""
_SCALES = {*FLOATS, "float8e4m3fn", "float8e8m0"}


@dataclass(frozen=True, slots=True)
class Finding:
    """A property of a graph that TensorRT refuses, or treats otherwise than expected."""

    severity: str
    """"error" or "note"."""
    node: str
    """Name of the node; "" for the whole graph."""
    operator: str
    rule: str
    """Short name of the rule."""
    text: str
    source: str
    """Source of the rule."""

    def __str__(self) -> str:
        where = f"{self.operator} {self.node}: ".lstrip() if self.node else ""
        return f"{self.severity}: {where}{self.text} ({self.rule}; {self.source})"


def check_for_tensorrt(model: bytes, spec: GraphSpec) -> list[Finding]:
    """Return the findings on a graph, errors first.

    model: bytes of the graph file, described by `spec`. A portable graph has errors until it is lowered; see tensorrt.
    Raises GraphError for bytes that are no graph.
    """
    parsed = parse_model(model, spec.file)
    states = {pair.input: pair.output for pair in spec.states}
    found = [*_opsets(parsed), *_network(parsed.graph), *_Graph(parsed.graph, states).check()]
    return sorted(found, key=lambda finding: finding.severity)


def errors(findings: list[Finding]) -> list[Finding]:
    """Return the errors among findings."""
    return [finding for finding in findings if finding.severity == "error"]


def _opsets(model: Any) -> Iterator[Finding]:
    for opset in model.opset_import:
        if not opset.domain and opset.version not in OPSETS:
            severity = "note" if opset.version == OPSETS[-1] + 1 else "error"
            text = f"opset {opset.version}; {OPSETS[0]} to {OPSETS[-1]} are read"
            yield Finding(severity, "", "", "opset", text, IMPORTER)


def _network(graph: Any) -> Iterator[Finding]:
    initializers = {tensor.name for tensor in graph.initializer}
    for value in (*graph.input, *graph.output):
        dtype = declared(value).dtype
        if value.name not in initializers and dtype not in _NETWORK:
            yield Finding("error", value.name, "", "type", f"an input or output of a network cannot be {dtype}", TYPES)


class _Graph:
    """A graph, or the body of a loop or branch in it."""

    def __init__(self, graph: Any, states: Mapping[str, str], outer: _Graph | None = None) -> None:
        self.graph, self.states = graph, states
        self.values: dict[str, Value] = infer(graph, outer.values if outer else None)
        self.inputs = {} if outer else {value.name: declared(value) for value in graph.input}
        self.outputs = set() if outer else {value.name for value in graph.output}
        constant = {name for node in graph.node if node.op_type == "Constant" for name in node.output}
        self.tensors: dict[str, Any] = {
            **(outer.tensors if outer else {}),
            **{tensor.name: tensor for tensor in graph.initializer},
        }
        self.constants: set[str] = {*(outer.constants if outer else ()), *self.tensors, *constant}
        self._noted_batch = False

    def check(self) -> Iterator[Finding]:
        for node in self.graph.node:
            yield from _Node(self, node).check()
            for body in node.attribute:
                if body.HasField("g"):
                    yield from _Graph(body.g, self.states, self).check()

    def first_batch(self) -> bool:
        """Return True in the first call only: one note about the batch is enough for all caches."""
        first, self._noted_batch = not self._noted_batch, True
        return first


class _Node:
    """One node and the known facts of its inputs."""

    def __init__(self, graph: _Graph, node: Any) -> None:
        self.graph, self.node = graph, node
        self.inputs = [graph.values.get(name, UNKNOWN) for name in node.input]

    def check(self) -> Iterator[Finding]:
        op_type = self.node.op_type
        if self.node.domain not in ("", "ai.onnx"):
            yield self.error("operator", f"the importer does not document operators of {self.node.domain}", IMPORTER)
        elif op_type in RANDOM:
            yield self.error("operator", "seeds are ignored: feed random numbers as an input", IMPORTER)
        elif op_type in UNSUPPORTED:
            yield self.error("operator", "is not supported", IMPORTER)
        elif op_type not in OPERATORS:
            yield self.error("operator", "is not in fishrt's table of the importer's operators", IMPORTER)
        else:
            if op_type in DATA_DEPENDENT:
                yield self.note("shape", "the size of its result depends on the data: no CUDA graph can contain it", IMPORTER)
            yield from self._types()
            yield from _CHECKS.get(op_type, _nothing)(self)

    def _types(self) -> Iterator[Finding]:
        """Check element types of inputs and results."""
        op_type = self.node.op_type
        allowed, data = OPERATORS[op_type], self.inputs[DATA.get(op_type, slice(0, 1))]
        known = {value.dtype for value in data if value.dtype is not None}
        for refused in sorted(known - allowed - {"float64"}):
            yield self.error("type", f"does not accept {refused}", IMPORTER)
        if len(known) > 1:
            yield self.error("type", f"its inputs have different types: {', '.join(sorted(known))}", TYPES)
        made = {name: self.graph.values[name].dtype for name in self.node.output if name}
        if "float64" in {*known, *made.values()}:
            yield self.note("type", "float64 becomes float32", IMPORTER)
        for name, dtype in made.items():
            inside = dtype == "uint8" and name not in self.graph.outputs
            if inside or not (dtype in (None, "uint8", "float64") or dtype in _NETWORK or dtype in _STORED):
                yield self.error("type", f"produces {dtype}, which a network cannot hold internally", TYPES)
        if op_type not in ("DequantizeLinear", "Cast"):
            for value in data:
                if value.dtype in _STORED:
                    yield self.error("type", f"reads {value.dtype} without a DequantizeLinear", TYPES)

    def error(self, rule: str, text: str, source: str) -> Finding:
        return self._finding("error", rule, text, source)

    def note(self, rule: str, text: str, source: str) -> Finding:
        return self._finding("note", rule, text, source)

    def _finding(self, severity: str, rule: str, text: str, source: str) -> Finding:
        name = self.node.name or next(iter(self.node.output), "")
        return Finding(severity, name, self.node.op_type, rule, text, source)

    def given(self, place: int) -> str:
        """Return the name of an input; "" if it is omitted."""
        return str(self.node.input[place]) if place < len(self.node.input) else ""

    def value(self, place: int) -> Value:
        """Return the known facts of an input."""
        return self.inputs[place] if self.given(place) else UNKNOWN

    def ranks(self, place: int, *ranks: int) -> Iterator[Finding]:
        """Check that the rank of an input is one of `ranks`."""
        shape = self.value(place).shape
        if not self.given(place):
            return
        wanted = " or ".join(map(str, ranks))
        if shape is None:
            yield self.error("rank", f"{self.given(place)} must have {wanted} axes; its rank is unknown", IMPORTER)
        elif len(shape) not in ranks:
            yield self.error("rank", f"{self.given(place)} has {len(shape)} axes instead of {wanted}", IMPORTER)

    def constant(self, place: int, what: str) -> Iterator[Finding]:
        """Check that an input is known when the engine is built."""
        if self.given(place) and self.given(place) not in self.graph.constants:
            yield self.error("constant", f"{what} must be an initializer", IMPORTER)


def _nothing(_node: _Node) -> Iterator[Finding]:
    yield from ()


def _attention(node: _Node) -> Iterator[Finding]:
    for place in range(4):
        yield from node.ranks(place, 4)
    for place, what in enumerate(("past_key", "past_value", "nonpad_kv_seqlen"), 4):
        if node.given(place):
            yield node.error("input", f"{what} is not supported", IMPORTER)
    if any(node.node.output[1:]):
        yield node.error("output", "present_key, present_value and qk_matmul_output are not supported", IMPORTER)
    if attribute(node.node, "softcap", 0.0):
        yield node.error("attribute", "softcap is not supported", IMPORTER)
    if attribute(node.node, "softmax_precision", 0):
        yield node.error("attribute", "softmax_precision is not supported", IMPORTER)
    if attribute(node.node, "is_causal", 0):
        yield node.note("attribute", "is_causal counts from the first key in older builds: wrong after a prefix", REPORTED)
    query, mask = node.value(0).dtype, node.value(3).dtype
    if mask not in (None, "bool", query):
        yield node.error("type", f"a mask is of bool or of the queries' type, {query}, not {mask}", TYPES)
    if query == "float16":
        yield node.note("precision", "in float16, a long masked prefix gives errors of 0.16; compute it in float32", REPORTED)


def _rotary(node: _Node) -> Iterator[Finding]:
    yield from node.ranks(0, 4)
    yield from node.ranks(1, 2 if node.given(3) else 3)
    yield from node.ranks(2, 2 if node.given(3) else 3)
    if node.given(3) and node.value(3).dtype not in (None, "int64"):
        yield node.error("type", f"position_ids are int64, not {node.value(3).dtype}", IMPORTER)


def _tensor_scatter(node: _Node) -> Iterator[Finding]:
    cache, result = node.given(0), node.node.output[0]
    yield from node.ranks(0, 4)
    yield from node.ranks(1, 4)
    if attribute(node.node, "axis", -2) != -2:
        yield node.error("attribute", f"axis is {attribute(node.node, 'axis', -2)}; it must be written as -2", IMPORTER)
    if _string(node.node, "mode", "linear") != "linear":
        yield node.error("attribute", "mode must be linear", CACHE)
    if not node.given(2):
        yield node.error("input", "write_indices must be given", CACHE)
    elif node.value(2).dtype not in (None, "int32", "int64"):
        yield node.error("type", f"write_indices are int32 or int64, not {node.value(2).dtype}", CACHE)
    shape = node.graph.inputs[cache].shape if cache in node.graph.inputs else None
    if shape is None:
        yield node.error("cache", f"the cache {cache} must be an input of the network", CACHE)
    elif len(shape) == 4:
        if None in shape[1:]:
            yield node.error("cache", f"the cache {cache} must have a fixed number of rows", CACHE)
        if shape[0] is None and node.graph.first_batch():
            yield node.note("cache", "a variable batch size is neither documented nor excluded", CACHE)
    if result not in node.graph.outputs:
        yield node.error("cache", f"the updated cache {result} must be an output of the network", CACHE)
    elif shape is not None and node.graph.states.get(cache) != result:
        yield node.error("cache", f"{cache} and {result} share memory, but are not described as one state", CACHE)


def _dequantize(node: _Node) -> Iterator[Finding]:
    data, scale = node.value(0), node.value(1)
    if data.dtype is not None and data.dtype not in _STORED:
        yield node.error("quantised", f"weights are {data.dtype}; supported are int8, int4, fp8 and fp4", QUANTISED)
    if scale.dtype is not None and scale.dtype not in _SCALES:
        yield node.error("quantised", f"scales of {scale.dtype} are not supported", QUANTISED)
    made = node.graph.values[node.node.output[0]].dtype
    if scale.dtype in ("float16", "bfloat16") and made != scale.dtype:
        yield node.error("quantised", f"scales of {scale.dtype} produce {scale.dtype}, not {made}", QUANTISED)
    yield from _no_zero_point(node)
    if data.shape is None or scale.shape is None or None in data.shape or None in scale.shape:
        yield node.error("quantised", "the sizes of weights and scales must be known", QUANTISED)
    elif len(scale.shape) > 1:
        yield from _blocks(node, [d or 0 for d in data.shape], [d or 0 for d in scale.shape])
    elif len(scale.shape) == 1 and scale.shape[0] != data.shape[attribute(node.node, "axis", 1)]:
        yield node.error("quantised", "there must be one scale for each channel", QUANTISED)


def _blocks(node: _Node, data: list[int], scale: list[int]) -> Iterator[Finding]:
    differ = [axis for axis, sizes in enumerate(zip(data, scale, strict=False)) if sizes[0] != sizes[1]]
    if len(data) != len(scale) or not all(scale):
        yield node.error("quantised", f"scales {scale} do not fit weights {data}", QUANTISED)
        return
    if len(differ) > 1 or any(axis < len(data) - 2 for axis in differ):
        text = "scales may differ from the weights in one size, the last or the one before it"
        yield node.error("quantised", f"{text}; they are {scale} for {data}", QUANTISED)
        return
    axis = differ[0] if differ else attribute(node.node, "axis", 1) % len(data)
    block = data[axis] // scale[axis]
    if data[axis] % scale[axis] or block != attribute(node.node, "block_size", 0):
        yield node.error("quantised", f"blocks of {attribute(node.node, 'block_size', 0)} do not divide {data[axis]}", QUANTISED)
    elif axis != attribute(node.node, "axis", 1) % len(data):
        yield node.error("quantised", "blocks lie along another axis than the node's", QUANTISED)
    elif node.value(0).dtype == "int4" and block not in INT4_BLOCKS:
        known = " and ".join(map(str, INT4_BLOCKS))
        yield node.note("quantised", f"int4 in blocks of {block}; documented are {known}", QUANTISED)
    elif node.value(0).dtype == "int8":
        yield node.note("quantised", "int8 weights in blocks: a smaller file, but no faster kernel is documented", QUANTISED)


def _no_zero_point(node: _Node) -> Iterator[Finding]:
    if not node.given(2):
        return
    tensor = node.graph.tensors.get(node.given(2))
    if tensor is None or tensor.external_data or any(tensor.raw_data) or any(tensor.int32_data):
        yield node.error("quantised", "zero points must be zero: leave them out", QUANTISED)


def _top_k(node: _Node) -> Iterator[Finding]:
    yield from node.constant(1, "K")
    if not attribute(node.node, "sorted", 1):
        yield node.error("attribute", "sorted must be 1", IMPORTER)
    content = node.value(1).content
    if content and content[0] is not None and content[0] >= TOP_K:
        yield node.error("attribute", f"K is {content[0]}; it must be less than {TOP_K}", IMPORTER)


def _scatter_nd(node: _Node) -> Iterator[Finding]:
    if _string(node.node, "reduction", "none") != "none":
        yield node.error("attribute", "reduction must be none", IMPORTER)


def _layer_norm(node: _Node) -> Iterator[Finding]:
    if any(node.node.output[1:]):
        yield node.error("output", "only the first output is supported", IMPORTER)


def _loop(node: _Node) -> Iterator[Finding]:
    text = {
        "If": "both branches must produce values of the same rank under different names",
        "Loop": "carried values must keep their shape, and collected values must have a constant length",
        "Scan": "carried values must keep their shape",
    }[node.node.op_type]
    yield node.note("control flow", f"{text}, which is not checked; no CUDA graph can contain it", IMPORTER)


def _cast(node: _Node) -> Iterator[Finding]:
    dtype = dtype_name(attribute(node.node, "to", 0))
    if node.value(0).dtype in ("int4", "float4e2m1") or dtype in ("int4", "float4e2m1"):
        yield node.error("type", f"no cast between {node.value(0).dtype} and {dtype} is supported", IMPORTER)


def _needs(place: int, what: str) -> Callable[[_Node], Iterator[Finding]]:
    return lambda node: node.constant(place, what)


def _string(node: Any, name: str, default: str) -> str:
    return next((found.s.decode() for found in node.attribute if found.name == name), default)


_CHECKS: dict[str, Callable[[_Node], Iterator[Finding]]] = {
    "Attention": _attention,
    "Cast": _cast,
    "Conv": lambda node: node.ranks(0, 3, 4, 5),
    "ConvTranspose": lambda node: node.ranks(0, 3, 4, 5),
    "CumSum": _needs(1, "the axis"),
    "DequantizeLinear": _dequantize,
    "If": _loop,
    "LayerNormalization": _layer_norm,
    "Loop": _loop,
    "OneHot": _needs(1, "the depth"),
    "QuantizeLinear": _no_zero_point,
    "RotaryEmbedding": _rotary,
    "Scan": _loop,
    "ScatterND": _scatter_nd,
    "TensorScatter": _tensor_scatter,
    "TopK": _top_k,
    **{op_type: _needs(1, "axes") for op_type in OPERATORS if op_type.startswith("Reduce")},
}
