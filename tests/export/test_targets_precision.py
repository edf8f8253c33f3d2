"""Graphs that compute in 16 bits: which parts do, and the error. Products of shared quantised weights: one packed copy.

ONNX Runtime's CPU provider emulates float16 and has no bfloat16, of which only types are checked.
"""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from fishrt_engines import GraphSpec
from fishrt_export.errors import ExportError
from fishrt_export.graph.recipe import Recipe
from fishrt_export.targets import edit
from fishrt_export.targets.attention import fast_operators
from fishrt_export.targets.precision import DTYPES, compute_in, keep_layout, share_weights
from helpers_graphs import Calls, copied, operators, places
from tiny import GoldenModel, prefill_feeds
from tolerances import TOLERANCES

FLOATS = (ir.DataType.FLOAT, *DTYPES.values())
HEAVY = ("Attention", "MatMul", "RotaryEmbedding", "TensorScatter")
LENGTH = 7


def files(golden_model: GoldenModel, folder: Path) -> dict[str, Path]:
    """Return copies of the graphs of a language model, the frame graph among them, with their weights."""
    slow, fast = (copied(golden_model.file(role), folder) for role in ("slow_ar", "fast_ar"))
    frame = golden_model.frame_file(golden_model.few)
    shutil.copy(frame, folder)
    return {"slow_ar": slow, "fast_ar": fast, "frame": folder / frame.name}


def lowered(path: Path, dtype: str) -> Path:
    model = edit.load(path)
    compute_in(model, dtype)
    form = path.with_name(f"{path.stem}_{dtype}.onnx")
    edit.save(model, form)
    return form


def typed(path: Path) -> ir.Graph:
    """Return a graph with the types of all values."""
    model = edit.load(path)
    edit.infer(model)
    return model.graph


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_heavy_is_in_16_bits_and_types_agree(golden_model: GoldenModel, tmp_path: Path, dtype: str) -> None:
    low = DTYPES[dtype]
    for role, path in files(golden_model, tmp_path).items():
        graph = typed(lowered(path, dtype))
        counts = Counter((node.op_type, node.outputs[0].dtype) for node in graph)
        assert {kind: counts[kind, ir.DataType.FLOAT] for kind in HEAVY} == dict.fromkeys(HEAVY, 0), role
        assert all(counts[kind, low] for kind in HEAVY), role
        norms = [n for n in graph if n.op_type == "RMSNormalization" and "attention_norm" in str(n.inputs[1].name)]
        later = {n.outputs[0].dtype for n in norms if "layers.0." not in str(n.inputs[1].name)}  # the first takes an embedding
        assert later <= ({ir.DataType.FLOAT} if dtype == "float16" else {low}), role
        for node in graph:
            if node.op_type not in ("Cast", "DequantizeLinear", "Where"):
                of = {value.dtype for value in node.inputs if value is not None and value.dtype in FLOATS}
                assert len(of) < 2, (role, node.name, of)
        for value in (*graph.inputs, *graph.outputs):
            allowed = {low} if "cache" in str(value.name) else {ir.DataType.FLOAT, ir.DataType.INT64}
            assert value.dtype in allowed, (role, value.name)


def results(path: Path, spec: GraphSpec, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return Calls(path, spec, batch=1, cache=LENGTH + 2).run(feeds)


def slow_feeds(golden_model: GoldenModel) -> dict[str, np.ndarray]:
    return prefill_feeds([np.random.default_rng(0).integers(0, 20, (1 + golden_model.lm.config.num_codebooks, LENGTH))])


@pytest.mark.parametrize("fast", [False, True], ids=["portable operators", "fast operators"])
def test_float16_is_near_float32(golden_model: GoldenModel, tmp_path: Path, fast: bool) -> None:
    portable, spec = copied(golden_model.file("slow_ar"), tmp_path), golden_model.lm.jobs("audio")[0].spec
    model = edit.load(portable)
    compute_in(model, "float16")
    if fast:
        fast_operators(model)
    edit.save(model, tmp_path / "form.onnx")
    feeds = slow_feeds(golden_model)
    expected, actual = (results(path, spec, feeds)["logits"] for path in (portable, tmp_path / "form.onnx"))
    assert actual.dtype == np.float32
    assert 0 < np.abs(actual - expected).max() / np.abs(expected).max() < 0.01


@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_of_integers_have_the_type_of_the_computation(s2_model: GoldenModel, tmp_path: Path, dtype: str) -> None:
    job = s2_model.lm.jobs("audio")[0]
    plans = Recipe("int8").plan({job.role: job.build()}, {job.role: job.weights})
    replace(job, plan=plans[job.role]).run(tmp_path)
    portable = tmp_path / job.spec.file
    form = lowered(portable, dtype)
    widened = [node for node in typed(form) if node.op_type == "DequantizeLinear"]
    assert widened
    assert {value.dtype for node in widened for value in (node.inputs[1], node.outputs[0])} == {DTYPES[dtype]}
    if dtype == "float16":
        feeds = slow_feeds(s2_model)
        expected, actual = (results(path, job.spec, feeds)["logits"] for path in (portable, form))
        assert np.abs(actual - expected).max() < 0.01 * np.abs(expected).max()


def test_another_type_is_refused(s2_model: GoldenModel) -> None:
    with pytest.raises(ExportError, match="float64"):
        compute_in(edit.load(s2_model.file("fast_ar")), "float64")


def test_products_read_weights_as_they_are_stored(golden_model: GoldenModel, tmp_path: Path) -> None:
    portable, spec = copied(golden_model.file("slow_ar"), tmp_path), golden_model.lm.jobs("audio")[0].spec
    model = edit.load(portable)
    keep_layout(model)
    edit.save(model, tmp_path / "form.onnx")
    before, after = operators(portable), operators(tmp_path / "form.onnx")
    assert after["FusedMatMul"] == before["MatMul"] == before["Transpose"] - after["Transpose"] > 0
    feeds = slow_feeds(golden_model)
    expected, actual = (results(path, spec, feeds) for path in (portable, tmp_path / "form.onnx"))
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name], value, rtol=0, atol=TOLERANCES["lm"], err_msg=name)


INPUTS, OUTPUTS, BLOCK = 64, 24, 32


def quantised(folder: Path, bits: int, readers: int = 2, zero_points: bool = False) -> Path:
    """Write the graph x @ W + x @ W …, with the integers of W in their own file, after other bytes."""
    rng = np.random.default_rng(bits)
    low, high = (-8, 8) if bits == 4 else (-128, 128)
    integers = rng.integers(low, high, (INPUTS, OUTPUTS)).astype(np.int8)
    integers[0, :2] = low, high - 1
    raw = integers.tobytes()
    if bits == 4:
        flat = integers.reshape(-1).view(np.uint8) & 15
        raw = (flat[::2] | flat[1::2] << 4).tobytes()
    (folder / "g.onnx.data").write_bytes(bytes(64) + raw)
    element = TensorProto.INT4 if bits == 4 else TensorProto.INT8
    weights = TensorProto(name="w", data_type=element, dims=integers.shape, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "g.onnx.data"), ("offset", "64"), ("length", str(len(raw)))):
        weights.external_data.add(key=key, value=value)
    scales = rng.uniform(0.01, 0.02, (INPUTS // BLOCK, OUTPUTS)).astype(np.float32)
    tensors = [weights, numpy_helper.from_array(scales, "s")]
    if zero_points:
        tensors.append(helper.make_tensor("z", element, scales.shape, np.zeros(scales.size, np.int8).tolist()))
    nodes = [
        helper.make_node("DequantizeLinear", [t.name for t in tensors], ["dense"], axis=0, block_size=BLOCK),
        *(helper.make_node("MatMul", ["x", "dense"], [f"y{n}"]) for n in range(readers)),
    ]
    results = [helper.make_tensor_value_info(f"y{n}", TensorProto.FLOAT, [2, OUTPUTS]) for n in range(readers)]
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, INPUTS])], results, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    (folder / "g.onnx").write_bytes(model.SerializeToString())
    return folder / "g.onnx"


def shared(path: Path) -> Path:
    model = edit.load(path)
    share_weights(model)
    edit.save(model, path.with_name("form.onnx"))
    return path.with_name("form.onnx")


def products(path: Path) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(1).standard_normal((2, INPUTS)).astype(np.float32)
    return list(session.run(None, {"x": x}))


@pytest.mark.parametrize("bits", [4, 8])
def test_products_share_one_packed_copy(tmp_path: Path, bits: int) -> None:
    portable = quantised(tmp_path, bits, readers=3)
    form = shared(portable)
    assert operators(form) == {"MatMulNBits": 3}
    tensors = {tensor.name: tensor for tensor in onnx.load(form).graph.initializer}
    assert {name: len(tensor.raw_data) for name, tensor in tensors.items()} == {
        "w.packed": INPUTS * OUTPUTS * bits // 8,
        "s.turned": INPUTS // BLOCK * OUTPUTS * 4,
    }
    for found, expected in zip(products(form), products(portable), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_packed_weights_are_in_a_file_of_their_own(tmp_path: Path) -> None:
    """They are made when the graph is saved, one by one, so that there is never more than one in memory."""
    portable = quantised(tmp_path, 8)
    before = (tmp_path / "g.onnx.data").read_bytes()
    assert places(shared(portable))["w.packed"] == {"location": "form.onnx.data", "offset": "0", "length": "1536"}
    assert (tmp_path / "g.onnx.data").read_bytes() == before


@pytest.mark.parametrize(("readers", "zero_points"), [(1, False), (2, True)])
def test_others_stay(tmp_path: Path, readers: int, zero_points: bool) -> None:
    """ONNX Runtime itself fuses a weight that is read once."""
    assert operators(shared(quantised(tmp_path, 8, readers, zero_points))) == {"DequantizeLinear": 1, "MatMul": readers}
