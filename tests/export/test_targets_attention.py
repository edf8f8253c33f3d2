"""Graphs rewritten into ONNX Runtime's fastest operators: the replaced operators, and unchanged results and weights."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from fishrt.bundle.folder import embedded_bundle
from fishrt_engines import Array, GraphSpec
from fishrt_engines.engine import ColumnInputs
from fishrt_export.models.transformer import rope_table
from fishrt_export.sources.cases import fast_ar_cases, random_prompt, slow_ar_cases
from fishrt_export.targets import edit
from fishrt_export.targets.attention import fast_operators
from helpers_graphs import FIRST_NORM, Calls, copied, operators, places
from tiny import GoldenModel, chunk_feeds
from tolerances import TOLERANCES, assert_near
from wide import EVERYTHING_WIDE, PLAIN_WIDE, Exported

pytest.importorskip("torch", reason="needs the export extra")


def layer_count(exported: Exported, role: str) -> int:
    config = exported.source.config
    return (config.slow if role == "slow_ar" else config.fast).layers


def rewritten(path: Path, *, cuda: bool = False) -> tuple[Path, ColumnInputs | None]:
    """Return the form beside the portable graph, and the inputs of its attention."""
    model = edit.load(path)
    columns = fast_operators(model, cuda=cuda)
    form = path.with_name(f"{path.stem}_{'cuda' if cuda else 'cpu'}.onnx")
    edit.save(model, form)
    return form, columns


@pytest.fixture(scope="module", params=[PLAIN_WIDE, EVERYTHING_WIDE], ids=["plain", "everything"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return Exported(tmp_path_factory.mktemp("wide"), request.param)


@pytest.mark.parametrize("role", ["slow_ar", "fast_ar"])
def test_every_attention_is_replaced(exported: Exported, role: str) -> None:
    form, columns = rewritten(exported.file(role))
    before, after = operators(exported.file(role)), operators(form)
    layers = layer_count(exported, role)
    assert columns == ColumnInputs("write_index", "position_ids")
    assert after["GroupQueryAttention"] == before["Attention"] == layers
    assert not after.keys() & {"Attention", "TensorScatter", "RotaryEmbedding"}
    # Two norms a layer follow a residual sum, except the first; the last norm gets only one of many columns.
    assert after["SkipSimplifiedLayerNormalization"] == 2 * layers - 1


@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize("role", ["slow_ar", "fast_ar"])
def test_the_results_are_the_same(exported: Exported, role: str, cuda: bool) -> None:
    """Results and caches are equal over several calls, rows and ragged lengths, except cache rows of padding."""
    source, spec = exported.source, exported.jobs[role].spec
    cases = (
        slow_ar_cases(source.config, source.ids)[:2]
        if role == "slow_ar"
        else fast_ar_cases(source.config, source.config.fast.dim)
    )
    form, columns = rewritten(exported.file(role), cuda=cuda)
    assert columns is not None
    for case in cases:
        portable, specialised = (Calls(path, spec, **case.dims) for path in (exported.file(role), form))
        for feeds in case.calls:
            length = feeds["position_ids"].shape[1]
            ends = feeds["write_index"] + length
            # A step takes any larger number, such as all rows of the cache.
            rows = ends.max() if length > 1 else next(iter(portable.state.values())).shape[2]
            added = {columns.rows: np.array(rows, np.int32)} if columns.rows else {}
            assert_near(specialised.run({**feeds, **added}), portable.run(feeds))
        for name, cache in portable.state.items():
            for row, end in enumerate(ends):
                found = specialised.state[name][row, :, :end]
                np.testing.assert_allclose(found, cache[row, :, :end], rtol=0, atol=TOLERANCES["lm"])


ROWS = 32768
"""The positions of the largest official model."""


def test_the_last_rows_of_a_long_cache_give_the_same(exported: Exported) -> None:
    """Several columns, and then one, at the end of the tables of positions and of a cache that is full of numbers."""
    config, spec, rng = exported.source.config.slow, exported.jobs["slow_ar"].spec, np.random.default_rng(6)
    model = edit.load(exported.file("slow_ar"))
    for name, table in zip(("cos", "sin"), rope_table(ROWS, config.head_dim, config.rope_base), strict=True):
        model.graph.initializers[name].const_value = ir.tensor(table.numpy(), name=name)
        model.graph.initializers[name].shape = ir.Shape(table.shape)
    edit.save(model, path := exported.folder / "long.onnx")
    portable, specialised = (Calls(file, spec, batch=1, cache=ROWS) for file in (path, rewritten(path)[0]))
    for name, cache in portable.state.items():
        cache[:] = rng.standard_normal(cache.shape)
        specialised.state[name] = cache.copy()
    columns = random_prompt(exported.source.config, exported.source.ids, (1, 4), rng)
    for start, stop in ((0, 3), (3, 4)):
        feeds = chunk_feeds(columns[:, :, start:stop], np.array([ROWS - 4 + start]))
        assert_near(specialised.run(feeds), portable.run(feeds))
    for name, cache in portable.state.items():
        np.testing.assert_allclose(specialised.state[name], cache, rtol=0, atol=TOLERANCES["lm"])


def frame_feeds(spec: GraphSpec, rows: int, rng: np.random.Generator) -> dict[str, Array]:
    """Return feeds of the frame graph: random logits and noise, and settings that let much be drawn."""
    settings = {"temperature": 1.5, "top_p": 0.95, "top_k": 30, "recent": -1}
    feeds: dict[str, Array] = {}
    last = {tensor.name: tensor.shape[-1] for tensor in spec.feeds}
    sizes = {"batch": rows, "main_ranked": min(30, int(last["main_noise"])), "code_ranked": min(30, int(last["code_noise"]))}
    for tensor in spec.feeds:
        shape = tensor.resolve(sizes)
        if tensor.name.endswith("ranks"):
            feeds[tensor.name] = np.arange(*shape)
            continue
        drawn = rng.standard_exponential(shape) if tensor.name.endswith("noise") else rng.standard_normal(shape)
        feeds[tensor.name] = (np.full(shape, settings[tensor.name]) if tensor.name in settings else drawn).astype(tensor.dtype)
    return feeds


def test_the_frame_draws_the_same_codes(exported: Exported) -> None:
    """Its caches begin empty, so that the positions of all calls are constants."""
    spec = exported.spec("frame")
    portable = exported.folder / spec.file
    form, columns = rewritten(portable, cuda=True)
    assert columns is None
    assert operators(form)["GroupQueryAttention"] == operators(portable)["Attention"] > layer_count(exported, "fast_ar")
    assert not operators(form).keys() & {"Attention", "TensorScatter", "RotaryEmbedding"}
    for seed in range(8):
        feeds = frame_feeds(spec, 4, np.random.default_rng(seed))
        expected, found = (Calls(path, spec).run(feeds)["column"] for path in (portable, form))
        assert len(np.unique(expected)) > 2
        np.testing.assert_array_equal(found, expected)


def head_norms(graph: ir.Graph) -> list[str]:
    """Return the names of the weights of the norms of queries and keys that are nodes."""
    norms = [str(node.inputs[1].name) for node in graph if node.op_type == "RMSNormalization"]
    return [name for name in norms if ".q_norm." in name or ".k_norm." in name]


@pytest.mark.parametrize("role", ["slow_ar", "fast_ar", "frame"])
def test_norms_of_heads_are_inputs_on_a_device(exported: Exported, role: str) -> None:
    """The attention takes queries, keys and values as one product gives them, and their norms with the weights of each layer."""
    config = exported.source.config.slow if role == "slow_ar" else exported.source.config.fast
    portable = edit.load(exported.folder / exported.spec(role).file).graph
    form = edit.load(rewritten(exported.folder / exported.spec(role).file, cuda=True)[0]).graph
    grouped = [node for node in form if node.op_type == "GroupQueryAttention"]
    assert len(head_norms(portable)) == 2 * config.qk_norm * len(grouped)
    assert head_norms(form) == []
    named: Counter[tuple[str, ...]] = Counter()
    for node in grouped:
        assert node.inputs[1:3] == (None, None)
        assert node.inputs[0].producer().op_type in ("MatMul", "Add")
        if not config.qk_norm:
            assert len(node.inputs) == 9
            continue
        assert node.inputs[9:FIRST_NORM] == (None,) * 5
        assert node.attributes["qk_norm_epsilon"].as_float() == np.float32(config.norm_eps)
        weights = [value.producer().inputs[0] for value in node.inputs[FIRST_NORM:]]  # widened from bfloat16
        named[tuple(str(value.name) for value in weights)] += 1
        assert [value.const_value.shape.numpy() for value in weights] == [(config.head_dim,)] * 2
    half = "fast." if role == "frame" else ""
    layers = [tuple(f"{half}layers.{n}.attention.{kind}_norm.weight" for kind in "qk") for n in range(config.layers)]
    assert named.keys() == ({*layers} if config.qk_norm else set())
    assert len({*named.values()}) <= 1


@pytest.mark.parametrize("fault", ["only the queries", "another epsilon", "another axis", "weights of two axes"])
def test_norms_that_the_attention_cannot_compute_stay_before_it(fault: str) -> None:
    model = edit.load(embedded_bundle() / "slow_ar.onnx")
    norms = [node for node in model.graph if node.op_type == "RMSNormalization" and ".k_norm." in str(node.inputs[1].name)]
    for norm in norms:
        if fault == "only the queries":
            ir.convenience.replace_nodes_and_values(model.graph, norm, [norm], [], norm.outputs, norm.inputs[:1])
        elif fault == "another epsilon":
            norm.attributes["epsilon"] = ir.AttrFloat32("epsilon", 1e-3)
        elif fault == "another axis":
            norm.attributes["axis"] = ir.AttrInt64("axis", -2)
        else:
            norm.inputs[1].producer().inputs[0].const_value = ir.tensor(np.ones((1, 64), np.float32))
    assert fast_operators(model, cuda=True)
    assert len(head_norms(model.graph)) == len(norms) * (1 if fault == "only the queries" else 2) > 0
    grouped = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
    assert [len(node.inputs) for node in grouped] == [9] * len(norms)
    assert all(None not in node.inputs[:3] for node in grouped)


def test_rows_are_an_input_of_a_device(exported: Exported) -> None:
    """Nothing is left to compute on the CPU but the last row of each column."""
    form, columns = rewritten(exported.file("slow_ar"), cuda=True)
    assert columns == ColumnInputs("write_index", "position_ids", "specialised.rows", "key_cache.0")
    added = onnx.load(form, load_external_data=False).graph.input[-1]
    assert (added.name, added.type.tensor_type.elem_type) == (columns.rows, TensorProto.INT32)
    assert list(added.type.tensor_type.shape.dim) == []
    assert "ReduceMax" not in operators(form)


def test_the_families_give_the_same(golden_model: GoldenModel, tmp_path: Path) -> None:
    """Results are equal, although heads of some sizes are not replaced."""
    source = golden_model.lm
    portable = copied(golden_model.file("slow_ar"), tmp_path)
    form, _ = rewritten(portable)
    spec = next(job.spec for job in source.jobs("audio") if job.role == "slow_ar")
    case = slow_ar_cases(source.config, source.ids)[0]
    calls = [Calls(path, spec, **case.dims) for path in (portable, form)]
    for feeds in case.calls:
        expected, found = (c.run(feeds) for c in calls)
        assert_near(found, expected)


def test_heads_of_other_widths_are_left_alone(exported: Exported) -> None:
    model = edit.load(exported.file("slow_ar"))
    tables = [v for name, v in model.graph.initializers.items() if name.rpartition(".")[2] in ("cos", "sin")]
    assert len(tables) == 2
    for value in tables:
        value.const_value = ir.tensor(np.zeros((8, 12), np.float32), name=str(value.name))
        value.shape = ir.Shape((8, 12))
    assert fast_operators(model) is None


def test_attention_without_a_cache_is_left_as_it_is(s2_model: GoldenModel, tmp_path: Path) -> None:
    portable = copied(s2_model.file("codec_encode"), tmp_path)
    form, columns = rewritten(portable)
    assert columns is None
    assert operators(form)["Attention"] == operators(portable)["Attention"] > 0
    assert "GroupQueryAttention" not in operators(form)


def test_attention_under_another_mask_is_left_alone(exported: Exported) -> None:
    """GroupQueryAttention supports no other masks, such as a window."""
    model = edit.load(exported.file("slow_ar"))
    (compare,) = {node.inputs[3].producer() for node in model.graph if node.op_type == "Attention"}
    compare.op_type = "GreaterOrEqual"
    assert fast_operators(model) is None
    assert "GroupQueryAttention" not in {node.op_type for node in model.graph}


def test_a_bias_before_a_norm_is_not_taken_for_a_residual_sum() -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])
    nodes = [
        helper.make_node("Add", ["x", "bias"], ["sum"]),
        helper.make_node("RMSNormalization", ["sum", "gain"], ["y"], axis=-1, epsilon=1e-6),
    ]
    constants = [numpy_helper.from_array(np.ones(4, np.float32), name) for name in ("bias", "gain")]
    graph = helper.make_graph(nodes, "g", [x], [y], constants)
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)]))
    fast_operators(model)
    assert Counter(node.op_type for node in model.graph) == {"Add": 1, "RMSNormalization": 1}
    assert model.opset_imports == {"": 24}


def test_version_and_weights_are_kept(s2_model: GoldenModel, tmp_path: Path) -> None:
    portable = copied(s2_model.file("slow_ar"), tmp_path)
    data = portable.with_name(f"{portable.name}.data")
    before = data.read_bytes()
    form, _ = rewritten(portable)
    models = [onnx.load(path, load_external_data=False) for path in (portable, form)]
    assert len({(model.ir_version, model.producer_name, model.producer_version) for model in models}) == 1
    assert places(form).items() <= places(portable).items()
    assert places(form)
    assert data.read_bytes() == before
    assert not form.with_name(f"{form.name}.data").exists()
