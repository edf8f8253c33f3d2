"""A model's graphs on a CUDA device: tests with a simulation, and tests that need a device."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto

from fake_cuda import FakeCuda
from fishrt.bundle.manifest import Form
from fishrt.language_model import drawing
from fishrt.language_model.batch import Batch, DualAR
from fishrt.language_model.context import ContextStore, SlowContext
from fishrt.language_model.generate import generate
from fishrt.language_model.sampling import Sampling, SeededNoise
from fishrt_engines import Engine, open_engine
from fishrt_engines.engine import ColumnInputs
from fishrt_engines.ort import engine as ort
from fishrt_engines.ort.engine import OrtEngine
from fishrt_engines.ort.tensors import DeviceTensor
from helpers_lm import frames_of, row_of, spoken
from tiny import GoldenModel, chunk_feeds, prefill_feeds
from tolerances import TOLERANCES, assert_near

pytest.importorskip("torch", reason="needs the export extra")

from fishrt_export.graph.recipe import Recipe
from fishrt_export.graph.report import Case
from fishrt_export.sources.cases import random_prompt
from fishrt_export.targets.forms import device_form, make_forms
from wide import EVERYTHING_WIDE, Exported, called


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda(monkeypatch)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return Exported(tmp_path_factory.mktemp("wide"), EVERYTHING_WIDE)


def on_cpu(exported: Exported, role: str = "slow_ar") -> Engine:
    return open_engine(exported.file(role), exported.jobs[role].spec, provider="cpu")


def on_device(exported: Exported, role: str = "slow_ar", dtype: str = "float16") -> OrtEngine:
    """Return the graph's form for a device. In float32, only the way in which graphs are run can change results."""
    spec = device_form(exported.folder, exported.spec(role), dtype)
    assert spec is not None
    engine = open_engine(exported.folder / spec.file, spec, provider="cuda")
    assert isinstance(engine, OrtEngine)
    return engine


def calls(exported: Exported, role: str) -> list[Case]:
    """Return the export's verification calls, except one that writes columns at other rows than their positions."""
    return exported.jobs[role].cases[:2]


def prompts(exported: Exported, *lengths: int) -> list[Any]:
    rng = np.random.default_rng(5)
    return [random_prompt(exported.source.config, exported.source.ids, (1, length), rng)[0] for length in lengths]


def test_a_language_model_gives_the_same(cuda: FakeCuda, exported: Exported) -> None:
    """Prompts of several lengths at once, columns one by one, rows that go on with several, a cache that grows."""
    engines = on_cpu(exported), on_device(exported, dtype="float32")
    first, more = prompts(exported, 7, 3), np.stack(prompts(exported, 4, 4))
    states = [engine.new_state(batch=2, cache=12) for engine in engines]
    at = np.array([7, 3])
    for given in (prefill_feeds(first), chunk_feeds(more[:, :, :1], at), chunk_feeds(more, at + 1)):
        assert_near(*(called(e, given, s) for e, s in zip(reversed(engines), reversed(states), strict=True)))
    for state in states:
        state.grow(cache=20)
    for n in range(3):
        given = chunk_feeds(more[:, :, n : n + 1], at + 5 + n)
        assert_near(*(called(e, given, s) for e, s in zip(reversed(engines), reversed(states), strict=True)))
    name = engines[0].spec.state_tensors[0].name
    for row, end in enumerate(at + 8):
        kept = [state.read(name)[row, :, :end] for state in states]
        np.testing.assert_allclose(kept[1], kept[0], rtol=0, atol=TOLERANCES["lm"])


def test_calls_of_one_column_are_captured(cuda: FakeCuda, exported: Exported) -> None:
    """Each under an id of its own, until the cache moves; prompts are not."""
    engine = on_device(exported, dtype="float32")
    (session,) = cuda.graphs
    more = prompts(exported, 9)[0][None]

    def step(n: int) -> np.ndarray:
        return engine.run(chunk_feeds(more[:, :, n : n + 1], np.array([n])), state)["logits"]

    state = engine.new_state(batch=1, cache=8)
    engine.run(prefill_feeds(prompts(exported, 3)), state)
    step(3)
    step(4)
    state.grow(cache=16)
    step(5)
    step(6)
    assert session.runs == [-1, 1, 1, 2, 2]
    # A new state of an earlier size reuses its captured graphs, and begins with zeros.
    del state
    assert session.released == []
    state = engine.new_state(batch=1, cache=16)
    assert not any(state.read(t.name).any() for t in engine.spec.state_tensors)
    first = step(0)
    small, state = state, engine.new_state(batch=1, cache=8)
    np.testing.assert_array_equal(step(0), first)
    assert session.runs[5:] == [2, 1]
    # Two states of one size at a time have separate captures.
    other, state = state, engine.new_state(batch=1, cache=8)
    step(0)
    assert session.runs[7:] == [3]
    del small, other


def test_a_known_voice_stays_on_the_device(cuda: FakeCuda, exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is copied there from a longer state to a shorter one and back to any slot, and gives the same bits as reading it."""
    engine, store = on_device(exported, dtype="float32"), ContextStore()
    head, rest = prompts(exported, 9, 4)
    lengths, read = [], engine.run
    monkeypatch.setattr(engine, "run", lambda feeds, *more: lengths.append(feeds["prompt"].shape[2]) or read(feeds, *more))
    monkeypatch.setattr(DeviceTensor, "numpy", no_cache_on_the_host(DeviceTensor.numpy))
    found = []
    for slots, slot in ((1, 0), (1, 0), (3, 2)):
        made = SlowContext(engine, len(head) - 1, slots)
        store.load(made, head, slot)
        found.append(made.read(rest, slot=slot)["logits"])
    assert lengths == [9, 4, 4, 4]
    ((saved, nbytes),) = store._kept.values()
    assert (saved.dims, made.state.dims["cache"] > 9) == ({"batch": 1, "cache": 9}, True)
    assert nbytes == sum(saved.tensor(t.name).place.nbytes for t in engine.spec.state_tensors)
    for logits in found[1:]:
        np.testing.assert_array_equal(logits, found[0])


def no_cache_on_the_host(read: Callable[[DeviceTensor], np.ndarray]) -> Callable[[DeviceTensor], np.ndarray]:
    def checked(tensor: DeviceTensor) -> np.ndarray:
        assert len(tensor.shape) < 4, "a cache went through the host"
        return read(tensor)

    return checked


def test_few_states_wait_for_others(cuda: FakeCuda, exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "_IDLE_KEPT", 1)
    engine = on_device(exported)
    feeds = chunk_feeds(prompts(exported, 1)[0][None], np.array([0]))
    for rows in (4, 5, 5, 4):
        engine.run(feeds, engine.new_state(batch=1, cache=rows))
    assert cuda.graphs[0].runs == [1, 2, 2, 3]
    engine.new_state(batch=1, cache=6)  # in which nothing ran
    engine.run(feeds, engine.new_state(batch=1, cache=4))
    assert cuda.graphs[0].runs[4:] == [3]


def test_a_captured_call_is_told_of_all_rows_and_a_prompt_of_its_own(cuda: FakeCuda, exported: Exported) -> None:
    """A value read on the CPU cannot change in a captured graph, but a batch of prompts needs its true length."""
    engine = on_device(exported, dtype="float32")
    assert engine._columns == ColumnInputs("write_index", "position_ids", "specialised.rows", "key_cache.0")
    state = engine.new_state(batch=2, cache=10)
    engine.run(prefill_feeds(prompts(exported, 6, 4)), state)
    engine.run(chunk_feeds(np.stack(prompts(exported, 1, 1)), np.array([6, 4])), state)
    prompt, step = state.carried.plans.values()
    assert (prompt.rows, step.rows) == (6, 10)
    assert all(plan.binding.on_cpu == {"specialised.rows"} for plan in (prompt, step))


def test_a_device_without_bfloat16_computes_in_float16(cuda: FakeCuda, exported: Exported) -> None:
    """Feeds and results stay as they are described, and so does the state, seen from outside."""
    for role in ("slow_ar", "fast_ar"):
        engine = on_device(exported, role)
        model = onnx.ModelProto.FromString(cuda.graphs[-1].model)
        caches = {t.name for t in engine.spec.state_tensors}
        assert {i.type.tensor_type.elem_type for i in model.graph.input if i.name in caches} == {TensorProto.FLOAT16}
        assert "GroupQueryAttention" in {node.op_type for node in model.graph.node}
        assert_nearly_the_same(engine, on_cpu(exported, role), calls(exported, role), TOLERANCES["float16"])
        state = engine.new_state(**exported.jobs[role].cases[0].dims)
        assert {state.read(name).dtype for name in caches} == {np.dtype("float32")}


def assert_nearly_the_same(engine: Engine, portable: Engine, cases: Iterable[Case], share: float) -> None:
    """Check that every result is near, within a share of its largest value."""
    for case in cases:
        states = [e.new_state(**case.dims) if e.spec.states else None for e in (portable, engine)]
        for given in case.calls:
            expected, found = (e.run(given, s) for e, s in zip((portable, engine), states, strict=True))
            for name, value in expected.items():
                assert found[name].dtype == value.dtype
                assert np.abs(found[name] - value).max() <= share * np.abs(value).max(), name


@pytest.mark.parametrize("role", ["slow_ar", "fast_ar", "frame"])
def test_a_graph_in_bfloat16_is_one_that_onnxruntime_accepts(exported: Exported, role: str) -> None:
    """Types agree in it throughout: only kernels are lacking, which no CPU has."""
    spec = device_form(exported.folder, exported.spec(role), "bfloat16")
    assert spec is not None
    assert (spec.columns is None) == (role == "frame")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(exported.folder))
    with pytest.raises(Exception, match="NOT_IMPLEMENTED"):
        onnxruntime.InferenceSession(exported.folder / spec.file, options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("role", ["codec_decode", "codec_encode"])
def test_a_codec_stays_in_float32_and_is_not_captured(cuda: FakeCuda, s2_model: GoldenModel, role: str) -> None:
    job = s2_model._job(role, "audio")
    engine = open_engine(s2_model.file(role), job.spec, provider="cuda")
    assert_nearly_the_same(engine, s2_model.engine(role), job.cases[:1], TOLERANCES["lm"])
    assert set(cuda.graphs[0].runs) <= {None}


def test_attention_without_a_fast_operator_has_no_form(
    exported: Exported, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("fishrt_export.targets.forms.fast_operators", lambda model, *, cuda=False: None)
    assert make_forms(exported.folder, "slow_ar", exported.spec("slow_ar"), ["cuda"]) == []
    assert caplog.text.count("its attention has no fast operator") == 1


def test_a_frame_in_float16_is_drawn(cuda: FakeCuda, exported: Exported) -> None:
    """Any code may be drawn, since numbers differ from those in float32."""
    lm = exported.source.describe("audio")
    frame = on_device(exported, "frame")
    (prompt,) = prompts(exported, 9)
    assert frames_of(DualAR(on_device(exported), frame, lm), prompt, Sampling(1.0, 0.9), SeededNoise(28), 5)
    casts = [node for node in onnx.ModelProto.FromString(cuda.graphs[0].model).graph.node if node.op_type == "Cast"]
    assert TensorProto.FLOAT16 in {node.attribute[0].i for node in casts}


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_frame_of_quantised_weights_expands_none_of_them(
    cuda: FakeCuda, exported: Exported, tmp_path: Path, precision: str
) -> None:
    """All positions of the fast AR read the same weights, and ONNX Runtime's device cannot expand blocks of int8."""
    job = exported.jobs["fast_ar"]
    plan = Recipe(precision).plan({"fast_ar": job.build()}, {"fast_ar": job.weights})["fast_ar"]
    replace(job, plan=plan).run(tmp_path)
    frame = exported.source.frame_job(exported.source.describe("audio"), plan)
    frame.run(tmp_path)
    spec = frame.spec
    (form,) = make_forms(tmp_path, "fast_ar", job.spec, ["cuda"], Form("tensorrt", spec))
    engines = [open_engine(tmp_path / s.file, s, provider=provider) for s, provider in ((form.spec, "cuda"), (spec, "cpu"))]
    operators = {node.op_type for node in onnx.ModelProto.FromString(cuda.graphs[0].model).graph.node}
    assert "MatMulNBits" in operators
    assert "DequantizeLinear" not in operators
    feeds = {t.name: np.ones(t.resolve({"batch": 1, "main_ranked": 1, "code_ranked": 1}), t.dtype) for t in spec.inputs}
    feeds |= {name: np.arange(3) for name in ("main_ranks", "code_ranks")}
    made = [engine.run(feeds)["column"] for engine in engines]
    assert np.array_equal(*made)


def test_a_frame_brings_to_the_device_what_is_new(cuda: FakeCuda, exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    """A frame copies a column, its position, noise and windows. Settings are copied once; the slow AR's results stay."""
    lm = exported.source.describe("audio")
    frame = on_device(exported, "frame")
    spec = frame.spec
    (prompt,) = prompts(exported, 9)
    model = DualAR(on_device(exported), frame, lm)
    frames = generate(Batch(model), row_of(model, prompt, Sampling(1.0, 0.9), SeededNoise(28), 8))
    copied: list[object] = []
    put = DeviceTensor.put
    monkeypatch.setattr(DeviceTensor, "put", lambda tensor, value: (copied.append(value), put(tensor, value)))
    counts = []
    for _ in frames:
        counts.append(sum(isinstance(value, np.ndarray) for value in copied))
        copied.clear()
    new = {"prompt", "position_ids", "write_index"}
    new |= {t.name for t in spec.inputs if t.name.endswith("noise") or t.name.startswith(("recent", "penalised"))}
    assert len(counts) > 4
    assert set(counts[3:]) == {len(new)}


def test_a_frame_is_two_captured_calls(cuda: FakeCuda, exported: Exported) -> None:
    """The slow AR's results go to the frame graph where they are, and the codes are those of the loop on the CPU."""
    lm = exported.source.describe("audio")
    slow, frame = on_device(exported, dtype="float32"), on_device(exported, "frame", "float32")
    (prompt,) = prompts(exported, 9)
    made = []
    for model in (DualAR(on_cpu(exported), on_cpu(exported, "fast_ar"), lm), DualAR(slow, frame, lm)):
        row = row_of(model, prompt, Sampling(1.0, 0.9), SeededNoise(28), 20)
        made.append((np.stack(spoken(model, row), axis=1), row.drawn.shape[1]))
    assert np.array_equal(made[0][0], made[1][0])
    (_, drawn) = made[1]
    assert drawn > 5, "nothing is shown by less"
    of_slow, of_frame = cuda.graphs
    assert of_slow.runs == [1, -1] + [1] * (drawn - 1)
    assert of_frame.runs == [1, 1] + [1] * drawn


def test_calls_are_captured_before_the_first_row(
    cuda: FakeCuda, exported: Exported, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One for each size of batch, once for a model, whatever joins and leaves; a capture that fails is tried once more."""
    monkeypatch.setattr(drawing, "FEW_RANKED", 5)
    lm = exported.source.describe("audio")
    model = DualAR(on_device(exported), on_device(exported, "frame"), lm)
    of_slow, of_frame = cuda.graphs
    cuda.fails_capture, cuda.failures = "an allocation of another thread", 1
    batch = Batch(model, 6)
    assert of_slow.runs == [1, 2, 3, 4, 5]  # batches of 1 (twice), 2, 4 and 6
    assert of_frame.runs == [1, 2, 3, 4, 5, 6, 7, 8]  # from few and from many candidates
    assert {array.shape[0] for plan in model.fast._stateless.plans.values() for _, array in plan.feeds[:1]} == {1, 2, 4, 6}  # type: ignore[attr-defined]
    for _ in range(2):
        begun, waiting = [len(session.runs) for session in cuda.graphs], []
        for n, (prompt, top_k) in enumerate(zip(prompts(exported, 9, 7, 5, 8, 6), (None, 5, None, 3, 200), strict=True)):
            waiting.append(row_of(model, prompt, Sampling(1.0, 0.9, top_k), SeededNoise(n), 3 + n))
        while waiting or any(batch._rows):
            if waiting:
                batch.admit(waiting.pop())
            batch.step()
        ran = [set(session.runs[start:]) for session, start in zip(cuda.graphs, begun, strict=True)]
        assert ran[0] <= {-1, 2, 3, 4, 5}
        assert ran[1] <= set(range(1, 9))
        assert len(ran[0]) > 2
        ended = [len(session.runs) for session in cuda.graphs]
        batch = None  # the next one gets its state
        batch = Batch(model, 6)
        assert [len(session.runs) for session in cuda.graphs] == ended
    assert not caplog.records


@pytest.mark.cuda
@pytest.mark.usefixtures("cuda_device")
@pytest.mark.parametrize("role", ["slow_ar", "fast_ar"])
def test_a_device_gives_nearly_the_same(exported: Exported, role: str, caplog: pytest.LogCaptureFixture) -> None:
    """Captured, with several rows of other lengths, and columns one by one."""
    engine = on_device(exported, role)
    assert_nearly_the_same(engine, on_cpu(exported, role), calls(exported, role), TOLERANCES["on a device"])
    assert "node by node" not in caplog.text
    assert "on the CPU" not in caplog.text


@pytest.mark.cuda
@pytest.mark.usefixtures("cuda_device")
def test_a_captured_call_reads_what_it_is_fed(exported: Exported) -> None:
    """A replay with other columns at other rows equals a session without captures."""
    engine = on_device(exported)
    plain = on_device(exported)
    plain._captures = False
    states = [e.new_state(batch=1, cache=16) for e in (engine, plain)]
    columns = prompts(exported, 12)[0][None]
    for n in range(12):
        given = chunk_feeds(columns[:, :, n : n + 1], np.array([n]))
        assert_near(*(called(e, given, s) for e, s in zip((engine, plain), states, strict=True)))


@pytest.mark.cuda
@pytest.mark.usefixtures("cuda_device")
@pytest.mark.parametrize("role", ["codec_decode", "codec_encode"])
def test_a_device_runs_a_codec(golden_model: GoldenModel, role: str, caplog: pytest.LogCaptureFixture) -> None:
    """Codes may differ between nearly equal choices; audio may not."""
    job = golden_model._job(role, "audio")
    engine = open_engine(golden_model.file(role), job.spec, provider="cuda")
    if role == "codec_decode":
        assert_nearly_the_same(engine, golden_model.engine(role), job.cases, TOLERANCES["on a device"])
    for given in (call for case in job.cases for call in case.calls if role == "codec_encode"):
        found, expected = (e.run(given)["codes"] for e in (engine, golden_model.engine(role)))
        assert (found == expected).mean() > 0.9
    assert "on the CPU" not in caplog.text
