"""Graphs for CoreML: equal to the portable ones, accepted by ONNX Runtime's checker, and run as by provider coreml.

FakeCoreMl simulates ONNX Runtime's provider: it takes the same arguments, and runs graphs on the CPU.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from click.testing import CliRunner

pytest.importorskip("torch", reason="needs the export extra")

import onnx_ir as ir

from fishrt import TTS
from fishrt.bundle.folder import Bundle
from fishrt.bundle.manifest import MANIFEST, FixedPart
from fishrt.cli import main
from fishrt.errors import BundleError
from fishrt_engines import Array, Engine, ProviderError, open_engine
from fishrt_engines.engine import GraphSpec, TensorSpec
from fishrt_engines.ort.coreml import CACHE_KEY, Part, StaticEngine
from fishrt_export import Options, export_bundle
from fishrt_export.errors import ExportError
from fishrt_export.graph.job import GraphJob, Made
from fishrt_export.targets import coreml
from fishrt_export.targets.coreml import LENGTHS, split_front, static_form, step_usability, to_primitives, usability
from helpers_text import listed
from tiny import GoldenModel
from tolerances import TOLERANCES
from vectors import find_golden

COREML = "CoreMLExecutionProvider"


class FakeCoreMl:
    """A simulation of ONNX Runtime on a Mac: sessions record their providers, and run on the CPU."""

    def __init__(self, *, starts: bool = True) -> None:
        self.asked: dict[str, Any] = {}
        self._starts = starts

    def __getattr__(self, name: str) -> Any:
        return getattr(onnxruntime, name)

    def get_available_providers(self) -> list[str]:
        return [COREML, "CPUExecutionProvider"]

    def InferenceSession(self, path: Any, options: Any, *, providers: list[Any]) -> Any:  # noqa: N802
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        if providers == ["CPUExecutionProvider"]:
            return session
        self.asked[Path(path).name] = providers
        return FakeSession(session, providers if self._starts else providers[1:])


class FakeSession:
    def __init__(self, session: Any, providers: list[Any]) -> None:
        self._session, self._providers = session, providers

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def get_providers(self) -> list[str]:
        return [p if isinstance(p, str) else p[0] for p in self._providers]


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeCoreMl:
    return pretend(monkeypatch, tmp_path, FakeCoreMl())


def pretend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fake: FakeCoreMl) -> FakeCoreMl:
    monkeypatch.setattr("fishrt_engines.providers._usable", set())
    monkeypatch.setattr("fishrt_engines.providers.sys.platform", "darwin")
    monkeypatch.setitem(sys.modules, "onnxruntime", fake)
    monkeypatch.setenv("FISHRT_CACHE", str(tmp_path / "cache"))
    return fake


@pytest.fixture(scope="module")
def static_bundle(tiny_bundle: Bundle, s2_model: GoldenModel, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """S2's bundle with static graphs. Do not write to it."""
    return with_static(s2_model, tmp_path_factory.mktemp("static") / "bundle")


def parts_of(bundle: Bundle) -> tuple[FixedPart, ...]:
    (form,) = bundle.manifest.graphs["codec_decode"].forms
    return form.parts


def static_engine(bundle: Bundle) -> StaticEngine:
    """Return codec_decode in fixed lengths on the CPU."""
    specs = {part.frames: (part.front, part.back) for part in parts_of(bundle)}

    def open_part(frames: int) -> Part:
        front, back = (open_engine(bundle.file(spec.file), spec, provider="cpu") for spec in specs[frames])
        return Part(front, back)

    return StaticEngine(bundle.manifest.specs["codec_decode"], "frames", specs, open_part)


def feeds_of(spec: GraphSpec, frames: int, start: int, seed: int) -> dict[str, Array]:
    """Return random codes below 1024, with one of −1 and one past the end of its codebook."""
    books = spec.feeds[0].shape[1]
    assert isinstance(books, int)
    codes = np.random.default_rng(seed).integers(0, 16, (1, books, frames))
    codes[0, -1, 0], codes[0, 0, -1] = -1, 1 << 20
    positions = np.arange(start, start + frames)[None]
    return {t.name: codes if t.name == "codes" else positions for t in spec.feeds}


def assert_near(actual: Array, expected: Array) -> None:
    assert actual.shape == expected.shape
    assert float(np.abs(actual - expected).max()) <= TOLERANCES["static"]


def assert_decodes_alike(static: StaticEngine, portable: Engine, cuts: list[int]) -> None:
    states = static.new_state(batch=1), portable.new_state(batch=1)
    start = 0
    for n, frames in enumerate(cuts):
        feeds = feeds_of(portable.spec, frames, start, n)
        actual, expected = static.run(feeds, states[0]), portable.run(feeds, states[1])
        assert float(np.abs(expected["audio"]).max()) > 1e-3
        assert_near(actual["audio"], expected["audio"])
        start += frames
    for tensor in portable.spec.state_tensors:
        assert_near(states[0].read(tensor.name), states[1].read(tensor.name))


@pytest.mark.parametrize("cuts", [[16, 16, 4], [1, 1, 4, 11, 23], [37]], ids=str)
def test_calls_of_any_length_give_what_the_portable_graph_gives(static_bundle: Bundle, cuts: list[int]) -> None:
    spec = static_bundle.manifest.specs["codec_decode"]
    portable = open_engine(static_bundle.file(spec.file), spec, provider="cpu")
    assert_decodes_alike(static_engine(static_bundle), portable, cuts)


@pytest.mark.slow
def test_so_do_those_of_a_firefly(models: Any, tmp_path: Path) -> None:
    model: GoldenModel = models(find_golden(None, "fish-1.5"))
    bundle = with_static(model, tmp_path / "bundle")
    assert_decodes_alike(static_engine(bundle), model.engine("codec_decode"), [4, 21, 1])


def with_static(model: GoldenModel, folder: Path) -> Bundle:
    """Return a copy of the bundle with static graphs."""
    shutil.copytree(model.bundle.path, folder)
    job = next(job for job in model.codec.jobs() if job.role == "codec_decode")
    manifest = model.bundle.manifest
    decode = manifest.graphs["codec_decode"]
    form = static_form(folder, decode.spec, job.cases[-1], job.tolerance, manifest.codec.fingerprint)
    graphs = {
        role: replace(graph, coreml_step=step_usability(folder, graph.spec)) if role.endswith("ar") else graph
        for role, graph in manifest.graphs.items()
    }
    return listed(folder, Bundle(folder, replace(manifest, graphs={**graphs, "codec_decode": replace(decode, forms=(form,))})))


def test_the_checker_sees_one_partition_of_all_nodes(static_bundle: Bundle) -> None:
    graphs, parts = static_bundle.manifest.graphs, parts_of(static_bundle)
    assert [part.frames for part in parts] == list(LENGTHS)
    steps = {role: graph.coreml_step for role, graph in graphs.items() if graph.coreml_step}
    assert steps.keys() == {"slow_ar", "fast_ar"}
    for report in (*(part.usability for part in parts), *steps.values()):
        assert (report.partitions, report.verdict, report.outside) == (1, "YES", ())
        assert report.covered == report.nodes > 50


def test_static_graphs_are_small_and_have_a_name_for_the_cache(static_bundle: Bundle) -> None:
    """They share the weights of the portable graph."""
    files = static_bundle.manifest.files
    assert not [name for name in files if name.startswith("codec_decode_") and name.endswith(".data")]
    keys = set()
    for frames in LENGTHS:
        model = ir.load(static_bundle.file(f"codec_decode_{frames}.onnx"))
        used = {value.const_value.location for value in model.graph.initializers.values() if is_external(value)}
        assert used == {"codec_decode.onnx.data"}
        key = model.metadata_props[CACHE_KEY]
        assert key.isalnum()
        assert len(key) <= 64
        keys.add(key)
    assert len(keys) == len(LENGTHS)


def is_external(value: ir.Value) -> bool:
    return isinstance(value.const_value, ir.ExternalTensor)


def test_the_checker_counts_what_coreml_lacks(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reports the operators of a graph with one replacement left out."""
    monkeypatch.delitem(coreml._REPLACEMENTS, "RMSNormalization")
    model = ir.load(tiny_bundle.file("codec_decode.onnx"))
    to_primitives(model, {"batch": 1, "frames": 4})
    report = usability(split_front(model)[1])
    assert report.outside == ("ai.onnx:RMSNormalization",)
    assert report.covered < report.nodes
    assert report.partitions > 1
    assert report.verdict != "YES"


def test_speaking_decodes_on_coreml_and_the_rest_runs_on_the_cpu(
    static_bundle: Bundle, mac: FakeCoreMl, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    with caplog.at_level(logging.INFO, "fishrt"):
        tts = TTS.load(static_bundle, provider="coreml")
    assert "codec_decode on CoreML, all other graphs on the CPU" in caplog.text
    assert {role: tts.engines[role].provider for role in tts.engines} == {
        "slow_ar": "cpu",
        "fast_ar": "cpu",
        "codec_encode": "cpu",
        "codec_decode": "coreml",
    }
    codes = np.random.default_rng(5).integers(0, 16, (len(static_bundle.manifest.codec.codebook_sizes), 21))
    assert_near(tts.decode(codes), TTS.load(static_bundle, provider="cpu").decode(codes))
    assert sorted(mac.asked) == ["codec_decode_1.onnx", "codec_decode_16.onnx", "codec_decode_4.onnx"]
    for providers in mac.asked.values():
        assert providers[1:] == ["CPUExecutionProvider"]
        assert providers[0] == (
            COREML,
            {
                "ModelFormat": "MLProgram",
                "MLComputeUnits": "ALL",
                "RequireStaticInputShapes": "1",
                "EnableOnSubgraphs": "0",
                "AllowLowPrecisionAccumulationOnGPU": "0",
                "ModelCacheDirectory": str(tmp_path / "cache/coreml"),
            },
        )
    assert (tmp_path / "cache/coreml").is_dir()


def test_graphs_are_opened_when_their_length_comes(static_bundle: Bundle, mac: FakeCoreMl) -> None:
    tts = TTS.load(static_bundle, provider="coreml")
    tts.decode(np.zeros((1, 4), np.int64))
    assert sorted(mac.asked) == ["codec_decode_1.onnx", "codec_decode_4.onnx"]


def test_a_folder_that_cannot_be_written_to_is_told(
    static_bundle: Bundle, mac: FakeCoreMl, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FISHRT_CACHE", str(tmp_path / "file/cache"))
    TTS.load(static_bundle, provider="coreml").decode(np.zeros((1, 1), np.int64))
    assert "compiled CoreML models cannot be written" in caplog.text
    assert "ModelCacheDirectory" not in mac.asked["codec_decode_1.onnx"][0][1]


def test_a_bundle_without_static_graphs_is_refused(tiny_bundle: Bundle, mac: FakeCoreMl) -> None:
    with pytest.raises(ProviderError, match="no static graphs") as caught:
        TTS.load(tiny_bundle, provider="coreml")
    assert "fishrt retarget BUNDLE --target coreml" in (caught.value.hint or "")


def test_an_open_graph_is_refused(tiny_bundle: Bundle, mac: FakeCoreMl) -> None:
    spec = tiny_bundle.manifest.specs["codec_decode"]
    with pytest.raises(ProviderError, match="has the open dimensions batch, frames, samples"):
        open_engine(tiny_bundle.file(spec.file), spec, provider="coreml")


def test_coreml_that_does_not_start_is_no_cpu(static_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretend(monkeypatch, tmp_path, FakeCoreMl(starts=False))
    with pytest.raises(ProviderError, match="did not start its CoreML provider"):
        TTS.load(static_bundle, provider="coreml").decode(np.zeros((1, 1), np.int64))


def test_bad_calls_are_refused(static_bundle: Bundle) -> None:
    engine, other = static_engine(static_bundle), static_engine(static_bundle)
    state, feeds = engine.new_state(batch=1), feeds_of(engine.spec, 2, 0, 0)
    with pytest.raises(ValueError, match="needs a state that its own"):
        engine.run(feeds, other.new_state(batch=1))
    with pytest.raises(ValueError, match="batch = 1"):
        engine.new_state(batch=2)
    with pytest.raises(ValueError, match="needs codes, position_ids"):
        engine.run({"codes": feeds["codes"]}, state)
    with pytest.raises(ValueError, match="position_ids has shape"):
        engine.run({**feeds, "position_ids": feeds["position_ids"][:, :1]}, state)
    with pytest.raises(ValueError, match="cannot grow"):
        state.grow(batch=2)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda form: form["parts"][0]["back"].update(file="other.onnx", identity=""),
            "names files that it does not list",
        ),
        (lambda form: form["parts"][0].update(more=1), "unknown keys: more"),
        (lambda form: form["parts"][0].pop("usability"), "lacks the keys: usability"),
    ],
)
def test_a_damaged_description_is_refused(static_bundle: Bundle, tmp_path: Path, change: Any, says: str) -> None:
    folder = Path(shutil.copytree(static_bundle.path, tmp_path / "b"))
    data = json.loads((folder / MANIFEST).read_text())
    change(data["graphs"]["codec_decode"]["forms"][0])
    (folder / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(BundleError, match=says):
        Bundle.load(folder)


def test_export_adds_them(tiny_checkpoint: Path, tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Static graphs are added to traced ones."""

    def made_before(jobs: list[GraphJob], folder: Path, _make: object, _progress: object) -> dict[str, Made]:
        for job in jobs:
            for name in (job.spec.file, f"{job.spec.file}.data"):
                shutil.copy(tiny_bundle.file(name), folder / name)
        graphs = tiny_bundle.manifest.graphs
        return {job.role: Made(graphs[job.role].parity, graphs[job.role].memory, {}) for job in jobs}

    monkeypatch.setattr("fishrt_export.export._run", made_before)
    bundle = export_bundle(tiny_checkpoint, tmp_path / "bundle", Options(targets=["coreml"]))
    assert max(part.parity.max_abs_error for part in parts_of(bundle)) <= TOLERANCES["static"]
    bundle.verify()
    shown = CliRunner().invoke(main, ["inspect", str(bundle.path)])
    assert "coreml        codec_decode, 1 frame: " in shown.stdout
    assert "    compared with the portable graph, on cpu: largest error " in shown.stdout


def test_a_static_graph_that_is_not_the_portable_one_is_refused(
    s2_model: GoldenModel, tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(coreml._REPLACEMENTS, "RMSNormalization", lambda tape, node: tape.op("Identity", node.inputs[:1]))
    with pytest.raises(ExportError, match=r"codec_decode_1\.onnx is not the torch module"):
        with_static(s2_model, tmp_path / "bundle")


def test_a_centred_codec_is_refused_at_once(models: Any, tmp_path: Path) -> None:
    model: GoldenModel = models(find_golden(None, "fish-1.2"))
    with pytest.raises(ExportError, match="centred"):
        export_bundle(model.checkpoint, tmp_path / "out", Options(targets=["coreml"]))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["s2-pro", "fish-1.5"])
def test_steps_of_the_language_model_in_primitives_are_the_portable_ones(models: Any, tmp_path: Path, family: str) -> None:
    """The families cover both kinds of attention heads, and norms of queries and keys."""
    model: GoldenModel = models(find_golden(None, family))
    for role, dims in (("slow_ar", {"batch": 1, "cache": 12}), ("fast_ar", {"batch": 1})):
        portable = model.engine(role)
        lowered = Lowered(model.file(role), {**dims, "length": 1}, tmp_path)
        state = portable.new_state(**dims)
        carried = {t.name: np.zeros(t.resolve(dims), t.dtype) for t in portable.spec.state_tensors}
        rng = np.random.default_rng(6)
        for step in range(3):
            feeds = {t.name: fed(t, step, rng) for t in portable.spec.feeds}
            expected, actual = portable.run(feeds, state), lowered.run({**feeds, **carried})
            carried = {pair.input: actual[pair.output] for pair in portable.spec.states}
            for t in portable.spec.results:
                assert float(np.abs(actual[t.name] - expected[t.name]).max()) <= TOLERANCES["static step"]
        for name, value in carried.items():
            assert float(np.abs(value - state.read(name)).max()) <= TOLERANCES["static step"]


class Lowered:
    """Both parts of a graph in primitive operators, on the CPU."""

    def __init__(self, file: Path, sizes: Mapping[str, int], folder: Path) -> None:
        model = ir.load(file)
        to_primitives(model, sizes)
        self._sessions = []
        for name, part in zip(("front", "back"), split_front(model), strict=True):
            path = file.parent / f"{file.stem}.{folder.name}.{name}.onnx"
            ir.save(part, path)
            self._sessions.append(onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]))
            path.unlink()

    def run(self, values: dict[str, Array]) -> dict[str, Array]:
        for session in self._sessions:
            names = [output.name for output in session.get_outputs()]
            given = {i.name: values[i.name] for i in session.get_inputs()}
            values = values | dict(zip(names, session.run(names, given), strict=True))
        return values


def fed(tensor: TensorSpec, step: int, rng: np.random.Generator) -> Array:
    """Return the feed of a step."""
    shape = tensor.resolve({"batch": 1, "length": 1})
    if tensor.name in ("position_ids", "write_index"):
        return np.full(shape, step)
    if tensor.name == "last_index":
        return np.zeros(shape, np.int64)
    return rng.standard_normal(shape).astype(np.float32) if tensor.dtype == "float32" else rng.integers(0, 8, shape)


def test_what_has_no_replacement_is_named(tiny_bundle: Bundle) -> None:
    model = ir.load(tiny_bundle.file("slow_ar.onnx"))
    with pytest.raises(ExportError, match="one column can be written at a time"):
        to_primitives(model, {"batch": 1, "length": 2, "cache": 8})
