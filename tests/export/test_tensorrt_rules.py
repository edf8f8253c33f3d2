"""The documented rules of TensorRT's importer: each violation is found, and nothing else."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper, parser

from fishrt.bundle.folder import Bundle
from fishrt_engines.engine import GraphSpec, StatePair
from helpers_cli import refused, run

pytest.importorskip("onnx_ir", reason="needs the export extra")

import onnx_ir as ir

from fishrt_export.errors import ExportError
from fishrt_export.targets.tensorrt import rules as tensorrt_rules
from fishrt_export.targets.tensorrt.rules import Finding, check_for_tensorrt, errors

STATES = (StatePair("cache", "cache_out"),)


def graph(text: str, opset: int = 24, **constants: np.ndarray) -> onnx.ModelProto:
    """Return a model from the text form of a graph and some initializers."""
    model = parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}, "com.microsoft" : 1]> g {text}')
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    return model


def checked(model: onnx.ModelProto) -> list[Finding]:
    return check_for_tensorrt(ir.from_proto(model), GraphSpec("g.onnx", (), (), STATES))


def attention(call: str, q: str = "float[B,4,S,8] q", mask: str = "bool[B,1,S,32] m") -> onnx.ModelProto:
    inputs = f"{q}, float[B,2,32,8] k, float[B,2,32,8] v, {mask}, float[B,2,3,8] past"
    return graph(f"({inputs}) => (float[B,4,S,8] y) {{ y = Attention {call} }}")


def scatter(
    call: str = "<axis = -2> (cache, new, at)",
    cache: str = "float[2,2,32,8]",
    first: str = "",
    rest: str = "",
    outputs: str = "cache_out",
) -> onnx.ModelProto:
    inputs = f"{cache} cache, float[2,2,S,8] new, int64[2] at"
    return graph(f"({inputs}) => (float[2,2,32,8] {outputs}) {{ {first} cache_out = TensorScatter {call} {rest} }}")


def dequantize(
    attributes: str = "axis = 0, block_size = 64",
    scale: tuple[int, ...] = (2, 8),
    dtype: type = np.float32,
    *,
    zero: int | None = None,
    kind: str = "int4",
) -> onnx.ModelProto:
    """Return a model with a DequantizeLinear of weights [128, 8]."""
    result = "float16" if dtype is np.float16 else "float"
    third = ", z" if zero is not None else ""
    model = graph(
        f"({result}[N,128] x) => ({result}[N,8] y) {{ d = DequantizeLinear <{attributes}> (w, s{third}) y = MatMul (x, d) }}",
        s=np.ones(scale, dtype),
    )
    code = getattr(onnx.TensorProto, kind.upper())
    model.graph.initializer.append(helper.make_tensor("w", code, [128, 8], np.zeros(1024, np.int8)))
    if zero is not None:
        model.graph.initializer.append(helper.make_tensor("z", code, scale, np.full(scale, zero, np.int8)))
    return model


def unary(op_type: str, kind: str = "float", to: str | None = None) -> onnx.ModelProto:
    return graph(f"({kind}[N] x) => ({to or kind}[N] y) {{ y = {op_type} (x) }}")


FITTING = {
    "attention": attention("<is_causal = 0, softcap = 0.0, qk_matmul_output_mode = 0> (q, k, v, m)"),
    "scatter": scatter(),
    "blocks": dequantize(),
    "scales of float16": dequantize(dtype=np.float16),
    "channels": dequantize("axis = 1", (8,)),
    "one scale": dequantize("axis = 0", (), kind="int8"),
    "zero points of zero": dequantize(zero=0),
    "top k": graph("(float[N] x) => (float[M] y) { y, i = TopK <sorted = 1> (x, k) }", k=np.array([3839])),
    "cumsum": graph("(float[N] x) => (float[N] y) { y = CumSum (x, a) }", a=np.array(0)),
    "axes": graph("(float[N,M] x) => (float[N] y) { y = ReduceSum <keepdims = 0> (x, a) }", a=np.array([1])),
}


@pytest.mark.parametrize("name", FITTING)
def test_nothing_is_found_in_what_fits(name: str) -> None:
    assert checked(FITTING[name]) == []


BROKEN = {
    "past": (attention("(q, k, v, m, past, past)"), "takes queries, keys, values and a mask"),
    "softcap": (attention("<softcap = 30.0> (q, k, v, m)"), "softcap"),
    "softmax_precision": (attention("<softmax_precision = 1> (q, k, v, m)"), "softmax_precision"),
    "mask of 2 axes": (attention("(q, k, v, m)", mask="bool[S,32] m"), "m has 2 axes instead of 4"),
    "mask of another type": (attention("(q, k, v, m)", mask="float16[B,1,S,32] m"), "a mask is of bool or of the queries' type"),
    "queries of 3 axes": (attention("<q_num_heads = 4> (q, k, v, m)", q="float[B,S,32] q"), "q has 3 axes instead of 4"),
    "queries of another type": (attention("(q, k, v, m)", q="float16[B,4,S,8] q"), "different types: float16, float32"),
    "axis counted from the front": (scatter("<axis = 2> (cache, new, at)"), "must be written as -2"),
    "circular": (scatter('<axis = -2, mode = "circular"> (cache, new, at)'), "mode be linear"),
    "no index": (scatter("<axis = -2> (cache, new)"), "write_indices must be given"),
    "open cache": (scatter(cache="float[2,2,M,8]"), "the cache cache must have a fixed number of rows"),
    "made cache": (scatter("<axis = -2> (c, new, at)", first="c = Tanh (cache)"), "c must be an input", "as one state"),
    "hidden update": (scatter(rest="y = Tanh (cache_out)", outputs="y"), "cache_out must be an output of the network"),
    "update of another state": (
        graph(
            "(float[2,2,32,8] other, float[2,2,S,8] new, int64[2] at) => (float[2,2,32,8] o) "
            "{ o = TensorScatter <axis = -2> (other, new, at) }"
        ),
        "not described as one state",
    ),
    "zero points": (dequantize(zero=1), "zero points must be zero"),
    "unsigned": (dequantize(kind="uint4"), "does not accept uint4"),
    "uneven blocks": (dequantize("axis = 0, block_size = 48", (3, 8)), "in blocks of 48"),
    "blocks of another size": (
        dequantize("axis = 0, block_size = 32"),
        "scales [2, 8] do not fit weights [128, 8] in blocks of 32",
    ),
    "blocks along two axes": (dequantize("axis = 0, block_size = 64", (2, 4)), "scales [2, 4] do not fit"),
    "half scales to float32": (
        graph("(int8[4,4] w) => (float[4,4] y) { y = DequantizeLinear <output_dtype = 1> (w, s) }", s=np.float16(1)),
        "scales of float16 cannot produce float32",
        "w, an input or output of the network, cannot be int8",
    ),
    "scale for each channel": (dequantize("axis = 0", (8,)), "one scale for each channel"),
    "K too large": (
        graph("(float[N] x) => (float[M] y) { y, i = TopK (x, k) }", k=np.array([3840])),
        "K is 3840; it must be less than 3840",
    ),
    "K that varies": (graph("(float[N] x, int64[1] k) => (float[M] y) { y, i = TopK (x, k) }"), "K must be an initializer"),
    "unsorted": (graph("(float[N] x) => (float[M] y) { y, i = TopK <sorted = 0> (x, k) }", k=np.array([3])), "sorted must be 1"),
    "cumsum": (graph("(float[N] x, int64 a) => (float[N] y) { y = CumSum (x, a) }"), "the axis must be an initializer"),
    "axes": (graph("(float[N] x, int64[1] a) => (float[M] y) { y = ReduceMax (x, a) }"), "axes must be an initializer"),
    "positions": (
        graph(
            "(float[B,2,S,8] x, float[9,4] c, float[9,4] s, int32[B,S] p) => (float[B,2,S,8] y) "
            "{ y = RotaryEmbedding (x, c, s, p) }"
        ),
        "position_ids are int64, not int32",
    ),
    "tables": (
        graph("(float[B,2,S,8] x, float[9,4] c, float[9,4] s) => (float[B,2,S,8] y) { y = RotaryEmbedding (x, c, s) }"),
        "c has 2 axes instead of 3",
        "s has 2 axes instead of 3",
    ),
    "random": (graph("() => (float[4] y) { y = RandomNormal <shape = [4]> () }"), "RandomNormal is not in fishrt's table"),
    "contrib": (graph("(float[N] x) => (float[N] y) { y = com.microsoft.QuickGelu (x) }"), "com.microsoft QuickGelu is not in"),
    "sine of integers": (unary("Sin", "int64"), "does not accept int64"),
    "bool arithmetic": (graph("(bool[N] x) => (bool[N] y) { y = Add (x, x) }"), "does not accept bool"),
    "doubles": (
        graph("(float[N] x) => (float[N] y) { a = Cast <to = 11> (x) y = Cast <to = 1> (a) }"),
        "does not accept float64",
    ),
    "mixed types": (graph("(float[N] x, float16[N] z) => (float[N] y) { y = Mul (x, z) }"), "different types: float16, float32"),
    "raw integers": (
        graph("(float[N,4] x) => (int8[N,4] y) { y = Transpose (w) }", w=np.ones((4, 4), np.int8)),
        "an input or output of the network, cannot be int8",
        "does not accept int8",
    ),
    "opset": (graph("(float[N] x) => (float[N] y) { y = Tanh (x) }", opset=26), "opset 26; 9 to 24 are read"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_refused(name: str) -> None:
    """The findings are exactly the expected ones."""
    model, *expected = BROKEN[name]
    found = [str(finding) for finding in errors(checked(model))]
    for text in expected:
        assert any(text in line for line in found), (text, found)
    assert all(any(text in line for text in expected) for line in found), found


NOTED = {
    "causal": (attention("<is_causal = 1> (q, k, v)"), "is_causal counts from the first key"),
    "float16 attention": (
        graph("(float16[B,2,S,8] q, float16[B,2,9,8] k) => (float16[B,2,S,8] y) { y = Attention (q, k, k) }"),
        "in float16, a long masked prefix",
    ),
    "batch": (scatter(cache="float[B,2,32,8]"), "a variable batch size"),
    "small blocks": (dequantize("axis = 0, block_size = 32", (4, 8)), "int4 in blocks of 32; documented are 64 and 128"),
    "int8": (dequantize(kind="int8"), "no faster kernel is documented"),
    "opset": (graph("(float[N] x) => (float[N] y) { y = Tanh (x) }", opset=25), "opset 25; 9 to 24 are read"),
}


@pytest.mark.parametrize("name", NOTED)
def test_what_is_remarked_on(name: str) -> None:
    model, expected = NOTED[name]
    found = checked(model)
    assert [finding.severity for finding in found] == ["note"]
    assert expected in str(found[0])


def test_a_finding_says_where_and_by_which_rule() -> None:
    (finding,) = checked(unary("Det"))
    assert (finding.node, finding.operator, finding.severity) == ("y", "Det", "error")
    assert str(finding).startswith("error: Det y: Det is not in fishrt's table of operators (operator; operator table of the")


def test_errors_stand_first_and_a_note_is_told_once() -> None:
    calls = "a = Attention (q, k, k) b = Attention (a, k, k) y = Neg (b)"
    found = checked(graph(f"(float16[B,2,S,8] q, float16[B,2,9,8] k) => (float16[B,2,S,8] y) {{ {calls} }}"))
    assert [finding.severity for finding in found] == ["error", "note"]


# --- bundles -------------------------------------------------------------------------------------------------------------------


def test_inspect_shows_the_findings(tiny_bundle: Bundle) -> None:
    shown = run("inspect", tiny_bundle.path, "--trt")
    assert shown.exit_code == 0, shown.output
    assert shown.stdout.count("errors: none") == 5
    assert "TensorRT" not in run("inspect", tiny_bundle.path).stdout
    found = json.loads(run("inspect", tiny_bundle.path, "--trt", "--json").stdout)["tensorrt"]
    assert found.keys() == {*tiny_bundle.manifest.specs, "frame"}
    assert [finding["severity"] for finding in found["slow_ar"]] == ["note"]
    assert json.loads(run("inspect", tiny_bundle.path, "--json").stdout)["tensorrt"] is None


def test_what_cannot_be_lowered_is_found(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise ExportError("no")

    monkeypatch.setattr(tensorrt_rules, "lower_for_tensorrt", refuse)
    shown = run("inspect", tiny_bundle.path, "--trt").stdout
    assert shown.count("errors: 1") == 5
    assert shown.count("error: no (lowering; fishrt)") == 5


def test_without_the_packages_the_command_says_what_to_install(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("fishrt_export.targets.tensorrt.rules", "fishrt_export.targets.edit"):
        monkeypatch.delitem(__import__("sys").modules, name, raising=False)
    monkeypatch.setitem(__import__("sys").modules, "onnx_ir", None)
    refused(run("inspect", tiny_bundle.path, "--trt"), "inspect --trt needs onnx_ir", "pip install onnx onnxscript")
