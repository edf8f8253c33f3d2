"""Exported graphs: portable, and equal to their modules whatever the configuration and however they are called."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from test_configurations import random_dac, write_codec

from fishrt.bundle.folder import Bundle
from fishrt_engines import Engine
from fishrt_engines.engine import GraphSpec, TensorSpec
from fishrt_export.errors import ExportError
from fishrt_export.graph.report import PEAK, Case, flipped_margin
from fishrt_export.graph.store import store
from fishrt_export.graph.trace import trace
from fishrt_export.graph.verify import verify
from fishrt_export.models.codec.dac import Dac
from fishrt_export.models.codec.dac_config import MAX_FRAMES, DacConfig
from fishrt_export.models.codec.decoding import decode_spec
from fishrt_export.models.codec.layers import WindowTransformer
from fishrt_export.models.codec.load import OFFICIAL
from fishrt_export.sources.cases import codec_decode_cases, codec_encode_cases, random_prompt, slow_ar_cases
from fishrt_export.sources.codec import AUDIO_TOLERANCE, COSINE_MARGIN
from fishrt_export.sources.language_model import LANGUAGE_MODEL_TOLERANCE
from tiny import GoldenModel, chunk_feeds, prefill_feeds
from tolerances import TOLERANCES, assert_near

KINDS = {
    torch.bfloat16: onnx.TensorProto.BFLOAT16,
    torch.float16: onnx.TensorProto.FLOAT16,
    torch.float32: onnx.TensorProto.FLOAT,
}
ROLES = ("slow_ar", "fast_ar", "codec_encode", "codec_decode")


# ---- the files


@pytest.fixture(scope="module")
def graphs(tiny_bundle: Bundle) -> dict[str, onnx.ModelProto]:
    """The graphs without their weights."""
    specs = tiny_bundle.manifest.specs
    return {role: onnx.load(tiny_bundle.file(spec.file), load_external_data=False) for role, spec in specs.items()}


def test_a_bundle_is_complete(tiny_bundle: Bundle) -> None:
    tiny_bundle.verify()
    manifest = tiny_bundle.manifest
    assert set(manifest.graphs) == set(ROLES)
    assert {f"{role}.onnx{end}" for role in manifest.graphs for end in ("", ".data")} <= set(manifest.files)
    parities = {role: graph.parity for role, graph in manifest.graphs.items() if graph.parity is not None}
    assert parities.keys() == manifest.graphs.keys()
    for role, parity in parities.items():
        assert parity.max_abs_error <= parity.tolerance
        of_codec = {"codec_encode": COSINE_MARGIN, "codec_decode": AUDIO_TOLERANCE}
        assert parity.tolerance == of_codec.get(role, LANGUAGE_MODEL_TOLERANCE)
    assert parities["slow_ar"].max_abs_error > 0


def test_a_bundle_does_not_tell_where_it_was_made(tiny_bundle: Bundle) -> None:
    traces = [b"site-packages", b".py", str(Path.home()).encode() + b"/", str(tiny_bundle.path.parent).encode()]
    for name in tiny_bundle.manifest.files:
        if not name.endswith(".data"):
            content = tiny_bundle.file(name).read_bytes()
            assert not [trace for trace in traces if trace in content], name


@pytest.mark.parametrize("role", ROLES)
def test_graphs_are_portable(tiny_bundle: Bundle, graphs: dict[str, onnx.ModelProto], role: str) -> None:
    graph, spec = graphs[role], tiny_bundle.manifest.specs[role]
    onnx.checker.check_model(str(tiny_bundle.file(spec.file)), full_check=True)
    assert [(entry.domain, entry.version) for entry in graph.opset_import] == [("", 24)]
    assert graph.ir_version in (10, 11)
    assert not graph.functions
    assert not graph.metadata_props
    assert not [node.name for node in graph.graph.node if node.metadata_props or node.doc_string or node.domain]
    for described, found in ((spec.inputs, graph.graph.input), (spec.outputs, graph.graph.output)):
        shapes = [[d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim] for value in found]
        assert [value.name for value in found] == [tensor.name for tensor in described]
        assert shapes == [list(tensor.shape) for tensor in described]
    for tensor in graph.graph.initializer:
        places = {entry.key: entry.value for entry in tensor.external_data}
        assert places.get("location", f"{spec.file}.data") == f"{spec.file}.data"


@pytest.mark.parametrize("role", ["slow_ar", "fast_ar"])
def test_operators_of_the_cache(graphs: dict[str, onnx.ModelProto], role: str, s2_model: GoldenModel) -> None:
    config = s2_model.lm.config
    layers = (config.slow if role == "slow_ar" else config.fast).layers
    for operator, count, attributes in (
        ("TensorScatter", 2 * layers, {"axis": -2}),
        ("Attention", layers, {"is_causal": 0}),
        ("RotaryEmbedding", 2 * layers, {"interleaved": 1}),
    ):
        nodes = [node for node in graphs[role].graph.node if node.op_type == operator]
        assert len(nodes) == count
        for node in nodes:
            found = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            assert {name: found.get(name) for name in attributes} == attributes


@pytest.mark.parametrize("role", ROLES)
def test_weights_keep_their_names_layout_and_type(s2_model: GoldenModel, graphs: dict[str, onnx.ModelProto], role: str) -> None:
    jobs = [*s2_model.lm.jobs("audio"), *s2_model.codec.jobs()]
    weights = next(job.weights for job in jobs if job.role == role)
    stored = {tensor.name: tensor for tensor in graphs[role].graph.initializer}
    found = {name: tensor for name, tensor in weights.items() if name in stored}
    assert sum(tensor.numel() for tensor in found.values()) > 0.2 * sum(tensor.numel() for tensor in weights.values())
    for name, tensor in found.items():
        assert tuple(stored[name].dims) == tuple(tensor.shape)
        assert stored[name].data_type == KINDS[tensor.dtype], name
    if role.endswith("ar"):
        assert not [name for name, tensor in weights.items() if name not in found and tensor.ndim > 1]


@pytest.mark.parametrize("role", ["slow_ar", "fast_ar"])
def test_onnxruntime_folds_the_casts_of_weights(tiny_bundle: Bundle, tmp_path: Path, role: str) -> None:
    """Only the casts after embedding tables, which stay in 16 bits, remain."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    path = tiny_bundle.file(tiny_bundle.manifest.specs[role].file)
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    graph = onnx.load(tmp_path / "optimised.onnx", load_external_data=False).graph
    gathered = {name for node in graph.node if node.op_type == "Gather" for name in node.output}
    weights = {tensor.name: tensor.data_type for tensor in graph.initializer}
    casts = [node.input[0] for node in graph.node if node.op_type == "Cast"]
    assert not [name for name in casts if name in weights]
    assert {name for name in casts if name in gathered}
    tables = [node.input[0] for node in graph.node if node.op_type == "Gather" and node.input[0] in weights]
    assert onnx.TensorProto.BFLOAT16 in {weights[name] for name in tables}


def test_a_tied_head_is_stored_once(s2_model: GoldenModel) -> None:
    if not s2_model.lm.config.tied_head:
        pytest.skip("the golden model's head is not tied")
    graph = onnx.load(s2_model.file("slow_ar", "full"), load_external_data=False).graph
    config = s2_model.lm.config
    tables = [tensor.name for tensor in graph.initializer if sorted(tensor.dims) == sorted((config.vocab_size, config.slow.dim))]
    assert tables == ["embeddings.weight"]


# ---- what the graphs compute


@pytest.fixture(params=[False, True], ids=["portable", "form for CPUs"])
def slow(s2_model: GoldenModel, request: pytest.FixtureRequest) -> Engine:
    return s2_model.engine("slow_ar", fast=request.param)


def random_prompts(s2_model: GoldenModel, *lengths: int) -> list[np.ndarray]:
    source, rng = s2_model.lm, np.random.default_rng(7)
    return [random_prompt(source.config, source.ids, (1, length), rng)[0] for length in lengths]


def results(engine: Engine, calls: list[dict[str, np.ndarray]], cache: int) -> dict[str, np.ndarray]:
    """Return the results of the last of several calls."""
    state = engine.new_state(batch=len(calls[0]["prompt"]), cache=cache)
    for feeds in calls:
        last = {name: value.copy() for name, value in engine.run(feeds, state).items()}
    return last


def test_prefill_and_step_are_a_longer_prefill(s2_model: GoldenModel, slow: Engine) -> None:
    (prompt,) = random_prompts(s2_model, 12)
    whole = results(slow, [prefill_feeds([prompt])], cache=12)
    for steps in (1, 4):
        calls = [prefill_feeds([prompt[:, :-steps]])]
        calls += [chunk_feeds(prompt[None, :, t : t + 1], np.array([t])) for t in range(12 - steps, 12)]
        assert_near(results(slow, calls, cache=12), whole)


@pytest.mark.parametrize("chunks", [(5, 7), (1, 1, 10), (11, 1), (3, 3, 3, 3)], ids=str)
def test_a_prefill_in_chunks_is_a_whole_one(s2_model: GoldenModel, slow: Engine, chunks: tuple[int, ...]) -> None:
    (prompt,) = random_prompts(s2_model, 12)
    edges = np.cumsum([0, *chunks])
    calls = [chunk_feeds(prompt[None, :, a:b], np.array([a])) for a, b in itertools.pairwise(edges)]
    assert_near(results(slow, calls, cache=20), results(slow, [prefill_feeds([prompt])], cache=12))


def test_rows_of_a_batch_do_not_see_each_other(s2_model: GoldenModel, slow: Engine) -> None:
    """Rows of three lengths together, with steps after, against each alone."""
    prompts = random_prompts(s2_model, 9, 4, 13)
    column = random_prompts(s2_model, 1)[0]
    starts = np.array([prompt.shape[1] for prompt in prompts])
    steps = [chunk_feeds(np.repeat(column[None], 3, axis=0), starts + n) for n in range(3)]
    together = results(slow, [prefill_feeds(prompts), *steps], cache=16)
    for row, prompt in enumerate(prompts):
        calls = [prefill_feeds([prompt]), *(chunk_feeds(column[None], starts[row : row + 1] + n) for n in range(3))]
        alone = results(slow, calls, cache=16)
        assert_near({name: value[row : row + 1] for name, value in together.items()}, alone)


def test_the_cache_may_be_longer_than_needed(s2_model: GoldenModel, slow: Engine) -> None:
    (prompt,) = random_prompts(s2_model, 6)
    calls = [prefill_feeds([prompt])]
    assert_near(results(slow, calls, cache=6), results(slow, calls, cache=50))


def decode(engine: Engine, codes: np.ndarray) -> np.ndarray:
    """codes [batch, K, frames] → audio [batch, 1, samples], from the start."""
    positions = np.tile(np.arange(codes.shape[2]), (len(codes), 1))
    return engine.run({"codes": codes, "position_ids": positions}, engine.new_state(batch=len(codes)))["audio"].copy()


def test_more_frames_never_change_earlier_audio(s2_model: GoldenModel) -> None:
    engine, config = s2_model.engine("codec_decode"), s2_model.codec.config
    sizes = np.array(config.codebook_sizes)[:, None]
    codes = np.random.default_rng(5).integers(0, sizes, (1, len(sizes), 40))
    whole = decode(engine, codes)
    for frames in (1, 2, 7, 39):
        audio = decode(engine, np.ascontiguousarray(codes[..., :frames]))
        assert audio.shape == (1, 1, frames * config.hop)
        assert np.abs(audio - whole[..., : frames * config.hop]).max() <= TOLERANCES["prefix"]


def test_rows_of_codes_do_not_see_each_other(s2_model: GoldenModel) -> None:
    engine, config = s2_model.engine("codec_decode"), s2_model.codec.config
    sizes = np.array(config.codebook_sizes)[:, None]
    codes = np.random.default_rng(6).integers(0, sizes, (3, len(sizes), 5))
    together = decode(engine, codes)
    for row in range(3):
        alone = decode(engine, codes[row : row + 1])
        assert np.abs(alone[0] - together[row]).max() <= TOLERANCES["prefix"]


def test_codes_may_differ_only_on_the_margin_and_after_it() -> None:
    expected = np.zeros((1, 3, 4), np.int64)
    margins = np.full((1, 3, 4), 0.5, np.float32)
    margins[0, 1, 2] = 5e-5
    actual = expected.copy()
    assert flipped_margin(expected, actual, margins, 3) == 0
    actual[0, 1:, 2] = 7
    assert flipped_margin(expected, actual, margins, 3) == np.float32(5e-5) <= COSINE_MARGIN
    actual[0, 1, 2] = 0  # later differences are excused only if an earlier choice on the margin differs
    assert flipped_margin(expected, actual, margins, 3) == 0.5
    actual[0, :, 2] = 7
    assert flipped_margin(expected, actual, margins, 3) == 0.5


class Scale(torch.nn.Module):
    """values · factor."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values * self.factor


@pytest.mark.slow
def test_errors_are_measured_as_recorded(tmp_path: Path) -> None:
    """A graph against a slightly different module: the error is absolute for small outputs, relative for large ones."""
    shape = ("batch", 4)
    spec = GraphSpec("scale.onnx", (TensorSpec("values", "float32", shape),), (TensorSpec("scaled", "float32", shape),))
    store(trace(Scale(1.0), spec, {}), tmp_path / spec.file, {}, {})
    for size, error in ((2.0, 2e-3), (2 * PEAK, 1e-3 * PEAK)):
        cases = [Case(({"values": np.full((1, 4), size, np.float32)},), {})]
        (parity,) = verify(Scale(1.001), [spec], tmp_path, cases, tolerance=1.1 * error)
        assert parity.max_abs_error == pytest.approx(error, rel=0.01)
        assert parity.tolerance == 1.1 * error
        with pytest.raises(ExportError, match="scaled differs by"):
            verify(Scale(1.001), [spec], tmp_path, cases, tolerance=0.9 * error)


def test_the_cases_reach_the_last_position(s2_model: GoldenModel) -> None:
    config = s2_model.lm.config
    positions = [feeds["position_ids"].max() for case in slow_ar_cases(config, s2_model.lm.ids) for feeds in case.calls]
    assert max(positions) == config.max_seq_len - 1


def test_the_cases_fill_their_caches(s2_model: GoldenModel) -> None:
    """Also those of forms, which write columns at their positions: by single steps, and by several columns behind others."""
    cases = [case for case in slow_ar_cases(s2_model.lm.config, s2_model.lm.ids) if case.is_consecutive]
    lengths = [[feeds["position_ids"].shape[1] for feeds in case.calls] for case in cases]
    assert lengths == [[5, 1, 2], [9, 1, 1, 1]]
    for case in cases:
        assert case.calls[-1]["position_ids"].max() == case.dims["cache"] - 1


@pytest.mark.parametrize("official", [False, True], ids=["golden", "official"])
def test_the_cases_leave_every_window(s2_model: GoldenModel, official: bool) -> None:
    codec = DacConfig.from_json(OFFICIAL) if official else s2_model.codec.config
    with torch.device("meta"):
        spec = decode_spec(Dac(codec))
    calls = [[feeds["codes"].shape[2] for feeds in case.calls] for case in codec_decode_cases(codec, spec, codec.sight)]
    assert all(len(frames) > 1 for frames in calls)
    assert max(max(frames) for frames in calls) > codec.post_module.window - 1
    assert max(sum(frames) for frames in calls) > codec.post_module.window
    length = max(case.calls[0]["audio"].shape[2] for case in codec_encode_cases(codec, codec.sight))
    assert length > codec.hop * codec.pre_module.window
    for stride, transformer in zip(codec.encoder_rates, codec.encoder_transformers, strict=True):
        length //= stride
        assert transformer is None or length > transformer.window


@pytest.mark.parametrize("part", ["encoder", "pre_module", "post_module"])
def test_a_window_that_is_left_out_is_seen(s2_model: GoldenModel, part: str) -> None:
    job = s2_model.codec.jobs()[part == "post_module"]
    module, folder = job.build(), s2_model.file(job.role).parent
    inner = [m for name, m in module.named_modules() if isinstance(m, WindowTransformer) and part in name.split(".")]
    if not inner:
        pytest.skip("the golden encoder has no transformer")
    for transformer in inner:
        transformer.window = MAX_FRAMES
    with pytest.raises(ExportError, match="is not the torch module"):
        verify(module, [job.spec], folder, job.cases, job.tolerance, job.margins and job.margins(module))


@pytest.mark.thorough
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_graphs_of_another_codec(tmp_path: Path, dtype: torch.dtype) -> None:
    """Odd strides and channels, 16-bit weights: verified against the module, and stored in the checkpoint's type."""
    source = write_codec(tmp_path, "dac", random_dac(np.random.default_rng(2), encoder_layers=1), dtype)
    assert source.problems() == []
    for job in source.jobs() if dtype == torch.float32 else source.jobs()[1:]:
        parity = job.run(tmp_path).parity
        assert parity.max_abs_error <= parity.tolerance
        graph = onnx.load(tmp_path / job.spec.file, load_external_data=False).graph
        kinds = {tensor.data_type for tensor in graph.initializer if tensor.name in source.weights}
        assert kinds == {KINDS[dtype]}
