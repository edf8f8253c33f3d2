"""Graphs that compute in 16 bits: which parts do, and the error.

ONNX Runtime's CPU provider emulates float16 and has no bfloat16, of which only types are checked.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from fishrt.language_model.frame import frame_model, frame_spec
from fishrt_engines import GraphSpec
from fishrt_engines.errors import GraphError
from fishrt_engines.rewrite.graph_types import infer
from fishrt_engines.rewrite.onnx_proto import parse_model
from fishrt_engines.rewrite.precision import compute_in
from fishrt_export.graph.recipe import Recipe
from tiny import GoldenModel, prefill_feeds

DTYPES = ("float16", "bfloat16")
FLOATS = ("float32", *DTYPES)
HEAVY = ("Attention", "MatMul", "RotaryEmbedding", "TensorScatter")
LENGTH = 7


def files(golden_model: GoldenModel) -> dict[str, tuple[bytes, Path]]:
    """The graphs of a language model, the frame graph among them, and the folders of their weights."""
    slow, fast = golden_model.file("slow_ar"), golden_model.file("fast_ar")
    lm, specs = golden_model.lm.describe("audio"), {job.role: job.spec for job in golden_model.lm.jobs("audio")}
    frame = frame_model(fast.read_bytes(), specs["fast_ar"], frame_spec(specs["slow_ar"], specs["fast_ar"], lm), lm)
    return {
        "slow_ar": (slow.read_bytes(), slow.parent),
        "fast_ar": (fast.read_bytes(), fast.parent),
        "frame": (frame, fast.parent),
    }


def types(model: bytes) -> tuple[Any, dict[str, str | None]]:
    graph = parse_model(model, "test").graph
    return graph, {name: value.dtype for name, value in infer(graph).items()}


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_heavy_is_in_16_bits_and_types_agree(golden_model: GoldenModel, dtype: str) -> None:
    for role, (model, folder) in files(golden_model).items():
        graph, dtypes = types(compute_in(model, dtype, folder))
        counts = Counter((n.op_type, dtypes[n.output[0]]) for n in graph.node)
        assert {kind: counts[kind, "float32"] for kind in HEAVY} == dict.fromkeys(HEAVY, 0), role
        assert all(counts[kind, dtype] for kind in HEAVY), role
        norms = [n for n in graph.node if n.op_type == "RMSNormalization" and "attention_norm" in n.input[1]]
        later = {dtypes[n.output[0]] for n in norms if "layers.0." not in n.input[1]}  # the first takes an embedding
        assert later <= ({"float32"} if dtype == "float16" else {"bfloat16"}), role
        for n in graph.node:
            if n.op_type not in ("Cast", "DequantizeLinear", "Where"):
                of = {dtypes[name] for name in n.input if name and dtypes[name] in FLOATS}
                assert len(of) < 2, (role, n.name, of)
        for value in (*graph.input, *graph.output):
            cache = "cache" in value.name
            assert dtypes[value.name] in ({dtype} if cache else {"float32", "int64"}), (role, value.name)


def run(model: bytes, folder: Path, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")  # else activations are rounded to 8 bits
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    taken = {i.name: np.float16 if i.type == "tensor(float16)" else feeds[i.name].dtype for i in session.get_inputs()}
    return list(session.run(None, {name: feeds[name].astype(dtype) for name, dtype in taken.items()}))


def slow_feeds(golden_model: GoldenModel, spec: GraphSpec) -> dict[str, np.ndarray]:
    prompt = np.random.default_rng(0).integers(0, 20, (1 + golden_model.lm.config.num_codebooks, LENGTH))
    states = {t.name: np.zeros(t.resolve({"batch": 1, "cache": LENGTH + 2}), t.dtype) for t in spec.state_tensors}
    return {**prefill_feeds([prompt]), **states}


def test_float16_is_near_float32(golden_model: GoldenModel) -> None:
    model, folder = files(golden_model)["slow_ar"]
    feeds = slow_feeds(golden_model, golden_model.lm.jobs("audio")[0].spec)
    expected, actual = run(model, folder, feeds), run(compute_in(model, "float16", folder), folder, feeds)
    assert actual[0].dtype == np.float32
    largest = np.abs(expected[0]).max()
    error = np.abs(actual[0] - expected[0]).max() / largest
    assert 0 < error < 0.01


@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_of_integers_have_the_type_of_the_computation(s2_model: GoldenModel, tmp_path: Path, dtype: str) -> None:
    job = s2_model.lm.jobs("audio")[0]
    plans = Recipe("int8").plan({job.role: job.build()}, {job.role: job.weights})
    replace(job, plan=plans[job.role]).run(tmp_path)
    portable = (tmp_path / job.spec.file).read_bytes()
    lowered = compute_in(portable, dtype, tmp_path)
    graph, dtypes = types(lowered)
    widened = [n for n in graph.node if n.op_type == "DequantizeLinear"]
    assert widened
    assert {dtypes[name] for n in widened for name in (n.input[1], n.output[0])} == {dtype}
    if dtype == "float16":
        feeds = slow_feeds(s2_model, job.spec)
        expected, actual = run(portable, tmp_path, feeds)[0], run(lowered, tmp_path, feeds)[0]
        assert np.abs(actual - expected).max() < 0.01 * np.abs(expected).max()


def test_another_type_is_refused(s2_model: GoldenModel) -> None:
    with pytest.raises(GraphError, match="float64"):
        compute_in(files(s2_model)["fast_ar"][0], "float64", s2_model.folder)
