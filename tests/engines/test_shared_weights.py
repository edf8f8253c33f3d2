"""Quantised weights that several products read: the same results, from one packed copy."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from fishrt_engines.errors import GraphError
from fishrt_engines.rewrite.shared_weights import share_weights

INPUTS, OUTPUTS, BLOCK = 64, 24, 32
LOCATION = "g.onnx.data"


def quantised(folder: Path, bits: int, readers: int = 2, zero_points: bool = False) -> bytes:
    """Return the graph x @ W + x @ W …, with the integers of W in their own file, after other bytes."""
    rng = np.random.default_rng(bits)
    low, high = (-8, 8) if bits == 4 else (-128, 128)
    integers = rng.integers(low, high, (INPUTS, OUTPUTS)).astype(np.int8)
    integers[0, :2] = low, high - 1
    raw = integers.tobytes()
    if bits == 4:
        flat = integers.reshape(-1).view(np.uint8) & 15
        raw = (flat[::2] | flat[1::2] << 4).tobytes()
    (folder / LOCATION).write_bytes(bytes(64) + raw)
    element = TensorProto.INT4 if bits == 4 else TensorProto.INT8
    weights = TensorProto(name="w", data_type=element, dims=integers.shape, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", LOCATION), ("offset", "64"), ("length", str(len(raw)))):
        weights.external_data.add(key=key, value=value)
    scales = rng.uniform(0.01, 0.02, (INPUTS // BLOCK, OUTPUTS)).astype(np.float32)
    tensors = [weights, numpy_helper.from_array(scales, "s")]
    if zero_points:
        tensors.append(helper.make_tensor("z", element, scales.shape, np.zeros(scales.size, np.int8).tolist()))
    nodes = [
        helper.make_node("DequantizeLinear", [t.name for t in tensors], ["dense"], axis=0, block_size=BLOCK),
        *(helper.make_node("MatMul", ["x", "dense"], [f"y{n}"]) for n in range(readers)),
    ]
    shapes = {name: [2, OUTPUTS] for name in (f"y{n}" for n in range(readers))}
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, INPUTS])], results, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10).SerializeToString()


def run(model: bytes, folder: Path) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(1).standard_normal((2, INPUTS)).astype(np.float32)
    return list(session.run(None, {"x": x}))


@pytest.mark.parametrize("bits", [4, 8])
def test_products_share_one_packed_copy(tmp_path: Path, bits: int) -> None:
    model = quantised(tmp_path, bits, readers=3)
    shared = share_weights(model, tmp_path)
    graph = onnx.ModelProto.FromString(shared).graph
    assert Counter(node.op_type for node in graph.node) == {"MatMulNBits": 3}
    assert {len(tensor.raw_data) for tensor in graph.initializer if tensor.data_type == TensorProto.UINT8} == {
        INPUTS * OUTPUTS * bits // 8
    }
    assert len(graph.initializer) == 2
    for found, expected in zip(run(shared, tmp_path), run(model, tmp_path), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("readers", "zero_points"), [(1, False), (2, True)])
def test_others_stay(tmp_path: Path, readers: int, zero_points: bool) -> None:
    """ONNX Runtime itself fuses a weight that is read once."""
    model = quantised(tmp_path, 8, readers, zero_points)
    graph = onnx.ModelProto.FromString(share_weights(model, tmp_path)).graph
    assert Counter(node.op_type for node in graph.node) == {"DequantizeLinear": 1, "MatMul": readers}


@pytest.mark.parametrize(("lost", "text"), [(0, "cannot be read"), (70, "end before w")])
def test_weights_that_are_not_there_are_an_error(tmp_path: Path, lost: int, text: str) -> None:
    model, data = quantised(tmp_path, 8), tmp_path / LOCATION
    whole = data.read_bytes()
    data.unlink()
    if lost:
        data.write_bytes(whole[:lost])
    with pytest.raises(GraphError, match=text):
        share_weights(model, tmp_path)
