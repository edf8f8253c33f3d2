"""Single operators lowered for TensorRT have the same results in ONNX Runtime."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper, parser

from fishrt_engines.engine import GraphSpec
from fishrt_engines.trt.plans import LoweringOptions
from tolerances import TOLERANCES

pytest.importorskip("onnx_ir", reason="needs the export extra")

import onnx_ir as ir

from fishrt_export.errors import ExportError
from fishrt_export.targets.tensorrt.lowering import FORMS, lower_for_tensorrt
from fishrt_export.targets.tensorrt.rules import check_for_tensorrt

SPEC = GraphSpec("g.onnx", (), ())
OPTIONS = LoweringOptions(None, "fp32", fp32_attention=True, primitive_attention=False)


def built(text: str, **constants: np.ndarray) -> onnx.ModelProto:
    model = parser.parse_model(f'<ir_version: 10, opset_import: ["" : 24]> g {text}')
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    return model


def ran(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, dict(feeds))[0]


def lowered(model: onnx.ModelProto, attention: str = "primitive") -> tuple[onnx.ModelProto, Counter[str]]:
    """Lower a graph, which must break no rule then. Return it with the numbers of its operators."""
    made = ir.from_proto(model)
    lower_for_tensorrt(made, SPEC, OPTIONS, attention)
    assert check_for_tensorrt(made, SPEC) == []
    return ir.to_proto(made), Counter(node.op_type for node in made.graph)


MASKS = {
    "none": ("", ""),
    "bool of 4 axes": (", bool[B,1,S,T] m", ", m"),
    "bool of 2 axes": (", bool[S,T] m", ", m"),
    "numbers of 3 axes": (", float[1,S,T] m", ", m"),
}


@pytest.mark.parametrize("attributes", ["", "<scale = 0.7>"], ids=["", "scale"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("form", FORMS)
def test_forms_of_attention(mask: str, attributes: str, form: str) -> None:
    declared, given = MASKS[mask]
    model = built(
        f"(float[B,6,S,8] q, float[B,2,T,8] k, float[B,2,T,4] v{declared}) => (float[B,6,S,4] y) "
        f"{{ y = Attention {attributes} (q, k, v{given}) }}"
    )
    rng = np.random.default_rng(0)
    feeds = {
        name: rng.standard_normal((2, heads, n, width)).astype(np.float32)
        for name, heads, n, width in (
            ("q", 6, 3, 8),
            ("k", 2, 5, 8),
            ("v", 2, 5, 4),
        )
    }
    if declared:
        shape = {"4": (2, 1, 3, 5), "2": (3, 5), "3": (1, 3, 5)}[mask.split()[-2]]
        seen = np.broadcast_to(np.arange(5) <= np.arange(3)[:, None] + 1, shape)
        feeds["m"] = seen if mask.startswith("bool") else np.where(seen, rng.standard_normal(shape), -1e30).astype(np.float32)
    made, operators = lowered(model, form)
    assert operators["Attention"] == (form != "primitive")
    for node in made.graph.node:  # ONNX Runtime does not know what TensorRT is told by it
        told = [attribute for attribute in node.attribute if attribute.name == "TRT_decomposable"]
        assert [attribute.i for attribute in told] == [1] * (form == "decomposable" and node.op_type == "Attention")
        for attribute in told:
            node.attribute.remove(attribute)
    np.testing.assert_allclose(ran(made, feeds), ran(model, feeds), rtol=0, atol=TOLERANCES["lowered"])


@pytest.mark.parametrize(
    ("q", "call", "words"),
    [
        ("float[B,6,S,8]", "<is_causal = 1> (q, k, k)", "has a form that cannot be decomposed"),
        ("float[B,6,S,8]", "<softcap = 20.0> (q, k, k)", "has a form that cannot be decomposed"),
        ("float[B,6,S,8]", "(q, k, k, , , , n)", "has a form that cannot be decomposed"),
        ("float[B,H,S,8]", "(q, k, k)", "the number and size of its heads are unknown"),
    ],
)
def test_attention_that_cannot_be_taken_apart(q: str, call: str, words: str) -> None:
    model = built(f"({q} q, float[B,2,T,8] k, int64[B] n) => (float[B,6,S,8] y) {{ y = Attention {call} }}")
    with pytest.raises(ExportError, match=words):
        lowered(model)


@pytest.mark.parametrize("bounds", ["low, high", "low", ", high", ""])
def test_clips_of_integers(bounds: str) -> None:
    model = built(
        f"(int64[N] x) => (int64[N] y) {{ y = Clip (x, {bounds}) }}".replace(", )", ")"), low=np.int64(-1), high=np.int64(3)
    )
    (made, operators), x = lowered(model), {"x": np.arange(-4, 6)}
    assert not operators["Clip"]
    np.testing.assert_array_equal(ran(made, x), ran(model, x))


@pytest.mark.parametrize("start", [0, 2, 4])
def test_caches_within_a_graph(start: int) -> None:
    """The caches are written at the start, in the middle and at the end."""
    model = built(
        "(float[B,1,6,2] given, float[B,1,2,2] new) => (float[B,1,6,2] y) { cache = Tanh (given) "
        "b = Shape <start = 0, end = 1> (new) at = Expand (first, b) y = TensorScatter <axis = -2> (cache, new, at) }",
        first=np.array(start),
    )
    rng = np.random.default_rng(0)
    feeds = {name: rng.standard_normal((3, 1, rows, 2)).astype(np.float32) for name, rows in (("given", 6), ("new", 2))}
    made, operators = lowered(model)
    assert not operators["TensorScatter"]
    np.testing.assert_array_equal(ran(made, feeds), ran(model, feeds))


def test_a_cache_within_a_graph_that_is_written_to_anywhere_is_refused() -> None:
    model = built(
        "(float[B,1,6,2] given, float[B,1,2,2] new, int64[B] at) => (float[B,1,6,2] y) "
        "{ cache = Tanh (given) y = TensorScatter <axis = -2> (cache, new, at) }"
    )
    with pytest.raises(ExportError, match="writes to unknown rows"):
        lowered(model)
