"""Products of integers by rows: exact on every CPU, and a row gives the same bits alone and in any batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from fishrt.bundle.manifest import Form
from fishrt.bundle.quantisation import ROWS
from fishrt.language_model.batch import Batch, DualAR, Row
from fishrt.language_model.sampling import Sampling, SeededNoise
from fishrt_engines import open_engine
from fishrt_export.graph.job import GraphJob
from fishrt_export.graph.quantise import quantise_columns
from fishrt_export.graph.recipe import Recipe
from fishrt_export.sources.language_model import LanguageModelSource, open_language_model
from fishrt_export.targets import edit
from fishrt_export.targets.forms import make_forms
from fishrt_export.targets.rows import multiply_rows
from helpers_graphs import operators
from helpers_lm import spoken
from synthetic import PLAIN, random_weights, write_flat

MINNOW = Path(__file__).parents[2] / "export/minnow"
TINY = {
    **PLAIN,
    **{"dim": 64, "n_head": 4, "n_local_heads": 2, "head_dim": 16, "intermediate_size": 160},
    **{"fast_dim": 32, "fast_n_head": 2, "fast_n_local_heads": 1, "fast_head_dim": 16, "fast_intermediate_size": 48},
}
"""Sizes of which all inputs are multiples of 16."""
INPUTS, OUTPUTS = 64, 24


def test_sums_are_exact_and_rows_do_not_meet(tmp_path: Path) -> None:
    """Weights and activations are as large as they can be, with neighbours of one sign, which overflow 16 bits elsewhere."""
    rng = np.random.default_rng(0)
    weight = torch.from_numpy(rng.choice([-1, 1, 0.5, 3], (OUTPUTS, INPUTS)).repeat(2, axis=1).astype(np.float32))[:, :INPUTS]
    integers, scales = quantise_columns(weight, 32)
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["rows", INPUTS]))
    stored = [ir.tensor(part.numpy(), name=name) for name, part in (("w", integers), ("w.scales", scales))]
    tape = ir.tape.Tape()
    values = [tape.initializer(tensor) for tensor in stored]
    wide = tape.op("DequantizeLinear", values, {"axis": 0, "block_size": 32}, metadata_props={ROWS: ""})
    results = [tape.op("MatMul", [x, wide]), tape.op("MatMul", [x, wide])]
    for name, value in zip(("y", "again"), results, strict=True):
        value.name, value.type, value.shape = name, ir.TensorType(ir.DataType.FLOAT), ir.Shape(["rows", OUTPUTS])
    graph = ir.Graph([x], results, nodes=tape.nodes, initializers=values, opset_imports={"": 24})
    model = ir.Model(graph, ir_version=10)
    multiply_rows(model)
    edit.save(model, tmp_path / "rows.onnx")
    assert operators(tmp_path / "rows.onnx")["QuantizeLinear"] == 1
    session = onnxruntime.InferenceSession(tmp_path / "rows.onnx", providers=["CPUExecutionProvider"])

    rows = rng.choice([-1.0, 1.0], (33, INPUTS)).astype(np.float32) * 10.0 ** rng.integers(-4, 4, (33, 1)).astype(np.float32)
    rows[1], rows[2] = np.abs(rows[1]), rng.standard_normal(INPUTS)
    rows[3] = 0
    found = session.run(["y"], {"x": rows})[0]
    largest = np.abs(rows).max(axis=1, keepdims=True)
    rounded = np.rint(rows[:3] / largest[:3] / np.float32(1 / 127)).astype(np.int64)
    expected = rounded @ integers.numpy().astype(np.int64) * (largest[:3].astype(np.float64) / 127 * scales[0].numpy())
    np.testing.assert_allclose(found[:3], expected, rtol=1e-6, atol=1e-6)
    assert not found[3].any()
    for count in (1, 2, 3, 4, 7, 8, 16):
        for start in range(0, len(rows), count):
            np.testing.assert_array_equal(session.run(["y"], {"x": rows[start : start + count]})[0], found[start : start + count])


@pytest.fixture(scope="module", params=["tiny", "minnow"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LanguageModelSource:
    if request.param == "minnow":
        return open_language_model(MINNOW)
    folder = tmp_path_factory.mktemp("tiny")
    write_flat(folder, TINY, random_weights(TINY))
    return open_language_model(folder, family="s2")


@pytest.mark.slow
def test_a_row_draws_the_same_codes_alone_and_in_any_batch(source: LanguageModelSource, tmp_path: Path) -> None:
    jobs = source.jobs("audio")
    plans = Recipe(ROWS).plan({job.role: job.build() for job in jobs}, {job.role: job.weights for job in jobs})
    engines = []
    for job in jobs:

        def forms(job: GraphJob = job) -> list[Form]:
            return make_forms(tmp_path, job.role, job.spec, ["cpu"])

        job = replace(job, plan=plans[job.role], cases=job.cases[:1])
        (form,) = job.run(tmp_path, make_forms=forms).forms
        assert form.parity is not None
        assert form.parity.max_abs_error <= job.tolerance
        assert form.activations_error is not None
        assert 0 < form.activations_error < 0.25
        counts = operators(tmp_path / form.spec.file)
        assert counts["MatMulIntegerToFloat"]
        assert not counts.keys() & {"MatMul", "MatMulNBits", "DequantizeLinear"}
        engines.append(open_engine(tmp_path / form.spec.file, form.spec, provider="cpu"))
    assert not list(tmp_path.glob("*.exact.onnx"))

    lm = source.describe("audio")
    model, sampling = DualAR(*engines, lm), Sampling().resolve(lm.sampling)

    def row(seed: int) -> Row:
        rng = np.random.default_rng(seed)
        prompt = rng.integers(0, min(lm.vocab_size, lm.codebook_width), (1 + lm.num_codebooks, 4 + 3 * seed))
        return Row(lm, prompt, sampling, SeededNoise(seed), max_columns=12)

    alone = [row(seed) for seed in range(6)]
    for one in alone:
        spoken(model, one)
    batch, rows = Batch(model, 5), [row(seed) for seed in range(6)]
    for one in rows[:5]:  # they join one by one; the last takes the place of the first that ends
        batch.admit(one)
        batch.step()
    while any(one.goes_on for one in rows[:5]):
        batch.step()
    batch.admit(rows[5])
    while rows[5].goes_on:
        batch.step()
    for together, one in zip(rows, alone, strict=True):
        np.testing.assert_array_equal(together.drawn, one.drawn)
