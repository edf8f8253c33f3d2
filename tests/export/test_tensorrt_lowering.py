"""Graphs lowered for TensorRT: they follow its importer's rules and, in ONNX Runtime, equal the portable ones.

TensorRT is not needed. ONNX Runtime does not compute in bfloat16 on a CPU, so only its types are checked.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import pytest

from fishrt_engines import Array, Engine, State, open_engine
from fishrt_engines.engine import GraphSpec
from fishrt_engines.trt.plans import LoweringOptions

pytest.importorskip("torch", reason="needs the export extra")

import onnx_ir as ir

from fishrt_export.errors import ExportError
from fishrt_export.graph.job import GraphJob
from fishrt_export.graph.recipe import Recipe
from fishrt_export.sources.cases import codec_decode_cases, codec_encode_cases, random_prompt
from fishrt_export.sources.language_model import LanguageModelSource, open_language_model
from fishrt_export.targets.edit import infer, load, numbers
from fishrt_export.targets.tensorrt.lowering import lower_for_tensorrt
from fishrt_export.targets.tensorrt.rules import check_for_tensorrt, errors
from synthetic import EVERYTHING, random_weights, write_flat
from tiny import GoldenModel, chunk_feeds, prefill_feeds
from tolerances import TOLERANCES
from wide import EVERYTHING_WIDE, PLAIN_WIDE

ROWS = 12
"""Rows of the caches: the limit for which an engine is built."""
LM = ("slow_ar", "fast_ar")
CODECS = ("codec_encode", "codec_decode")
PLAIN_FORM = LoweringOptions(ROWS, "fp32", fp32_attention=False, primitive_attention=False)
FORMS = [
    pytest.param(LoweringOptions(ROWS, precision, fp32_attention=fp32, primitive_attention=primitive), id=name)
    for precision in ("fp32", "fp16", "bf16")
    for fp32 in ((False,) if precision == "fp32" else (False, True))
    for primitive in (False, True)
    if (name := f"{precision}{'-fp32 attention' * fp32}{'-primitive' * primitive}")
]
WIDE = {"dim": 64, "intermediate_size": 96, "fast_dim": 64, "fast_intermediate_size": 32, "head_dim": 16, "fast_head_dim": 16}
"""Sizes with blocks of 64, 32 and 16 if quantised."""


class Exported:
    """The slow AR and the fast AR of a random model, with weights as a recipe stores them."""

    def __init__(self, folder: Path, config: dict[str, Any], precision: str = "fp32") -> None:
        write_flat(folder, config, random_weights(config))
        self.source, self.folder = open_language_model(folder, family="s2"), folder
        self.jobs: dict[str, GraphJob] = {job.role: job for job in self.source.jobs("audio")}
        plans = Recipe(precision).plan(
            {role: job.build() for role, job in self.jobs.items()}, {role: job.weights for role, job in self.jobs.items()}
        )
        for role, job in self.jobs.items():
            GraphJob(role, job.spec, job.build, job.weights, job.cases, job.tolerance, job.dims, job.margins, plans[role]).run(
                folder
            )

    def file(self, role: str) -> Path:
        return self.folder / self.jobs[role].spec.file


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """A cache of exports, each made once."""

    def export(name: str) -> Exported:
        integers = name in ("int8", "int4")
        config = PLAIN_WIDE if name == "plain" else {**EVERYTHING, **WIDE} if integers else EVERYTHING_WIDE
        return Exported(tmp_path_factory.mktemp(name), config, name if integers else "fp32")

    return cache(export)


@pytest.fixture(params=["plain", "everything", "int8", "int4"])
def exported(request: pytest.FixtureRequest, exports: Callable[[str], Exported]) -> Exported:
    """Models with shared keys and without, with biases, norms and a projection, and with integer weights."""
    return exports(request.param)


def lowered(path: Path, spec: GraphSpec, options: LoweringOptions) -> tuple[ir.Model, GraphSpec]:
    model = load(path)
    return model, lower_for_tensorrt(model, spec, options, "primitive" if options.primitive_attention else "fused")


def opened(path: Path, spec: GraphSpec, options: LoweringOptions, folder: Path) -> Engine:
    """Write the lowered graph with its weights into an empty folder. Return its engine in ONNX Runtime."""
    model, described = lowered(path, spec, options)
    tensors = (value.const_value for value in model.graph.initializers.values())
    for name in {tensor.location for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}:
        shutil.copy(path.with_name(str(name)), folder)
    (folder / path.name).write_bytes(ir.to_proto(model).SerializeToString())
    return open_engine(folder / path.name, described, provider="cpu")


def slow_calls(source: LanguageModelSource, lengths: tuple[int, ...]) -> Iterator[dict[str, Array]]:
    """Yield a prefill of these lengths, then at most three single columns within the cache."""
    config, ids, rng = source.config, source.ids, np.random.default_rng(5)
    yield prefill_feeds([random_prompt(config, ids, (1, length), rng)[0] for length in lengths])
    for step in range(min(ROWS - max(lengths), 3)):
        yield chunk_feeds(random_prompt(config, ids, (len(lengths), 1), rng), np.array(lengths) + step)


def fast_calls(source: LanguageModelSource, batch: int) -> Iterator[dict[str, Array]]:
    """Yield positions 0 and 1 in one call, then the others one by one."""
    config, rng = source.config, np.random.default_rng(6)
    hidden = rng.standard_normal((batch, config.fast.dim)).astype(np.float32)
    for start, stop in ((0, 2), *((n, n + 1) for n in range(2, config.num_codebooks))):
        yield {
            "hidden": hidden,
            "codes": rng.integers(0, config.codebook_width, (batch, stop - start)),
            "position_ids": np.tile(np.arange(start, stop), (batch, 1)),
            "write_index": np.full(batch, start),
        }


def new_state(engine: Engine, dims: Mapping[str, int]) -> State | None:
    """Return a state with those of `dims` that the engine leaves open; None without state."""
    names = {d for tensor in engine.spec.state_tensors for d in tensor.shape}
    return engine.new_state(**{name: size for name, size in dims.items() if name in names}) if engine.spec.states else None


def largest_error(ours: Engine, portable: Engine, calls: list[dict[str, Array]], **dims: int) -> float:
    """Return the largest error of all results and final states, relative to the largest number if that is above 1."""
    states, worst = [new_state(engine, dims) for engine in (ours, portable)], 0.0

    def compare(found: Array, expected: Array) -> None:
        nonlocal worst
        assert found.shape == expected.shape
        worst = max(worst, float(np.abs(found - expected).max()) / max(1.0, float(np.abs(expected).max())))

    for feeds in calls:
        found, expected = (
            {name: value.copy() for name, value in engine.run(feeds, state).items()}
            for engine, state in zip((ours, portable), states, strict=True)
        )
        assert found.keys() == expected.keys()
        for name in expected:
            assert found[name].dtype == expected[name].dtype
            compare(found[name], expected[name])
    for tensor in portable.spec.state_tensors:
        found, expected = (state.read(tensor.name) for state in states if state is not None)
        compare(found.astype(np.float32), expected)
    return worst


# --- what it computes ----------------------------------------------------------------------------------------------------------

# The least, usual and most columns of a prefill, in one row and in two, which may be of different lengths.
LENGTHS = [(1,), (5,), (ROWS,), (1, 1), (7, 3), (ROWS - 1, ROWS - 1), (ROWS, 1)]


@pytest.mark.parametrize("primitive", [False, True], ids=["attention", "primitive"])
def test_slow_ar_gives_the_same(exported: Exported, tmp_path: Path, primitive: bool) -> None:
    """At the smallest, usual and largest shapes of prefill and step."""
    portable = open_engine(exported.file("slow_ar"), exported.jobs["slow_ar"].spec, provider="cpu")
    options = LoweringOptions(ROWS, "fp32", fp32_attention=True, primitive_attention=primitive)
    engine = opened(exported.file("slow_ar"), portable.spec, options, tmp_path)
    for lengths in LENGTHS:
        calls = list(slow_calls(exported.source, lengths))
        error = largest_error(engine, portable, calls, batch=len(lengths), cache=ROWS)
        assert error <= TOLERANCES["lowered"], lengths


@pytest.mark.parametrize("primitive", [False, True], ids=["attention", "primitive"])
def test_fast_ar_gives_the_same(exported: Exported, tmp_path: Path, primitive: bool) -> None:
    portable = open_engine(exported.file("fast_ar"), exported.jobs["fast_ar"].spec, provider="cpu")
    options = LoweringOptions(ROWS, "fp32", fp32_attention=False, primitive_attention=primitive)
    engine = opened(exported.file("fast_ar"), portable.spec, options, tmp_path)
    for batch in (1, 2):
        error = largest_error(engine, portable, list(fast_calls(exported.source, batch)), batch=batch)
        assert error <= TOLERANCES["lowered"]


@pytest.mark.parametrize("options", [form for form in FORMS if "fp16" in str(form.id)])
def test_float16_is_near(exported: Exported, tmp_path: Path, options: LoweringOptions) -> None:
    """ONNX Runtime emulates float16 on a CPU: most operators compute in float32 on numbers that were rounded to it."""
    for role in LM:
        portable = open_engine(exported.file(role), exported.jobs[role].spec, provider="cpu")
        (folder := tmp_path / role).mkdir()
        engine = opened(exported.file(role), portable.spec, options, folder)
        calls = list(slow_calls(exported.source, (7, 3)) if role == "slow_ar" else fast_calls(exported.source, 2))
        error = largest_error(engine, portable, calls, batch=2, cache=ROWS)
        assert 0 < error <= TOLERANCES["lowered to float16"]


@pytest.mark.parametrize("primitive", [False, True], ids=["attention", "primitive"])
def test_the_language_models_give_the_same(golden_model: GoldenModel, tmp_path: Path, primitive: bool) -> None:
    """Each family is compared on the prompt of its vectors, which fills the cache to the last row."""
    vectors = np.load(golden_model.golden / "lm/vectors.npz")
    meta = json.loads((golden_model.golden / "lm/meta.json").read_text(encoding="utf-8"))
    prompt, prefill = vectors["slow/input"].astype(np.int64), meta["slow_prefill_len"]
    rows = prompt.shape[1]
    calls = [prefill_feeds([prompt[:, :prefill]])]
    calls += [chunk_feeds(prompt[None, :, t : t + 1], np.array([t])) for t in range(prefill, rows)]
    options = LoweringOptions(rows, "fp32", fp32_attention=True, primitive_attention=primitive)
    for role, runs in (("slow_ar", calls), ("fast_ar", list(fast_calls(golden_model.lm, 1)))):
        (folder := tmp_path / role).mkdir()
        portable = golden_model.engine(role)
        engine = opened(golden_model.file(role), portable.spec, options, folder)
        assert largest_error(engine, portable, runs, batch=1, cache=rows) <= TOLERANCES["lowered"]


@pytest.mark.parametrize("primitive", [False, True], ids=["attention", "primitive"])
def test_the_codecs_give_the_same(golden_model: GoldenModel, tmp_path: Path, primitive: bool) -> None:
    """Each family is compared at the smallest and largest verified sizes, with one row and two, over calls with state."""
    config = golden_model.codec.config
    options = LoweringOptions(None, "fp32", fp32_attention=True, primitive_attention=primitive)
    for role in CODECS:
        (folder := tmp_path / role).mkdir()
        portable = golden_model.engine(role)
        engine = opened(golden_model.file(role), portable.spec, options, folder)
        encode = role == "codec_encode"
        for case in (
            codec_encode_cases(config, config.sight) if encode else codec_decode_cases(config, portable.spec, config.sight)
        ):
            assert largest_error(engine, portable, list(case.calls), **case.dims) <= TOLERANCES["lowered"]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("primitive", [False, True], ids=["attention", "primitive"])
def test_a_frame_is_the_same(golden_model: GoldenModel, tmp_path: Path, precision: str, primitive: bool) -> None:
    """Columns are drawn with the same noise. In float16, codes may differ, but not main tokens."""
    path, spec = frame(golden_model)
    options = LoweringOptions(None, precision, fp32_attention=precision == "fp16", primitive_attention=primitive)
    engines = [open_engine(path, spec, provider="cpu"), opened(path, spec, options, tmp_path)]
    rng = np.random.default_rng(8)
    for batch in (1, 2):
        for _ in range(4):
            feeds = frame_feeds(spec, batch, rng)
            expected, found = (e.run({t.name: feeds[t.name] for t in e.spec.feeds})["column"] for e in engines)
            assert (expected >= 0).all()
            assert (found >= 0).all()
            same = slice(None) if precision == "fp32" else slice(1)
            np.testing.assert_array_equal(found[:, same], expected[:, same])


def frame(golden_model: GoldenModel) -> tuple[Path, GraphSpec]:
    """The file of the frame graph, and its description."""
    return golden_model.frame_file(golden_model.few), golden_model.lm.frame_job(golden_model.few, {}).spec


def frame_feeds(spec: GraphSpec, batch: int, rng: np.random.Generator) -> dict[str, Array]:
    """Return noise and random settings."""
    spec_of = {tensor.name: tensor for tensor in spec.feeds}
    settings = {
        "temperature": rng.uniform(0.5, 1.5),
        "top_p": rng.uniform(0.5, 1.0),
        "top_k": 30,
        "penalty": 1.3,
        "least_code": 1,
    }

    def feed(name: str, shape: tuple[int, ...]) -> Array:
        if name in settings:
            return np.full(shape, settings[name])
        if name.endswith("ranks"):
            return np.arange(shape[0])
        if name.endswith("noise"):
            return rng.standard_exponential(shape)
        if spec_of[name].dtype == "int64":  # indices of logits, or one past the last
            noise = spec_of["code_noise" if name == "penalised_codes" else "main_noise"].resolve({"batch": batch})
            return rng.integers(0, noise[-1] + 1, shape)
        return rng.standard_normal(shape)

    ranked = {f"{draw}_ranked": min(30, int(spec_of[f"{draw}_noise"].shape[-1])) for draw in ("main", "code")}
    sizes = {"batch": batch, **ranked}
    return {name: feed(name, t.resolve(sizes)).astype(t.dtype) for name, t in spec_of.items()}


# --- what it is made of --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", FORMS)
def test_no_family_breaks_a_rule(golden_model: GoldenModel, options: LoweringOptions) -> None:
    """The element types of all values are known: without them, the rules would find nothing."""
    specs = {job.role: job.spec for job in (*golden_model.lm.jobs("audio"), *golden_model.codec.jobs())}
    roles = (*LM, *CODECS) if options.precision == "fp32" else LM
    graphs = [*((golden_model.file(role), specs[role]) for role in roles), frame(golden_model)]
    for path, spec in graphs:
        assert_fits(*lowered(path, spec, options))


@pytest.mark.parametrize("options", FORMS)
def test_integer_weights_break_no_rule(exported: Exported, options: LoweringOptions) -> None:
    for role in LM:
        assert_fits(*lowered(exported.file(role), exported.jobs[role].spec, options))


def assert_fits(model: ir.Model, spec: GraphSpec) -> None:
    found = check_for_tensorrt(model, spec)
    assert errors(found) == []
    assert [f for f in found if f.rule not in ("cache", "quantised") and f.operator != "Attention"] == []
    made = [value for node in model.graph for value in node.outputs if value.name]
    assert [value.name for value in made if value.dtype is None or value.shape is None] == []


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
@pytest.mark.parametrize("fp32", [False, True], ids=["", "fp32 attention"])
@pytest.mark.parametrize("primitive", [False, True], ids=["attention", "primitive"])
def test_what_computes_in_which_type(exported: Exported, precision: str, fp32: bool, primitive: bool) -> None:
    """Matrix products and caches are in the new type, attention follows the option, results keep their type."""
    options = LoweringOptions(ROWS, {"float16": "fp16", "bfloat16": "bf16"}[precision], fp32, primitive)
    for role in LM:
        spec = exported.jobs[role].spec
        model, described = lowered(exported.file(role), spec, options)
        infer(model)
        types = {
            op: {str(n.inputs[0].dtype.numpy()) for n in model.graph if n.op_type == op}
            for op in ("MatMul", "TensorScatter", "Softmax")
        }
        attention = {str(value.dtype.numpy()) for n in model.graph if n.op_type == "Attention" for value in n.inputs[:3]}
        wanted = {"float32" if fp32 else precision}
        assert types["TensorScatter"] == {precision}
        assert types["MatMul"] == ({precision} | wanted if primitive else {precision})
        assert (types["Softmax"], attention) == ((wanted, set()) if primitive else (set(), wanted))
        assert {t.dtype for t in described.state_tensors} == {precision}
        assert described.feeds == spec.feeds
        assert described.results == spec.results
        results = {t.name for t in spec.results}
        assert {value.dtype for value in model.graph.outputs if value.name in results} == {ir.DataType.FLOAT}


def test_caches_have_a_fixed_length(exported: Exported) -> None:
    """The length is fixed in the graph and in its description."""
    model, spec = lowered(exported.file("slow_ar"), exported.jobs["slow_ar"].spec, PLAIN_FORM)
    config = exported.source.config.slow
    outer = {value.name: value.shape for value in (*model.graph.inputs, *model.graph.outputs)}
    for pair in spec.states:
        for name in (pair.input, pair.output):
            assert outer[name] == ["batch", config.kv_heads, ROWS, config.head_dim]
    assert all(t.shape == ("batch", config.kv_heads, ROWS, config.head_dim) for t in spec.state_tensors)
    assert Counter(node.op_type for node in model.graph)["Range"] == 0
    kept = [numbers(value) for value in model.graph.initializers.values() if value.dtype == ir.DataType.INT64]
    assert list(range(ROWS)) in [found.ravel().tolist() for found in kept]


def test_weights_stay_where_they_are(s2_model: GoldenModel) -> None:
    """Unknown fields, such as the version and the producer, are kept, too."""
    path = s2_model.file("slow_ar")
    portable = load(path)
    spec = next(job.spec for job in s2_model.lm.jobs("audio") if job.role == "slow_ar")
    model, _ = lowered(path, spec, LoweringOptions(ROWS, "fp16", fp32_attention=True, primitive_attention=True))
    assert (model.ir_version, model.producer_name) == (portable.ir_version, portable.producer_name)
    places = [
        {name: (t.location, t.offset, t.length) for name, v in of.graph.initializers.items() if is_external(t := v.const_value)}
        for of in (portable, model)
    ]
    assert places[0] == places[1] != {}


def is_external(tensor: object) -> TypeGuard[ir.ExternalTensor]:
    return isinstance(tensor, ir.ExternalTensor)


def test_a_cache_of_unknown_length_is_refused(exported: Exported) -> None:
    for length in (None, 0):
        options = LoweringOptions(length, "fp32", fp32_attention=False, primitive_attention=False)
        with pytest.raises(ExportError, match=r"slow_ar\.onnx leaves the length of its caches open") as caught:
            lowered(exported.file("slow_ar"), exported.jobs["slow_ar"].spec, options)
        assert "max_len" in str(caught.value.hint)


def test_an_unknown_precision_is_refused(exported: Exported) -> None:
    with pytest.raises(ExportError, match="'int2'"):
        lowered(exported.file("fast_ar"), exported.jobs["fast_ar"].spec, LoweringOptions(None, "int2", False, False))
