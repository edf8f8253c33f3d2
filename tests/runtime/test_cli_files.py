from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import soundfile

import helpers_cli
from fishrt.bundle.folder import describe_files
from fishrt.bundle.manifest import MANIFEST, Form, Parity, Rounding
from fishrt.voices.store import VoiceStore
from fishrt_engines.engine import GraphSpec, TensorSpec
from helpers_cli import RATE, files, refused, run, tone
from helpers_text import bundle_folder
from vectors import find_golden

fake = helpers_cli.fake
recording = helpers_cli.recording


def test_own_voices_go_before_the_bundles(fake, recording):
    assert run("voice", "add", "otto", "--audio", recording, "--text", "My words.").exit_code == 0
    assert run("speak", "Hi.", "--voice", "otto", "--voice", "minna").exit_code == 0
    assert [v.transcript for v in fake.asked["voice"]] == ["My words.", "The quick brown fox."]
    refused(run("speak", "Hi.", "--voice", "nobody"), "no voice 'nobody'", "otto", "minna, otto")


def test_references(fake, recording):
    np.save("codes.npy", np.ones((4, 3), np.int32))
    arguments = f"--voice minna --reference {recording} --reference-text One. --reference codes.npy --reference-text Two.".split()
    assert run("speak", "Hi.", *arguments).exit_code == 0
    assert [(v.transcript, v.codes.shape[1]) for v in fake.asked["voice"]] == [
        ("The quick brown fox.", 6),
        ("One.", 25),
        ("Two.", 3),
    ]
    refused(run("speak", "Hi.", "--reference", "none.wav", "--reference-text", "x"), "none.wav")
    soundfile.write("short.wav", tone(0.1), RATE)
    refused(run("speak", "Hi.", "--reference", "short.wav", "--reference-text", "x"), "short.wav is too short")


def test_a_recording_comes_through_a_pipe(fake, recording):
    data = Path(recording).read_bytes()
    os.mkfifo("pipe")
    for arguments in (["speak", "Hi.", "--reference", "pipe", "--reference-text", "x"], ["codec", "encode", "pipe"]):
        writer = threading.Thread(target=lambda: Path("pipe").write_bytes(data))
        writer.start()
        done = run(*arguments)
        writer.join()
        assert done.exit_code == 0, done.stderr
    assert np.load("codes.npy").shape == (4, 25)
    assert fake.asked["voice"][0].codes.shape == (4, 25)
    assert run("voice", "add", "piped", "--audio", "-", "--text", "x", stdin=data).exit_code == 0
    refused(run("voice", "add", "none", "--audio", "-", "--text", "x", stdin=b""), "standard input is empty")


def test_voice_commands(fake, recording):
    add = ["voice", "add", "me too", "--audio", recording, "--text", "My words."]
    result = run(*add, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["frames"] == 25
    fake.loads.clear()
    refused(run(*add), "already", "--force")
    assert fake.loads == []
    assert run(*add, "--force").exit_code == 0
    refused(run(*add[:5]), "Missing option '--text'")

    listed = run("voice", "list")
    assert listed.stdout.splitlines() == ["me too\tuser", "minna\tbundle  (default)", "otto\tbundle"]
    data = json.loads(run("voice", "list", "--json").stdout)
    assert data["voices"][0] == {"name": "me too", "from": "user"}
    assert data["default"] == "minna"

    shown = run("voice", "show", "me too").stdout
    assert "My words." in shown
    assert "made with its codec" in shown
    assert json.loads(run("voice", "show", "minna", "--json").stdout)["transcript"] == "The quick brown fox."
    refused(run("voice", "show", "nobody"), "nobody")

    assert run("voice", "remove", "me too").exit_code == 0
    refused(run("voice", "remove", "me too"), "no voice 'me too'")
    refused(run("voice", "remove", "minna"), "'minna' belongs to the bundle and cannot be removed")


def test_a_broken_index_does_not_block_the_bundles_voices(fake):
    folder = Path("own")
    folder.mkdir()
    (folder / "index.json").write_text("nonsense")
    options = ["--voice-dir", "own"]
    for arguments in (["speak", "Hi.", "--voice", "otto"], ["voice", "show", "otto"]):
        result = run(*arguments, *options)
        assert result.exit_code == 0, result.output
        assert "warning: own/index.json is not JSON" in result.stderr
    refused(run("speak", "Hi.", "--voice", "nobody", *options), "index.json")
    refused(run("voice", "list", *options), "index.json")


def others(recording) -> Path:
    """Write a voice in each layout of another program, below the folder "own". Return the folder with the recording."""
    folder = Path("own/some one")
    folder.mkdir(parents=True)
    Path(recording).rename(folder / "a.wav")
    (folder / "a.lab").write_text("Said long ago.")
    (folder.parent / "index.json").write_text('{"speakers": {"Zoë": "Salut."}}')
    np.save(folder.parent / "Zoë.npy", np.ones((4, 3), np.int64))
    return folder


def test_show_reads_the_voices_of_others(fake, recording):
    others(recording)
    result = run("voice", "show", "some one", "--voice-dir", "own")
    assert result.exit_code == 0, result.output
    assert "Said long ago." in result.stdout
    assert "made with its codec" in result.stdout
    assert "Zoë\tuser" in run("voice", "list", "--voice-dir", "own").stdout
    assert "Salut." in run("voice", "show", "Zoë", "--voice-dir", "own").stdout


def test_voice_dir(fake, recording, tmp_path):
    run("voice", "add", "a", "--audio", recording, "--text", "x", "--voice-dir", tmp_path / "other")
    assert VoiceStore(tmp_path / "other").list() == ["a"]
    assert "a\tuser" not in run("voice", "list").stdout
    assert "a\tuser" in run("voice", "list", "--voice-dir", tmp_path / "other").stdout
    assert run("speak", "Hi.", "--voice", "a", "--voice-dir", tmp_path / "other").exit_code == 0


def test_a_voice_is_prepared_in_its_folder(fake, recording):
    run("voice", "add", "otto", "--audio", recording, "--text", "My words.")
    done = run("voice", "prepare", "otto")
    (made,) = fake.prepared
    assert made == ("otto", fake.own.folder / "otto")
    assert str(made[1]) in done.stderr
    refused(run("voice", "prepare", "nobody"), "nobody")
    refused(run("voice", "prepare", "minna"), "belongs to the bundle")


def test_voices_of_others_are_prepared_without_touching_their_folders(fake, recording):
    folder = others(recording)
    for name in ("some one", "Zoë"):
        result = run("voice", "prepare", name, "--voice-dir", "own")
        assert result.exit_code == 0, result.output
    assert fake.prepared == [(name, Path("own/.prepared") / name) for name in ("some one", "Zoë")]
    assert len(list(folder.iterdir())) == 2
    assert run("voice", "list", "--voice-dir", "own").stdout.splitlines()[:2] == ["Zoë\tuser", "some one\tuser"]


def test_adding_tells_what_next(fake, recording):
    done = run("voice", "add", "my voice", "--audio", recording, "--text", "My words.", "--voice-dir", "own")
    assert "Added voice my voice (1.0 s). Try: fishrt speak --voice 'my voice' --voice-dir own \"Hello!\"" in done.stderr
    shadowing = run("voice", "add", "otto", "--audio", recording, "--text", "My words.")
    assert "warning: the bundle has a voice 'otto', too; yours is used" in shadowing.stderr
    assert "otto\tbundle  (yours is used)" in run("voice", "list").stdout


def test_doubtful_recordings_are_taken_with_a_warning(fake):
    noise = np.random.default_rng(0).standard_normal(RATE * 12).astype(np.float32)
    soundfile.write("noise.wav", noise / 10, RATE)
    result = run("voice", "add", "noise", "--audio", "noise.wav", "--text", "My words.", "--json")
    assert result.exit_code == 0, result.output
    (noisy, wordy) = json.loads(result.stdout)["warnings"]
    assert "sounds like noise" in noisy
    assert "12.0 s for 7 letters" in wordy


def test_folders_that_are_no_voices_are_told(fake, recording):
    folder = Path("own/anna")
    folder.mkdir(parents=True)
    Path(recording).rename(folder / "a.wav")
    result = run("voice", "list", "--voice-dir", "own")
    assert "warning: left out: own/anna/a.wav has no transcript a.lab" in result.stderr
    assert "anna" not in result.stdout
    assert "anna" in json.loads(run("voice", "list", "--voice-dir", "own", "--json").stdout)["left_out"]
    refused(run("speak", "Hi.", "--voice", "anna", "--voice-dir", "own"), "has no transcript a.lab")


def test_voices_without_an_embedded_bundle(fake, monkeypatch, recording):
    run("voice", "add", "a", "--audio", recording, "--text", "x")
    monkeypatch.setattr("fishrt.cli.base.options.embedded_bundle", lambda: Path("none"))
    assert run("voice", "list").stdout == "a\tuser\n"
    assert "codec:" in run("voice", "show", "a").stdout
    refused(run("voice", "list", "--bundle", "none"), "none does not exist")


def test_codec_there_and_back(fake, recording):
    assert run("codec", "encode", recording).exit_code == 0
    codes = np.load("codes.npy")
    assert codes.dtype == np.int64
    assert codes.shape == (4, 25)
    data = json.loads(run("codec", "decode", "codes.npy", "-o", "back.wav", "--json").stdout)
    frame = {"command": "codec decode", "ok": True, "warnings": []}
    assert data == {**frame, "output": "back.wav", "sample_rate": RATE, "audio_s": 1.0}
    assert soundfile.info("back.wav").frames == RATE
    assert run("codec", "decode", "codes.npy", "-o", "-", "--format", "pcm").stdout_bytes[:2] == b"\0\0"
    result = run("codec", "decode", "codes.npy", "-o", "-")
    assert len(soundfile.read(io.BytesIO(result.stdout_bytes))[0]) == RATE
    assert files() == ["back.wav", "codes.npy"]


def test_codes_on_standard_output(fake, recording):
    result = run("codec", "encode", recording, "-o", "-", "--json")
    assert result.exit_code == 0, result.output
    assert np.load(io.BytesIO(result.stdout_bytes)).shape == (4, 25)
    assert json.loads(result.stderr)["output"] == "-"
    assert files() == []


# --- bundles -------------------------------------------------------------------------------------------------------------------


def test_inspect(fake):
    result = run("inspect", fake.bundle.path, "--verify")
    assert result.exit_code == 0, result.output
    for words in "minna, otto (default minna)|slow_ar.onnx|prompt int64 [batch, 5, length]|float32|Apache-2.0|SHA-256".split("|"):
        assert words in result.stdout
    data = json.loads(run("inspect", "--json").stdout)
    assert data["verified"] is False
    assert data["manifest"]["codec"]["sample_rate"] == RATE
    assert fake.loads == []


def test_an_error_in_words():
    codes = GraphSpec("a.onnx", (), (TensorSpec("codes", "int64", ("batch",)),))
    audio = GraphSpec("a.onnx", (), (TensorSpec("audio", "float32", ("batch",)),))
    assert Parity(0.0, 1e-4, "cpu").summary(codes) == "0 codes differ"
    assert "unclear, by a margin of 2e-05 of 0.0001 allowed" in Parity(2e-5, 1e-4, "cpu").summary(codes)
    assert Parity(3.4e-5, 5e-4, "cpu").summary(audio) == "largest error 3.4e-05 of 0.0005 allowed"


def test_inspect_shows_the_decoder_in_8_bits(tmp_path):
    bundle = bundle_folder(tmp_path / "bundle")
    (bundle.path / "codec_decode_int8.onnx").write_bytes(b"a graph")
    decode = bundle.manifest.graphs["codec_decode"]
    spec = replace(decode.spec, file="codec_decode_int8.onnx")
    form = Form("cpu", spec, needs=("vnni",), rounding=Rounding(21, 64, 34.8, 32.0))
    graphs = {**bundle.manifest.graphs, "codec_decode": replace(decode, forms=(form, Form("cuda", decode.spec)))}
    manifest = replace(bundle.manifest, graphs=graphs, family="A family", recipe="int4").sealed(describe_files(bundle.path))
    (bundle.path / MANIFEST).write_text(manifest.to_json())
    shown = run("inspect", bundle.path).stdout
    assert "family        A family\nrecipe        int4\n" in shown
    assert "  form for cpu with vnni: codec_decode_int8.onnx, 7 B\n    21 conv" in shown
    assert "\n    not compared with torch: no CPU can run it" in shown


def test_inspect_finds_what_is_wrong(fake):
    graph = fake.bundle.path / "slow_ar.onnx"
    graph.write_bytes(b"Not a graph")
    assert run("inspect", fake.bundle.path).exit_code == 0
    refused(run("inspect", fake.bundle.path, "--verify"), "slow_ar.onnx was altered")
    failed = run("inspect", fake.bundle.path, "--verify", "--json")
    assert json.loads(failed.stdout)["ok"] is False
    graph.unlink()
    refused(run("inspect", fake.bundle.path), "slow_ar.onnx is missing")


def checkpoint_files():
    """Make the folder ckpt with all parts of a checkpoint."""
    for half in ("lm", "codec"):
        shutil.copytree(find_golden(None, "s2-pro") / half / "checkpoint", "ckpt", dirs_exist_ok=True)


def test_export_passes_its_options_on(fake, monkeypatch, tmp_path):
    import fishrt_export

    lora = tmp_path / "a.ckpt"
    lora.touch()
    checkpoint_files()

    asked = []

    def export(checkpoint, out, options, *, progress):
        progress("reading", 0.5)
        asked.append((checkpoint, out, asdict(options)))
        return fake.bundle

    monkeypatch.setattr(fishrt_export, "export_bundle", export, raising=False)
    monkeypatch.setattr(sys.modules["fishrt.cli.bundles.export"], "peak_memory", lambda: 5_000_000)
    result = run("export", "ckpt", "out", "--head", "full")
    assert result.exit_code == 0, result.output
    for words in ("peak memory 5.0 MB", "slow_ar.onnx", "manifest.json", 'next: fishrt speak --bundle out "Hello."'):
        assert words in result.stderr
    data = json.loads(run("export", "ckpt", "out", "--head", "full", "--json").stdout)
    assert data["peak_memory_bytes"] == 5_000_000
    assert data["files"].keys() == {*fake.bundle.manifest.files, "manifest.json"}
    assert data["bytes"] == sum(data["files"].values())
    assert {"family", "recipe", "licence", "parity", "quantisation", "codec_int8", "seconds"} <= data.keys()
    run("export", "ckpt", "out", "--family", "1.5", "--lora", str(lora), "--lora-alpha", "16")
    run("export", "ckpt", "out", "--lora", str(lora), "--lora-alpha", "0.5", "--lora-rank", "8")
    run("export", "ckpt", "out", "--precision", "int4", "--keep", "slow_ar.layers.0.*=int8", "--keep", "fast_ar.output=fp32")
    run("export", "ckpt", "out", "--static", "coreml")
    run("export", "ckpt", "out", "--target", "cuda", "--target", "coreml")
    run("export", "ckpt", "out", "--codec-int8")
    run("export", "ckpt", "out", "--codec", "ckpt/codec.pth", "--tokenizer", "ckpt", "--weights", "model.safetensors.index.json")
    plain = {"head": "audio", "family": None, "lora": None, "precision": None, "keep": {}, "targets": ()}
    plain |= {"codec_int8": False, "codec": None, "tokenizer": None, "weights": None}
    assert {(checkpoint, out) for checkpoint, out, _ in asked} == {(Path("ckpt"), Path("out"))}
    changes = [{**options, "head": "full"} for options in (plain, plain)]
    changes += [{**plain, "family": "1.5", "lora": {"path": lora, "alpha": 16.0, "rank": None}}]
    changes += [{**plain, "lora": {"path": lora, "alpha": 0.5, "rank": 8}}]
    changes += [{**plain, "precision": "int4", "keep": {"slow_ar.layers.0.*": "int8", "fast_ar.output": "fp32"}}]
    changes += [{**plain, "targets": ("coreml",)}, {**plain, "targets": ("cuda", "coreml")}, {**plain, "codec_int8": True}]
    named = {"codec": Path("ckpt/codec.pth"), "tokenizer": Path("ckpt"), "weights": Path("model.safetensors.index.json")}
    changes += [plain | named]
    assert [options for _, _, options in asked] == changes


def test_the_help_of_export_names_every_official_checkpoint(fake):
    help_text = run("export", "--help").stdout
    for name in ("s2-pro", "openaudio-s1-mini", "fish-speech-1.5", "fish-speech-1.4", "fish-speech-1.2-sft"):
        assert f"fishaudio/{name}" in help_text
    assert "jordand/echo-tts-base" in help_text
    for name in ("tokenizer.tiktoken", "firefly-gan-vq-fsq-4x1024-42hz-generator.pth"):
        assert name in help_text


def test_export_without_torch_names_the_extra(fake, monkeypatch):
    checkpoint_files()
    before = files()
    monkeypatch.setitem(sys.modules, "torch", None)
    for name in [m for m in sys.modules if m.startswith("fishrt_export")]:
        monkeypatch.delitem(sys.modules, name)
    refused(run("export", "ckpt", "out"), "torch", 'pip install "fishrt[export]"')
    assert files() == before


def test_a_bug_in_export_is_not_called_a_missing_package(fake, monkeypatch):
    import fishrt_export

    def broken(*_, **__):
        raise ImportError("cannot import name 'x'", name="fishrt.bundle.folder")

    checkpoint_files()

    monkeypatch.setattr(fishrt_export, "export_bundle", broken, raising=False)
    refused(run("export", "ckpt", "out"), "fishrt has a fault: ImportError: cannot import name 'x'", kind=1)


def test_doctor(fake, monkeypatch):
    result = run("doctor")
    assert result.exit_code == 0, result.output
    for words in (
        "python: ",
        "provider cpu",
        "audio formats: reads WAV, ",
        "; writes wav, flac, ogg, opus, mp3, ",
        "torch for export: ",
        "embedded voice: ok, test",
    ):
        assert words in result.stdout
    monkeypatch.setattr("fishrt.cli.base.options.embedded_bundle", lambda: Path("none"))
    assert "embedded voice: not usable: none does not exist" in run("doctor").stdout


def test_doctor_reports_a_broken_audio_library():
    code = "import sys; sys.modules.update(soundfile=None)\nfrom fishrt.cli import main; main(['doctor'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "audio formats: soundfile cannot be loaded" in done.stdout


def test_looking_at_a_bundle_loads_no_engine(tmp_path):
    """In its own process, in which the engines' libraries cannot be imported."""
    folder = bundle_folder(tmp_path / "b").path
    code = (
        "import sys; sys.modules.update(torch=None, onnxruntime=None, onnx=None)\n"
        f"from fishrt.cli import main; main(['inspect', {str(folder)!r}, '--verify'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "slow_ar" in done.stdout
