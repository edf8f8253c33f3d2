"""benchmarks/gpu.py on a CPU: all parts run, the record is complete, and failures do not end it. No test asserts a time."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

pytest.importorskip("torch", reason="needs the export extra")

import gpu
import gpu_graphs
import gpu_process
from fake_cuda import OLD, FakeCuda
from fishrt.bench.setup import bytes_read
from fishrt.bundle.manifest import Form
from fishrt.language_model.drawing import FrameDrawer
from fishrt.language_model.sampling import SeededNoise
from fishrt.tts import TTS
from fishrt_engines.engine import GraphSpec
from fishrt_engines.providers import find_obstacle

TIMES = {"median_ms", "p95_ms", "count"}
BATCH = {
    "batch",
    "context",
    "cache",
    "frame",
    "slow_step",
    "frame_call",
    "frame_call_most_ranked",
    "noise_ms",
    "frames_per_s",
    "acoustic_tokens_per_s",
    "rtf",
    "memory",
}
TURN = {"frames", "prefill", "memory", "seconds"}


def run_gpu(*arguments: object) -> Any:
    return CliRunner().invoke(gpu.main, [str(a) for a in arguments])


pytestmark = pytest.mark.thorough


@pytest.fixture(scope="module")
def folders(tiny_checkpoint, tiny_bundle, tmp_path_factory) -> tuple[Path, Path]:
    """Checkpoint and bundle in the folders where the program looks for them."""
    checkpoints, bundles = tmp_path_factory.mktemp("checkpoints"), tmp_path_factory.mktemp("bundles")
    (checkpoints / "s2").symlink_to(tiny_checkpoint)
    (bundles / "s2-fp32").symlink_to(tiny_bundle.path)
    return checkpoints, bundles


@pytest.fixture(scope="module")
def smoke(folders, tmp_path_factory) -> dict[str, Any]:
    """The record of `--smoke`, the whole program on a CPU. The bundle exists already, since an export takes most of a minute."""
    out = tmp_path_factory.mktemp("out") / "gpu.json"
    checkpoints, bundles = folders
    options = ("--smoke", "--provider", "cpu", "--family", "s2", "--out", out)
    done = run_gpu(*options, "--checkpoints", checkpoints, "--bundles", bundles)
    assert done.exit_code == 0, done.output
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def bundle_record(smoke) -> dict[str, Any]:
    return smoke["families"]["s2"]["recipes"]["fp32"]


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from leaves(item)
    else:
        yield value


def test_nothing_failed_and_all_is_finite(smoke):
    text = json.dumps(smoke)
    assert '"error"' not in text
    assert '"skipped"' not in text
    assert all(math.isfinite(value) for value in leaves(smoke) if isinstance(value, float))


def test_the_record_is_whole(smoke, bundle_record):
    assert set(smoke) == {"benchmark", "environment", "method", "families", "device", "copies"}
    assert smoke["benchmark"] == "gpu"
    assert smoke["method"]["weights"] == "random and tiny"
    assert smoke["copies"]["copy_gb_s"] > 0
    assert smoke["device"]["name"]
    assert set(bundle_record) == {"export", "graphs", "batches", "speech", "turns", "reached"}
    assert set(bundle_record["speech"]) == {"load_s", "requests", "codec", "memory", "seconds"}
    assert {side: set(own) for side, own in bundle_record["turns"].items()} == {side: {"1"} for side in gpu.SIDES}
    for side, own in bundle_record["turns"].items():
        assert set(own["1"]) == TURN | ({"compiler"} if side == "compiled" else {"contexts", "codec"})
    rows = [bundle_record["batches"][f"batch {n}"] for n in (1, 2)]
    assert all(set(row) == BATCH for row in rows)
    assert all(set(row[name]) == TIMES for row in rows for name in ("frame", "slow_step", "frame_call", "frame_call_most_ranked"))
    assert len(bundle_record["batches"]["slots_s"]) == 2
    assert [row["context"] for row in bundle_record["turns"]["ours"]["1"]["contexts"]][:2] == [128, 256]


def test_no_names_of_folders(smoke, folders):
    assert not any(str(folder) in json.dumps(smoke) for folder in (*folders, Path.home()))


def test_graphs_are_equal_on_a_cpu(bundle_record):
    """In float32 on both sides; torch in bfloat16 is far from both."""
    graphs = bundle_record["graphs"]
    assert graphs["computed_in"] == "float32"
    for role in ("slow_ar", "fast_ar"):
        for name, found in graphs[role]["ours against torch fp32"].items():
            assert found["relative_rms"] < 1e-3, (role, name)  # of weights that the CPU does not quantise
            assert found["max_abs_error"] <= found["max_abs"]
            assert graphs[role]["torch bf16 against torch fp32"][name]["relative_rms"] > found["relative_rms"]
    assert set(graphs["slow_ar"]["ours against torch fp32"]) == {
        "prompt: logits",
        "prompt: hidden",
        "steps: logits",
        "steps: hidden",
        "caches",
    }
    assert graphs["known_voice"]["kept"]
    assert graphs["known_voice"]["logits"]["max_abs_error"] == 0
    for drawing in ("usual", "likeliest", "few ranked", "many ranked"):
        counts = graphs["frame"][drawing]
        assert counts["frames"] == gpu_graphs.FRAMES
        assert counts["main_tokens_differ"] == counts["codes_differ"] == counts["not_compared"] == 0
    assert graphs["codec"]["decode"]["relative_rms"] < 1e-3
    assert graphs["codec"]["encode"]["differ"] <= 0.01 * graphs["codec"]["encode"]["codes"]


def test_figures_agree_with_each_other(bundle_record, tiny_bundle):
    manifest = tiny_bundle.manifest
    weights, batches = bundle_record["batches"]["weights"], bundle_record["batches"]
    assert weights["fast_steps"] == manifest.model.num_codebooks - 1
    assert weights["frame_bytes"] == weights["slow_bytes"] + weights["fast_steps"] * weights["fast_bytes"]
    for n in (1, 2):
        row = batches[f"batch {n}"]
        frame_s = row["frame"]["median_ms"] / 1e3
        assert row["batch"] == n
        assert row["rtf"] == pytest.approx(frame_s * manifest.codec.frame_rate, abs=1e-4)
        assert row["frames_per_s"] == pytest.approx(n / frame_s, rel=1e-3)
        assert row["acoustic_tokens_per_s"] == pytest.approx(row["frames_per_s"] * manifest.model.num_codebooks, rel=1e-3)
    reached = bundle_record["reached"]
    assert reached["rtf"] == bundle_record["turns"]["ours"]["1"]["frames"]["rtf"]
    assert reached["rtf_of_graphs"] == batches["batch 1"]["rtf"]
    assert reached["first_audio_ms"] == bundle_record["speech"]["requests"]["ttfa"]["known_voice"]["median_ms"]
    assert set(reached["compared"]["frame_ms"]) == {*gpu.SIDES, "best_peer", "speed_up"}
    assert set(reached["compared"]["codec_decode_ms"]) == {"ours", "eager", "best_peer", "speed_up"}


def test_the_compiler_takes_the_peer_whole(bundle_record):
    compiler = bundle_record["turns"]["compiled"]["1"]["compiler"]
    assert compiler["graph_breaks"] == 0
    assert compiler["graphs"] == 2  # a step and a frame; more would mean a recompilation


@pytest.mark.skipif(find_obstacle("cuda") is None, reason="there is a device here")
def test_without_a_device_it_says_so(tmp_path):
    done = run_gpu("--out", tmp_path / "gpu.json")
    assert done.exit_code == 2
    assert "provider 'cuda' cannot be used" in done.output
    assert not (tmp_path / "gpu.json").exists()


class FakeProcesses:
    """A replacement of `_Run.findings` and `_Run.process` that counts calls, and fails on request."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: tuple[str, ...] = (), interrupted: str | None = None) -> None:
        self.fails, self.interrupted, self.asked = fails, interrupted, list[str]()
        monkeypatch.setattr(gpu._Run, "findings", lambda _run, part, *arguments: self.answer(part, arguments))
        monkeypatch.setattr(gpu._Run, "process", lambda *_: None)
        monkeypatch.setattr(gpu.Made, "write_checkpoint", lambda *_: {"seconds": 1})
        monkeypatch.setattr(gpu.Made, "export", lambda *_: {"seconds": 1})

    def answer(self, part: str, arguments: tuple[Any, ...]) -> dict[str, Any]:
        self.asked.append(part)
        if part == self.interrupted:
            raise KeyboardInterrupt
        if part in self.fails:
            error = gpu.ProcessError(f"it ended with status 1: {arguments[1]} is damaged")
            error.found = {"half": 1}
            raise error
        return {"seconds": 1.0}


ONE = ("--provider", "cpu", "--family", "s2", "--rounds", "2")


def test_the_rest_goes_on_when_a_part_fails(tmp_path, monkeypatch):
    fake = FakeProcesses(monkeypatch, ("copies", "graphs", "batches", "eager"))
    done = run_gpu(*ONE, "--out", tmp_path / "gpu.json", "--bundles", tmp_path / "bundles")
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "gpu.json").read_text())
    own = record["families"]["s2"]["recipes"]["fp32"]
    assert "error" in record["copies"]
    assert own["graphs"] == {"half": 1, "error": "it ended with status 1: BUNDLE is damaged"}
    assert own["speech"] == own["turns"]["ours"]["2"] == {"seconds": 1.0}
    assert own["reached"]["rtf"] is None
    assert fake.asked == ["copies", "graphs", "batches", "speech", *gpu.SIDES, *gpu.SIDES]


def test_the_record_is_written_after_each_part(tmp_path, monkeypatch):
    FakeProcesses(monkeypatch, interrupted="speech")
    assert run_gpu(*ONE, "--out", tmp_path / "gpu.json", "--bundles", tmp_path).exit_code == 1
    own = json.loads((tmp_path / "gpu.json").read_text())["families"]["s2"]["recipes"]["fp32"]
    assert set(own) == {"export", "graphs", "batches"}


def test_a_record_is_resumed_where_it_lacks_something(tmp_path, monkeypatch):
    out = tmp_path / "gpu.json"
    FakeProcesses(monkeypatch, ("graphs", "compiled"))
    run_gpu(*ONE, "--out", out)
    again = FakeProcesses(monkeypatch)
    done = run_gpu(*ONE, "--out", out, "--resume")
    assert done.exit_code == 0, done.output
    assert again.asked == ["graphs", "compiled", "compiled"]
    assert '"error"' not in out.read_text()


def test_a_record_of_another_run_is_not_resumed(tmp_path, monkeypatch):
    out = tmp_path / "gpu.json"
    FakeProcesses(monkeypatch)
    run_gpu(*ONE, "--out", out)
    before = out.read_text()
    done = run_gpu(*ONE, "--frames", "7", "--out", out, "--resume")
    assert done.exit_code == 2
    assert "its method is not this run's" in done.output
    monkeypatch.setattr(gpu, "cpu_name", lambda: "another")
    assert "its device is not this run's" in run_gpu(*ONE, "--out", out, "--resume").output
    assert out.read_text() == before


def test_what_does_not_fit_into_the_budget_is_skipped(tmp_path, monkeypatch):
    fake = FakeProcesses(monkeypatch)
    done = run_gpu(*ONE, "--out", tmp_path / "gpu.json", "--budget-s", "0")
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert "over" in record["copies"]["skipped"]
    assert "over" in record["families"]["s2"]["checkpoint"]["skipped"]
    assert fake.asked == []


def bare_run(folder: Path, deadline: float | None = None) -> Any:
    return gpu._Run(folder, folder / "gpu.json", {}, deadline, resume=False)


def test_a_process_that_hangs_is_ended(tmp_path):
    run = bare_run(tmp_path, time.monotonic() + 0.5)
    begun = time.monotonic()
    with pytest.raises(gpu.ProcessError, match="not finished at the deadline"):
        run.process("-c", "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])")
    assert time.monotonic() - begun < 30


def test_a_process_that_fails_says_why(tmp_path):
    run = bare_run(tmp_path)
    with pytest.raises(gpu.ProcessError, match="status 2: error: no such thing"):
        run.process("-c", "import sys; print('error: no such thing'); print('hint: look'); sys.exit(2)")
    with pytest.raises(gpu.ProcessError, match="status 1: KeyError: 5"):
        run.process("-c", "{}[5]")


def test_findings_outlive_their_process(tmp_path):
    found = gpu_process.Findings(tmp_path / "findings")
    found.put("a", 1)
    found.attempt("b", lambda: 1 / 0)
    with (tmp_path / "findings").open("a") as file:
        file.write('{"c": ')
    assert gpu_process.read_findings(tmp_path / "findings") == {"a": 1, "b": {"error": "ZeroDivisionError: division by zero"}}
    assert gpu_process.read_findings(tmp_path / "none") == {}


def test_the_largest_batch_is_one_that_is_served_well():
    def row(batch: int, factor: float) -> dict[str, Any]:
        times = {"median_ms": 10.0}
        return {"batch": batch, "rtf": factor, "acoustic_tokens_per_s": 100.0 * batch} | dict.fromkeys(
            ("frame", "slow_step", "frame_call"), times
        )

    weights = {"slow_bytes": 3e9, "fast_bytes": 1e8, "fast_steps": 10, "frame_bytes": 4e9}
    rows = {"weights": weights, "batch 1": row(1, 0.1), "batch 2": row(2, 0.4), "batch 4": row(4, 0.6), "batch 8": {"error": ""}}
    found = gpu.reached({"batches": rows}, 4000.0)
    assert (found["largest_batch"], found["acoustic_tokens_per_s"], found["rtf_of_graphs"]) == (2, 200.0, 0.1)
    assert found["bandwidth"]["frame_gb_s"] == 400.0
    assert found["bandwidth"]["frame_share"] == 0.1
    assert found["bandwidth"]["frame_call_gb_s"] == 100.0
    assert gpu.reached({}, None)["largest_batch"] is None


def test_ratios_are_of_medians_over_the_rounds():
    def turn(frame: float) -> dict[str, Any]:
        return {"frames": {"frame": {"median_ms": frame}}}

    turns = {
        "ours": {"1": turn(9), "2": turn(10), "3": turn(99)},
        "eager": {"1": turn(50)},
        "compiled": {"1": turn(70), "2": {"error": "x"}, "3": turn(10)},
    }
    found = gpu.reached({"turns": turns}, None)["compared"]["frame_ms"]
    assert found == {"ours": 10, "eager": 50, "compiled": 40, "best_peer": "compiled", "speed_up": 4.0}


def test_a_difference_is_told(tiny_bundle, monkeypatch):
    """Frames drawn with other noise are not the loop's."""
    tts = TTS.load(tiny_bundle, provider="cpu", threads=1)
    frame = gpu_process.open_frame(tts)
    monkeypatch.setattr(gpu_graphs, "FRAMES", 6)
    assert gpu_graphs.compare_drawing(tts, frame)["usual"]["main_tokens_differ"] == 0

    class Other(FrameDrawer):
        other = SeededNoise(1)

        def draw(self, results: Any, rows: Any) -> Any:
            rows[0].noise = self.other
            return super().draw(results, rows)

    monkeypatch.setattr(gpu_graphs, "FrameDrawer", Other)
    found = gpu_graphs.compare_drawing(tts, frame)["usual"]
    assert found["main_tokens_differ"] + found["codes_differ"] > 0
    assert found["not_compared"] > 0
    assert gpu_graphs.difference(np.array([3.0, 4.0]), np.array([3.0, 5.0])) == pytest.approx(
        {"max_abs_error": 1.0, "max_abs": 4.0, "relative_rms": 0.2}
    )


def test_the_precision_is_that_of_the_form_that_runs(tiny_bundle, monkeypatch):
    manifest = tiny_bundle.manifest
    graph, fake = manifest.graphs["slow_ar"], FakeCuda(monkeypatch)

    def computed_in(dtype: str) -> GraphSpec:
        return replace(graph.spec, inputs=tuple(replace(t, dtype=dtype) if "cache" in t.name else t for t in graph.spec.inputs))

    forms = (Form("cuda", computed_in("bfloat16"), needs=("bfloat16",)), Form("cuda", computed_in("float16")))
    bundle = replace(tiny_bundle, manifest=replace(manifest, graphs={**manifest.graphs, "slow_ar": replace(graph, forms=forms)}))
    found = [gpu_process._precision(bundle, "cpu"), gpu_process._precision(bundle, "cuda")]
    fake.devices = (replace(OLD, compute_capability=(8, 0)),)
    assert [*found, gpu_process._precision(bundle, "cuda")] == ["float32", "float16", "bfloat16"]


def test_results_that_stay_on_a_device_are_measured(tiny_bundle, tiny_checkpoint, tmp_path, monkeypatch):
    """The device is simulated (see fake_cuda): the frame graph, captured runs. Heads are too narrow for a form in 16 bits."""
    fake = FakeCuda(monkeypatch)
    monkeypatch.setattr("fishrt.tts.resolve_provider", lambda name: name)
    monkeypatch.setattr(gpu_graphs, "FRAMES", 4)
    path, memory = tmp_path / "findings", gpu_process._Memory()
    into = gpu_process.Findings(path)
    gpu_process._graphs(into, tiny_bundle, tiny_checkpoint, "cuda", "cpu")
    gpu_process._batches(into, tiny_bundle, "cuda", 2, 2, memory)
    gpu_process._speech(into, tiny_bundle, "cuda", 2)
    gpu_process._turn(into, "ours", tiny_bundle, tiny_checkpoint, "cuda", "cpu", 2)
    record = gpu_process.read_findings(path)
    assert '"error"' not in json.dumps(record)
    assert record["computed_in"] == "float32"
    for role in ("slow_ar", "fast_ar"):
        assert all(found["relative_rms"] < 1e-2 for found in record[role]["ours against torch fp32"].values())
    assert record["frame"]["loop_on"] == "cuda"
    assert record["known_voice"]["kept"]
    assert record["known_voice"]["logits"]["max_abs_error"] == 0
    assert record["batch 2"]["batch"] == 2
    weights = record["weights"]
    assert weights["slow_bytes"] == bytes_read(tiny_bundle.file("slow_ar.onnx"))
    assert any(session.captures for session in fake.sessions)
