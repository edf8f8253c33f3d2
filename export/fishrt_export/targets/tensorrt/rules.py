"""Checks of a lowered graph against the documented rules of TensorRT's ONNX importer, with neither TensorRT nor a GPU.

The rules are those that a lowered graph of a bundle could break: the operators and types of TensorRT 11, masks, positions,
caches, quantised weights, and values that must be known when a plan is built. A finding names the node, the rule and its source.
The importer, or a later step of a build, refuses a node with an "error". It accepts a node with a "note", but the node may behave
otherwise than expected or is not documented to work. A graph without errors may still fail to build.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from fishrt.bundle.features import LanguageModel
from fishrt.bundle.folder import Bundle
from fishrt_engines.engine import GraphSpec
from fishrt_engines.trt.plans import PRECISIONS, LoweringOptions

from ...errors import ExportError
from ..edit import infer, load, numbers
from .lowering import FORMS, lower_for_tensorrt

IMPORTER = "operator table of the ONNX importer, TensorRT 11"
TYPES = "strong typing, TensorRT 11"
CACHE = "documentation of KVCacheUpdate"
QUANTISED = "documentation of the Dequantize layer"
REPORTED = "reported by users of TensorRT 11"

OPSETS = range(9, 25)
"""Opsets that all releases of TensorRT 11 read; later ones read one more."""
TOP_K = 3840
"""Exclusive upper bound of K."""
INT4_BLOCKS = (64, 128)
"""Documented block sizes of int4 weights."""

_FLOATS = {"float32", "float16", "bfloat16"}
_NUMBERS = _FLOATS | {"int32", "int64"}
_ALL = _NUMBERS | {"bool"}
_TABLE = [
    (_FLOATS, "Attention* ConvTranspose* Conv* CumSum Exp Gelu LayerNormalization* Log Reciprocal RMSNormalization*"),
    (_FLOATS, "RotaryEmbedding* Round Sigmoid Cos Sin Softmax Sqrt Tanh TensorScatter* Clip*"),
    (_NUMBERS, "Add* ArgMax Div* Gemm* GreaterOrEqual* Less* LessOrEqual* MatMul* Max* Min* Mul* Pad Pow* Range* ReduceL2"),
    (_NUMBERS, "ReduceMax ReduceSum Sub* TopK"),
    (_ALL, "Cast Concat* ConstantOfShape Equal* Expand Gather GatherElements Identity Reshape ScatterElements Shape Slice"),
    (_ALL, "Split Squeeze Transpose Unsqueeze Where*"),
    ({"bool"}, "And* Or*"),
    ({"int8", "int4"}, "DequantizeLinear"),
]
"""Element types, and the operators of bundles whose data accept them. All data of an operator with a star have one type."""
_OPERATORS = {op_type.rstrip("*"): types for types, names in _TABLE for op_type in names.split()}
_DATA = {op_type.rstrip("*"): slice(None) for _, names in _TABLE for op_type in names.split() if op_type.endswith("*")}
_DATA |= {"Attention": slice(0, 3), "RotaryEmbedding": slice(0, 3), "TensorScatter": slice(0, 2), "Where": slice(1, 3)}
"""Positions of an operator's data inputs. Default: the first."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A property of a graph that TensorRT refuses, or treats otherwise than expected."""

    severity: str
    """"error" or "note"."""
    node: str
    """Name of the node; "" for the whole graph. A note names the first of several nodes."""
    operator: str
    rule: str
    """Short name of the rule."""
    text: str
    source: str
    """Source of the rule."""

    def __str__(self) -> str:
        where = f"{self.operator} {self.node}: ".lstrip() if self.node else ""
        return f"{self.severity}: {where}{self.text} ({self.rule}; {self.source})"


Issue = tuple[str, str, str, str]
"""Severity, rule, text and source of a finding."""


def tensorrt_findings(bundle: Bundle) -> dict[str, list[Finding]]:
    """Return the findings on each lowered graph, by role; "frame" is the frame graph, if the bundle has forms for TensorRT.

    The model's graphs are checked in every precision, the codec's in float32, in which they stay. A graph that cannot be
    lowered is an error. Raises ExportError for a damaged file.
    """
    manifest, found = bundle.manifest, dict[str, list[Finding]]()
    specs, model = dict(manifest.specs), manifest.model
    max_len = model.max_seq_len if isinstance(model, LanguageModel) else None  # a diffusion model has no caches
    if "fast_ar" in specs and (frame := manifest.graphs["fast_ar"].form("tensorrt", ())):
        specs["frame"] = frame.spec
    for role, spec in specs.items():
        of_role: dict[Finding, None] = {}
        for precision in ["fp32"] if role.startswith("codec") else PRECISIONS:
            graph = load(bundle.file(spec.file))
            options = LoweringOptions(max_len, precision, precision == "fp16", primitive_attention=False)
            try:
                of_role |= dict.fromkeys(check_for_tensorrt(graph, lower_for_tensorrt(graph, spec, options, FORMS[0])))
            except ExportError as error:
                of_role[Finding("error", "", "", "lowering", str(error), "fishrt")] = None
        found[role] = sorted(of_role, key=lambda finding: finding.severity)
    return found


def check_for_tensorrt(model: ir.Model, spec: GraphSpec) -> list[Finding]:
    """Return the findings on a graph that `spec` describes, errors first. Raises ExportError if types cannot be inferred."""
    infer(model)
    states = {pair.input: pair.output for pair in spec.states}
    found = [Finding(*issue[:1], "", "", *issue[1:]) for issue in _of_graph(model)]
    noted: set[Issue] = set()
    for node in model.graph:
        for issue in _of_node(node, states):
            if issue[0] == "error" or issue not in noted:
                found.append(Finding(issue[0], node.name or str(node.outputs[0].name), node.op_type, *issue[1:]))
                noted.add(issue)
    return sorted(found, key=lambda finding: finding.severity)


def errors(findings: list[Finding]) -> list[Finding]:
    """Return the errors among findings."""
    return [finding for finding in findings if finding.severity == "error"]


def _of_graph(model: ir.Model) -> Iterator[Issue]:
    opset = model.opset_imports.get("", OPSETS[-1])
    if opset not in OPSETS:
        severity = "note" if opset == OPSETS[-1] + 1 else "error"
        yield severity, "opset", f"opset {opset}; {OPSETS[0]} to {OPSETS[-1]} are read", IMPORTER
    for value in (*model.graph.inputs, *model.graph.outputs):
        if _type(value) not in _ALL:
            yield "error", "type", f"{value.name}, an input or output of the network, cannot be {_type(value)}", TYPES


def _of_node(node: ir.Node, states: Mapping[str, str]) -> Iterator[Issue]:
    if node.domain or node.op_type not in _OPERATORS:
        yield "error", "operator", f"{node.domain} {node.op_type} is not in fishrt's table of operators".lstrip(), IMPORTER
        return
    data = {_type(value) for value in node.inputs[_DATA.get(node.op_type, slice(0, 1))] if value is not None}
    for refused in sorted(data - _OPERATORS[node.op_type]):
        yield "error", "type", f"does not accept {refused}", IMPORTER
    if len(data) > 1:
        yield "error", "type", f"its inputs have different types: {', '.join(sorted(data))}", TYPES
    if node.op_type in _CHECKS:
        yield from _CHECKS[node.op_type](node)
    elif node.op_type == "TensorScatter":
        yield from _tensor_scatter(node, states)
    place, what = (1, "axes") if node.op_type.startswith("Reduce") else _KNOWN.get(node.op_type, (0, ""))
    known = _input(node, place) if place else None
    if known is not None and not known.is_initializer():
        yield "error", "constant", f"{what} must be an initializer", IMPORTER


def _attention(node: ir.Node) -> Iterator[Issue]:
    yield from _ranks(node, {0: 4, 1: 4, 2: 4, 3: 4})
    if any(node.inputs[4:]) or len(node.outputs) > 1:
        yield "error", "input", "takes queries, keys, values and a mask, and gives one result", IMPORTER
    for name in ("softcap", "softmax_precision"):
        if name in node.attributes and node.attributes[name].value:
            yield "error", "attribute", f"{name} is not supported", IMPORTER
    if node.attributes.get_int("is_causal", 0):
        yield "note", "attribute", "is_causal counts from the first key in older builds: wrong after a prefix", REPORTED
    query, mask = _type(node.inputs[0]), _type(_input(node, 3))
    if mask not in ("", "bool", query):
        yield "error", "type", f"a mask is of bool or of the queries' type, {query}, not {mask}", TYPES
    if query == "float16":
        yield "note", "precision", "in float16, a long masked prefix gives errors of 0.16; compute it in float32", REPORTED


def _rotary(node: ir.Node) -> Iterator[Issue]:
    positions = _input(node, 3)
    yield from _ranks(node, {0: 4} | dict.fromkeys((1, 2), 3 if positions is None else 2))
    if positions is not None and _type(positions) != "int64":
        yield "error", "type", f"position_ids are int64, not {_type(positions)}", IMPORTER


def _tensor_scatter(node: ir.Node, states: Mapping[str, str]) -> Iterator[Issue]:
    cache, index, result = node.inputs[0], _input(node, 2), node.outputs[0]
    assert cache is not None
    yield from _ranks(node, {0: 4, 1: 4})
    if node.attributes.get_int("axis", -2) != -2 or node.attributes.get_string("mode", "linear") != "linear":
        yield "error", "attribute", "axis must be written as -2, and mode be linear", IMPORTER
    if index is None or _type(index) not in ("int32", "int64"):
        yield "error", "input", "write_indices must be given, as int32 or int64", CACHE
    sizes = list(cache.shape or ())
    if not cache.is_graph_input():
        yield "error", "cache", f"the cache {cache.name} must be an input of the network", CACHE
    elif not all(isinstance(size, int) for size in sizes[1:]):
        yield "error", "cache", f"the cache {cache.name} must have a fixed number of rows", CACHE
    elif sizes and not isinstance(sizes[0], int):
        yield "note", "cache", "a variable batch size is neither documented nor excluded", CACHE
    if not result.is_graph_output():
        yield "error", "cache", f"the updated cache {result.name} must be an output of the network", CACHE
    elif states.get(str(cache.name)) != result.name:
        yield "error", "cache", f"{cache.name} and {result.name} share memory, but are not described as one state", CACHE


def _dequantize(node: ir.Node) -> Iterator[Issue]:
    weights, scales = node.inputs[:2]
    made = _type(node.outputs[0])
    if _type(scales) not in _FLOATS or (_type(scales) != "float32" and made != _type(scales)):
        yield "error", "quantised", f"scales of {_type(scales)} cannot produce {made}", QUANTISED
    zero = _input(node, 2)
    if zero is not None and (not zero.is_initializer() or numbers(zero).any()):
        yield "error", "quantised", "zero points must be zero: leave them out", QUANTISED
    sizes = [list(value.shape or ()) if value is not None else [] for value in (weights, scales)]
    data, scale = ([size for size in shape if isinstance(size, int)] for shape in sizes)
    if len(data) != len(sizes[0]) or len(scale) != len(sizes[1]) or not data:
        yield "error", "quantised", "the sizes of weights and scales must be known", QUANTISED
        return
    axis, block = node.attributes.get_int("axis", 1) % len(data), node.attributes.get_int("block_size", 0)
    if len(scale) < 2:
        if scale and scale[0] != data[axis]:
            yield "error", "quantised", "there must be one scale for each channel", QUANTISED
        return
    wanted = [size // block if block and n == axis and size % block == 0 else size for n, size in enumerate(data)]
    if not block or scale != wanted or data[axis] % block or axis < len(data) - 2:
        text = f"scales {scale} do not fit weights {data} in blocks of {block} along axis {axis}, one of the last two"
        yield "error", "quantised", text, QUANTISED
    elif _type(weights) == "int4" and block not in INT4_BLOCKS:
        known = " and ".join(map(str, INT4_BLOCKS))
        yield "note", "quantised", f"int4 in blocks of {block}; documented are {known}", QUANTISED
    elif _type(weights) == "int8":
        yield "note", "quantised", "int8 weights in blocks: a smaller file, but no faster kernel is documented", QUANTISED


def _top_k(node: ir.Node) -> Iterator[Issue]:
    if not node.attributes.get_int("sorted", 1):
        yield "error", "attribute", "sorted must be 1", IMPORTER
    k = _input(node, 1)
    if k is not None and k.const_value is not None and numbers(k).max() >= TOP_K:
        yield "error", "attribute", f"K is {numbers(k).max()}; it must be less than {TOP_K}", IMPORTER


def _ranks(node: ir.Node, wanted: Mapping[int, int]) -> Iterator[Issue]:
    """Check the number of axes of inputs, by position."""
    for place, rank in wanted.items():
        value = _input(node, place)
        if value is not None and (value.shape is None or len(value.shape) != rank):
            found = "an unknown number of" if value.shape is None else len(value.shape)
            yield "error", "rank", f"{value.name} has {found} axes instead of {rank}", IMPORTER


def _input(node: ir.Node, place: int) -> ir.Value | None:
    return node.inputs[place] if place < len(node.inputs) else None


def _type(value: ir.Value | None) -> str:
    """Return the name of a value's element type; "" for an omitted input."""
    return "" if value is None or value.dtype is None else str(value.dtype.numpy())


_CHECKS: dict[str, Callable[[ir.Node], Iterator[Issue]]] = {
    "Attention": _attention,
    "DequantizeLinear": _dequantize,
    "RotaryEmbedding": _rotary,
    "TopK": _top_k,
}
_KNOWN = {"CumSum": (1, "the axis"), "TopK": (1, "K")}
"""Inputs that must be known when a plan is built: position and name."""
