"""Graphs rewritten for ONNX Runtime on a CPU: the replaced operators, and unchanged results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from fishrt_engines import Array, Engine, State, open_engine
from fishrt_engines.engine import ColumnInputs
from fishrt_engines.rewrite.attention import specialise
from fishrt_export.sources.cases import fast_ar_cases, random_prompt, slow_ar_cases
from fishrt_export.sources.language_model import open_language_model
from synthetic import EVERYTHING, PLAIN, random_weights, write_flat
from tiny import GoldenModel, chunk_feeds, prefill_feeds
from tolerances import TOLERANCES

pytest.importorskip("torch", reason="needs the export extra")


def operators(model_bytes: bytes) -> Counter[str]:
    return Counter(node.op_type for node in onnx.ModelProto.FromString(model_bytes).graph.node)


def called(engine: Engine, feeds: Mapping[str, Array], state: State) -> dict[str, Array]:
    return {name: value.copy() for name, value in engine.run(feeds, state).items()}


def assert_near(found: Mapping[str, Array], expected: Mapping[str, Array]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=TOLERANCES["lm"], err_msg=name)


PLAIN_WIDE = {**PLAIN, "head_dim": 16, "fast_head_dim": 32}
EVERYTHING_WIDE = {**EVERYTHING, "head_dim": 32, "fast_head_dim": 16}


class Exported:
    """The slow AR and the fast AR of a random model."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        write_flat(folder, config, random_weights(config))
        self.source = open_language_model(folder, family="s2")
        self.folder, self.jobs = folder, {job.role: job for job in self.source.jobs("audio")}
        for job in self.jobs.values():
            job.run(folder)

    def file(self, role: str) -> Path:
        return self.folder / self.jobs[role].spec.file

    def engines(self, role: str) -> list[Engine]:
        """Return the portable and the specialised engine."""
        spec = self.jobs[role].spec
        return [open_engine(self.file(role), spec, provider="cpu", specialise=choice) for choice in (False, True)]


@pytest.fixture(scope="module", params=[PLAIN_WIDE, EVERYTHING_WIDE], ids=["plain", "everything"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return Exported(tmp_path_factory.mktemp("wide"), request.param)


@pytest.mark.parametrize("role", ["slow_ar", "fast_ar"])
def test_every_attention_is_replaced(exported: Exported, role: str) -> None:
    portable = exported.file(role).read_bytes()
    rewritten, columns = specialise(portable)
    before, after = operators(portable), operators(rewritten)
    config = exported.source.config
    layers = (config.slow if role == "slow_ar" else config.fast).layers
    assert columns == ColumnInputs("write_index", "position_ids")
    assert after["GroupQueryAttention"] == before["Attention"] == layers
    assert not after.keys() & {"Attention", "TensorScatter", "RotaryEmbedding"}
    # Two norms a layer follow a residual sum, except the first; the last norm gets only one of many columns.
    assert after["SkipSimplifiedLayerNormalization"] == 2 * layers - 1


@pytest.mark.parametrize("role", ["slow_ar", "fast_ar"])
def test_the_results_are_the_same(exported: Exported, role: str) -> None:
    """Results and caches are equal over several calls, rows and ragged lengths, except cache rows of padding."""
    source = exported.source
    cases = slow_ar_cases(source.config, source.ids)[:2] if role == "slow_ar" else fast_ar_cases(source.config)
    engines = exported.engines(role)
    for case in cases:
        states = [engine.new_state(**case.dims) for engine in engines]
        for feeds in case.calls:
            portable, specialised = (called(e, feeds, s) for e, s in zip(engines, states, strict=True))
            assert_near(specialised, portable)
        ends = case.calls[-1]["write_index"] + case.calls[-1]["position_ids"].shape[1]
        for tensor in engines[0].spec.state_tensors:
            for row, end in enumerate(ends):
                kept = [state.read(tensor.name)[row, :, :end] for state in states]
                np.testing.assert_allclose(kept[1], kept[0], rtol=0, atol=TOLERANCES["lm"])


def test_rows_of_a_batch_go_on_together(exported: Exported) -> None:
    """Rows that hold columns of different numbers get several more: GroupQueryAttention refuses it, so they go one by one."""
    config, ids = exported.source.config, exported.source.ids
    rng = np.random.default_rng(3)
    first = [random_prompt(config, ids, (1, length), rng)[0] for length in (7, 3)]
    more = random_prompt(config, ids, (2, 4), rng)
    calls = [prefill_feeds(first), chunk_feeds(more, np.array([7, 3])), chunk_feeds(more[:, :, :1], np.array([11, 7]))]
    portable, specialised = exported.engines("slow_ar")
    states = [engine.new_state(batch=2, cache=16) for engine in (portable, specialised)]
    for feeds in calls:
        assert_near(called(specialised, feeds, states[1]), called(portable, feeds, states[0]))


def test_the_families_give_the_same(golden_model: GoldenModel) -> None:
    """Results are equal, although heads of some sizes are not replaced."""
    source = golden_model.lm
    for feeds in slow_ar_cases(source.config, source.ids)[0].calls[:1]:
        portable, specialised = (golden_model.engine("slow_ar", specialise=choice) for choice in (False, True))
        rows = feeds["prompt"].shape[2]
        given = [called(e, feeds, e.new_state(batch=1, cache=rows)) for e in (portable, specialised)]
        assert_near(*given)


def test_heads_of_other_widths_are_left_alone(exported: Exported) -> None:
    model = onnx.load(exported.file("slow_ar"), load_external_data=False)
    for value in model.graph.input:
        if value.name.startswith(("key_cache", "value_cache")):
            value.type.tensor_type.shape.dim[3].dim_value = 24
    assert specialise(model.SerializeToString())[1] is None


def test_another_graph_is_left_as_it_is(s2_model: GoldenModel) -> None:
    portable = s2_model.file("codec_encode").read_bytes()
    rewritten, columns = specialise(portable)
    assert columns is None
    assert operators(rewritten)["Attention"] == operators(portable)["Attention"]


def test_attention_under_another_mask_is_left_alone(exported: Exported) -> None:
    """GroupQueryAttention supports no other masks, such as a window."""
    model = onnx.load(exported.file("slow_ar"), load_external_data=False)
    masks = {node.input[3] for node in model.graph.node if node.op_type == "Attention"}
    (compare,) = (node for node in model.graph.node if node.output[0] in masks)
    compare.op_type = "GreaterOrEqual"
    rewritten, columns = specialise(model.SerializeToString())
    assert columns is None
    assert "GroupQueryAttention" not in operators(rewritten)


def test_a_bias_before_a_norm_is_not_taken_for_a_residual_sum() -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])
    nodes = [
        helper.make_node("Add", ["x", "bias"], ["sum"]),
        helper.make_node("RMSNormalization", ["sum", "gain"], ["y"], axis=-1, epsilon=1e-6),
    ]
    constants = [numpy_helper.from_array(np.ones(4, np.float32), name) for name in ("bias", "gain")]
    model = helper.make_model(helper.make_graph(nodes, "g", [x], [y], constants), opset_imports=[helper.make_opsetid("", 24)])
    rewritten, _ = specialise(model.SerializeToString())
    assert operators(rewritten) == {"Add": 1, "RMSNormalization": 1}


def test_what_the_rewriter_does_not_know_is_kept(s2_model: GoldenModel, tmp_path: Path) -> None:
    """Undeclared fields of the format, such as the version, are kept."""
    portable = onnx.load(s2_model.file("slow_ar"), load_external_data=False)
    rewritten = onnx.ModelProto.FromString(specialise(portable.SerializeToString())[0])
    assert (rewritten.ir_version, rewritten.producer_name) == (portable.ir_version, portable.producer_name)
    places = {t.name: [(e.key, e.value) for e in t.external_data] for t in portable.graph.initializer}
    assert all(
        places[t.name] == [(e.key, e.value) for e in t.external_data] for t in rewritten.graph.initializer if t.name in places
    )
