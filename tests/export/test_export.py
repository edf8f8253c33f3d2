"""Exporting: everything checked first, written completely or not at all, with voices and licence."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fishrt.bundle.memory
import fishrt_export.checkpoint.families
import fishrt_export.export
import fishrt_export.graph.job
import fishrt_export.planning.dual_ar
import fishrt_export.sources.codec
from fishrt.bundle.features import Reads, SamplingDefaults
from fishrt.bundle.folder import Bundle
from fishrt.errors import AudioError, BundleError, FishrtError, OutputError
from fishrt.progress import Progress
from fishrt_export import Options, export_bundle
from fishrt_export.checkpoint.families import S2
from fishrt_export.checkpoint.names import DEFAULTS
from fishrt_export.errors import ExportError
from fishrt_export.graph.job import Made
from fishrt_export.planning.dual_ar import warn_of_unknown_codes
from fishrt_export.sources.language_model import open_language_model
from fishrt_export.targets.tensorrt.rules import Finding
from helpers_text import language_model
from synthetic import EVERYTHING, random_weights, write_nested, write_reference

ROLES = ("slow_ar", "fast_ar", "codec_encode", "codec_decode")
pytestmark = pytest.mark.slow


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out/bundle"


@pytest.fixture
def no_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """For errors that must be found before anything is traced."""

    def run(*_: object) -> None:
        raise AssertionError("a graph was begun")

    monkeypatch.setattr(fishrt_export.graph.job.GraphJob, "run", run)


def assert_nothing_left(out: Path) -> None:
    assert list(out.parent.iterdir()) == []


@contextmanager
def refused(out: Path, message: str, error: type[Exception] = ExportError) -> Iterator[pytest.ExceptionInfo[Exception]]:
    """Expect an error in the block, and nothing on the disk after it."""
    with pytest.raises(error, match=message) as caught:
        yield caught
    assert_nothing_left(out)


def edit_shard(checkpoint: Path, name: str, edit: Any) -> None:
    from safetensors.torch import load_file, save_file

    for path in checkpoint.glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            tensors = edit(tensors)
            save_file(tensors, path)
            if (index := checkpoint / "model.safetensors.index.json").is_file():
                data = json.loads(index.read_text())
                data["weight_map"] = {key: place for key, place in data["weight_map"].items() if place != path.name}
                data["weight_map"] |= dict.fromkeys(tensors, path.name)
                index.write_text(json.dumps(data))


@pytest.mark.usefixtures("no_graphs")
def test_all_problems_of_both_halves_in_one_error(checkpoint: Path, out: Path) -> None:
    norm, head = "text_model.model.norm.weight", "audio_decoder.output.weight"
    edit_shard(
        checkpoint, norm, lambda t: {**{k: v for k, v in t.items() if k != norm}, "text_model.model.stray": torch.zeros(2)}
    )
    edit_shard(checkpoint, head, lambda t: {**t, head: torch.full_like(t[head], float("nan"))})
    codec = torch.load(checkpoint / "codec.pth", weights_only=True)
    name = "quantizer.pre_module.norm.weight"
    torch.save({**codec, name: codec[name][:-1].clone()}, checkpoint / "codec.pth")
    with pytest.raises(ExportError) as caught:
        export_bundle(checkpoint, out)
    message = str(caught.value)
    assert "(4 problems)" in message
    for part in ("missing: norm.weight", "unexpected: stray", "not finite: fast_output.weight", f"wrong shape: {name}"):
        assert part in message
    assert_nothing_left(out)


@pytest.mark.usefixtures("no_graphs")
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "codec.pth"])
def test_a_checkpoint_that_lacks_a_file(checkpoint: Path, out: Path, name: str) -> None:
    (checkpoint / name).unlink()
    with refused(out, name):
        export_bundle(checkpoint, out)


@pytest.mark.usefixtures("no_graphs")
def test_halves_of_different_models(checkpoint: Path, out: Path) -> None:
    for path in checkpoint.glob("*.safetensors*"):
        path.unlink()
    config = {**EVERYTHING, "num_codebooks": 17}
    write_nested(checkpoint, config, random_weights(config))
    with refused(out, "17 codebooks and the codec has"):
        export_bundle(checkpoint, out)


OWN_DEFAULTS: dict[str, Any] = {
    "chunk_bytes": 99,
    "sampling": {"temperature": 0.5, "top_p": 0.6, "top_k": None, "repetition_aware": None, "repetition_penalty": None},
}


def own_defaults(chunk_bytes: int = 99, **sampling: Any) -> str:
    return json.dumps({"chunk_bytes": chunk_bytes, "sampling": {**OWN_DEFAULTS["sampling"], **sampling}})


def test_a_checkpoint_may_bring_its_own_defaults(checkpoint: Path) -> None:
    assert open_language_model(checkpoint).family == S2
    (checkpoint / DEFAULTS).write_text(json.dumps(OWN_DEFAULTS))
    family = open_language_model(checkpoint).family
    assert (family.chunk_bytes, family.sampling, family.reads) == (99, SamplingDefaults(0.5, 0.6, None, None, None), S2.reads)
    reads = {"languages": ["th"], "characters": None, "tags": []}
    (checkpoint / DEFAULTS).write_text(json.dumps({**OWN_DEFAULTS, "reads": reads}))
    assert open_language_model(checkpoint).describe("audio").reads == Reads(("th",), None, ())


@pytest.mark.usefixtures("no_graphs")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        *((text, f"{DEFAULTS} is not valid") for text in ("{", "[]", '{"chunk_bytes": 99}')),
        (json.dumps({**OWN_DEFAULTS, "topk": 3}), f"{DEFAULTS} is not valid: .*topk"),
        (own_defaults(chunk_bytes=0), "chunk_bytes is 0, below 1"),
        (own_defaults(temperature=-0.1), r"sampling\.temperature is -0\.1; it must"),
        (own_defaults(temperature=2.0), r"sampling\.temperature is 2\.0"),
        (own_defaults(top_p=1.5), r"sampling\.top_p is 1\.5"),
        (own_defaults(top_k=0), r"sampling\.top_k is 0"),
        (own_defaults(repetition_aware={"window": 0, "temperature": 1.0, "top_p": 0.9}), r"repetition_aware\.window is 0"),
        (own_defaults(repetition_aware={"window": 10, "temperature": 2.5, "top_p": 0.9}), r"repetition_aware\.temperature is 2"),
        (own_defaults(repetition_penalty={"window": 0, "penalty": 1.2, "main": "row"}), r"repetition_penalty\.window is 0"),
        (own_defaults(repetition_penalty={"window": 16, "penalty": 2.5, "main": "row"}), r"repetition_penalty is 2\.5"),
    ],
)
def test_defaults_that_are_not_valid(checkpoint: Path, out: Path, text: str, message: str) -> None:
    (checkpoint / DEFAULTS).write_text(text)
    with refused(out, message) as caught:
        export_bundle(checkpoint, out)
    assert DEFAULTS in f"{caught.value} {getattr(caught.value, 'hint', '')}"


@pytest.mark.usefixtures("no_graphs")
def test_an_output_that_is_taken(checkpoint: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept/notes.txt"
    kept.parent.mkdir()
    kept.write_text("mine")
    with pytest.raises(ExportError, match="is not empty"):
        export_bundle(checkpoint, kept.parent)
    with pytest.raises(ExportError, match="is a file"):
        export_bundle(checkpoint, kept)
    assert kept.read_text() == "mine"
    assert list(kept.parent.iterdir()) == [kept]


@pytest.mark.usefixtures("no_graphs")
def test_the_folder_around_the_output_must_be_there(checkpoint: Path, tmp_path: Path) -> None:
    """A mistyped path must not create a tree of folders."""
    (tmp_path / "file").write_text("not a folder")
    for parent in ("file", "missing"):
        with pytest.raises(OutputError, match=rf"there is no folder .*{parent}"):
            export_bundle(checkpoint, tmp_path / parent / "bundle")
    assert not (tmp_path / "missing").exists()


@pytest.mark.usefixtures("no_graphs")
def test_too_little_memory_is_found_out_before_anything_is_written(
    checkpoint: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fishrt.bundle.memory, "available_memory", lambda: 200_000_000)
    with refused(out, r"exporting .* needs about 0\.3\d GB of memory, and 0\.20 GB are free", FishrtError):
        export_bundle(checkpoint, out)


@pytest.mark.usefixtures("no_graphs")
def test_a_layer_that_the_model_does_not_have(checkpoint: Path, out: Path) -> None:
    with refused(out, r"slow_ar\.layers\.99\.\*=int8"):
        export_bundle(checkpoint, out, Options(keep={"slow_ar.layers.99.*": "int8"}))


@pytest.mark.usefixtures("no_graphs")
def test_a_description_that_cannot_be(checkpoint: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fishrt_export.checkpoint.families.FAMILIES, "s2", replace(S2, prompt_dialect="whistling"))
    with refused(out, r"cannot become a bundle: .*whistling"):
        export_bundle(checkpoint, out)


def test_a_bundle_that_does_not_load_is_not_left(checkpoint: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skip_tracing(monkeypatch)
    monkeypatch.setattr(fishrt_export.export, "describe_files", lambda _: {})
    with refused(out, "names files that it does not list", BundleError):
        export_bundle(checkpoint, out)


def test_a_checkpoint_that_vanishes(checkpoint: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the checkpoint, not the output."""

    def check(*_: object) -> None:
        shutil.rmtree(checkpoint)

    monkeypatch.setattr(fishrt_export.planning.dual_ar, "check_references", check)
    with refused(out, "checkpoint cannot be read"):
        export_bundle(checkpoint, out)


@pytest.mark.parametrize("there", [True, False])
def test_an_output_behind_a_link(checkpoint: Path, out: Path, monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    skip_tracing(monkeypatch)
    if there:
        (out.parent / "real").mkdir()
    out.symlink_to("real")
    bundle = export_bundle(checkpoint, out)
    assert bundle.path == out
    assert out.is_symlink()
    assert sorted(path.name for path in out.parent.iterdir()) == ["bundle", "real"]
    assert Bundle.load(out.parent / "real").manifest == bundle.manifest


@pytest.mark.usefixtures("no_graphs")
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda folder: (folder / "empty").mkdir(), ExportError, "not voices: .*empty holds no voice"),
        (lambda folder: (folder / "default.txt").write_text("nobody"), ExportError, "names 'nobody'; the voices are: anna"),
        (lambda folder: (folder / "default.txt").write_bytes(b"\xff\xfe"), ExportError, r"default\.txt is not UTF-8"),
        (lambda folder: (folder / "anna/a.lab").unlink(), ExportError, "not voices: .* has no transcript a.lab"),
        (lambda folder: (folder / "anna/a.wav").write_bytes(b"noise"), AudioError, "a.wav"),
        (lambda folder: write_reference(folder.parent, "ben", seconds=0.1), AudioError, "too short"),
    ],
)
def test_references_that_are_none(checkpoint: Path, out: Path, make: Any, error: type[Exception], message: str) -> None:
    write_reference(checkpoint, "anna")
    make(checkpoint / "references")
    with refused(out, message, error):
        export_bundle(checkpoint, out)


@pytest.mark.parametrize("stage", ["slow_ar: tracing", "hashing the files"])
def test_an_interruption_leaves_nothing(checkpoint: Path, out: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    """Graphs are not traced: the test checks the files on the disk at each stage."""
    skip_tracing(monkeypatch)
    seen = []

    def progress(name: str, _done: float) -> None:
        seen.append(name)
        if name == stage:
            assert [path.name.startswith(".fishrt-") for path in out.parent.iterdir()] == [True]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_bundle(checkpoint, out, progress=progress)
    assert seen[-1] == stage
    assert_nothing_left(out)


def test_progress_grows_to_the_end(checkpoint: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skip_tracing(monkeypatch)
    seen: list[tuple[str, float]] = []
    out.mkdir()  # an empty folder may be there already
    bundle = export_bundle(checkpoint, out, progress=lambda name, done: seen.append((name, done)))
    assert [path.name for path in out.parent.iterdir()] == ["bundle"]
    assert [name for name, _ in seen] == [
        "reading the checkpoint",
        *(
            f"{role}: {stage}"
            for role in ("codec_encode", "codec_decode", "slow_ar", "fast_ar")
            for stage in ("tracing", "writing", "verifying")
        ),
        "hashing the files",
    ]
    assert [done for _, done in seen] == sorted(done for _, done in seen)
    assert (seen[0][1], seen[-1][1]) == (0.0, 1.0)
    assert bundle.path == out


def test_what_tensorrt_would_refuse_is_a_warning(
    checkpoint: Path, out: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The bundle is a good one for all other engines."""
    error, note = (Finding(severity, "y", "Det", "operator", "is not supported", "table") for severity in ("error", "note"))
    skip_tracing(monkeypatch, {"slow_ar": [error, note], "fast_ar": [note]})
    assert Bundle.load(export_bundle(checkpoint, out).path)
    assert [record.getMessage() for record in caplog.records if "TensorRT" in record.getMessage()] == [
        f"TensorRT would refuse slow_ar: {error}; fishrt inspect --trt shows all"
    ]


def test_ending_the_process_leaves_nothing(checkpoint: Path, out: Path) -> None:
    """By SIGTERM, as service managers do, when all but the manifest is written. The graphs are left out."""
    done = export_and_send(signal.SIGTERM, checkpoint, out)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr.decode()
    assert_nothing_left(out)


def test_a_handler_of_sigterm_is_left_alone(checkpoint: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skip_tracing(monkeypatch)
    seen = []

    def progress(*_: object) -> None:
        seen.append(signal.getsignal(signal.SIGTERM))

    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        export_bundle(checkpoint, out, progress=progress)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert set(seen) == {signal.SIG_IGN}


def test_killing_the_process_leaves_nothing_that_loads(checkpoint: Path, out: Path) -> None:
    """The process is ended without a chance to clean up, when all but the manifest is written."""
    done = export_and_send(signal.SIGKILL, checkpoint, out)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert not out.exists()
    (left,) = out.parent.iterdir()
    assert (left / "tokenizer.json").is_file()
    with pytest.raises(BundleError):
        Bundle.load(left)


def export_and_send(number: signal.Signals, checkpoint: Path, out: Path) -> subprocess.CompletedProcess[bytes]:
    """Exports without graphs in a process that gets the signal when all but the manifest is written."""
    script = (
        "import os, sys; from fishrt_export import export, export_bundle\n"
        f"export.describe_files = lambda folder: os.kill(os.getpid(), {int(number)})\n"
        "export.GraphJob.run = lambda *_: export.Made(None, 0, {}); export.write_start = lambda *_: None\n"
        "export_bundle(sys.argv[1], sys.argv[2])\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run([sys.executable, "-c", script, checkpoint, out], env=environment, capture_output=True, check=False)


def test_a_graph_that_differs_fails_and_leaves_nothing(checkpoint: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fishrt_export.sources.codec, "AUDIO_TOLERANCE", 1e-12)
    source = fishrt_export.sources.codec.CodecSource
    jobs = source.jobs
    monkeypatch.setattr(source, "jobs", lambda source: jobs(source)[::-1])  # codec_decode is soon done
    with refused(out, r"codec_decode\.onnx is not the torch module: audio differs by"):
        export_bundle(checkpoint, out)


def skip_tracing(monkeypatch: pytest.MonkeyPatch, findings: dict[str, list[Finding]] | None = None) -> None:
    from fishrt.bundle.manifest import Parity

    def run(job: fishrt_export.graph.job.GraphJob, folder: Path, progress: Progress, _make_forms: object) -> Made:
        for part, name in enumerate(("tracing", "writing", "verifying")):
            progress(name, part / 3)
        (folder / job.spec.file).write_bytes(b"not a graph")
        return Made(Parity(0.0, 0.0, "cpu"), 1000, {})

    monkeypatch.setattr(fishrt_export.graph.job.GraphJob, "run", run)
    monkeypatch.setattr(fishrt_export.export, "write_start", lambda *_: None)
    monkeypatch.setattr(fishrt_export.export, "tensorrt_findings", lambda _bundle: findings or {})


@pytest.mark.parametrize(("codes", "count"), [(160, 0), (161, 1)])
def test_codes_that_the_model_has_no_tokens_for_are_a_warning(codes: int, count: int, caplog: pytest.LogCaptureFixture) -> None:
    lm = replace(language_model(), semantic_begin_id=100, semantic_end_id=259)
    warn_of_unknown_codes(lm, codes)
    assert len(caplog.records) == count
