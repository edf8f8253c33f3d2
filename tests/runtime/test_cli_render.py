"""`fishrt render` as a command: options, results, exit statuses, signals; and with the embedded voice, the speech of `speak`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

import helpers_cli
from fake_diffusion import diffusion_tts
from fake_render import FakeVoice, files, lines
from fishrt.bulk.render import render
from fishrt.cli.base.jobs import _stopping
from fishrt.diffusion.denoising import Denoising
from fishrt.errors import BundleError
from fishrt.language_model.sampling import Sampling
from fishrt.request import Request
from fishrt.tts import TTS
from helpers_cli import refused, run

fake = helpers_cli.fake


@pytest.fixture
def spoken(fake, monkeypatch):
    """The fake TTS; `said` has the rows of each run, which a fake voice speaks."""
    fake.bundle_sha256, fake.provider, fake.workers = "00", "cpu", []
    fake.job = lambda request, *_: None
    fake.known = fake.voice

    def speaker(tts, batch):
        fake.workers.append(FakeVoice(batch))
        return fake.workers[-1]

    monkeypatch.setattr("fishrt.bulk.render.Speaker", speaker)
    return fake


def write(*rows: dict, name: str = "job.jsonl") -> Path:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Path(name)


def test_a_job(spoken):
    result = run("render", write({"id": "a", "text": "One."}, {"id": "b", "text": "Two."}), "out")
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("Wrote 2 rows into out (0.1 s of sound, ")
    assert files(Path("out")) == ["audio/a.wav", "audio/b.wav", "errors.jsonl", "manifest.jsonl"]
    result = run("render", "job.jsonl", "out", "--json")
    data = json.loads(result.stdout)
    counts = {name: data[name] for name in ("command", "ok", "output", "rows", "done", "made", "skipped", "errors", "left")}
    assert counts == {
        **{
            "command": "render",
            "ok": True,
            "output": "out",
            "rows": 2,
            "done": 2,
            "made": 0,
            "skipped": 2,
            "errors": 0,
            "left": 0,
        }
    }


def test_options_are_the_defaults_of_rows(spoken):
    options = (
        "--voice minna --voice otto --temperature 0.5 --top-k 7 --max-frames 9 --speed 2 --format flac --batch 4 --threads 2"
    )
    assert run("render", write({"text": "One."}), "out", "--system", "Be kind.", *options.split()).exit_code == 0
    (worker,) = spoken.workers
    assert (worker.batch, spoken.loads) == (4, [(None, {"provider": "auto", "threads": 2})])
    (entry,) = lines(Path("out/manifest.jsonl"))
    assert entry["audio"].endswith(".flac")
    for change in (["--temperature", "0.6"], ["--batch", "1"], ["--voice", "otto"]):
        assert run("render", "job.jsonl", "out", "--system", "Be kind.", *options.split(), *change).exit_code == 0
        (again,) = lines(Path("out/manifest.jsonl"))
        assert again["digest"] != entry["digest"], change


def test_bad_rows_end_with_status_1(spoken):
    rows = [{"id": f"r{n}", "text": "fail"} for n in range(7)]
    result = run("render", write({"id": "ok", "text": "One."}, *rows, {"txt": "x"}), "out", "--json")
    data = json.loads(refused(result, kind=1) and result.stdout)
    assert (data["ok"], data["done"], data["errors"]) == (False, 1, 8)
    assert data["error"]["message"] == "8 of 9 rows have no result"
    assert "out/errors.jsonl" in data["error"]["hint"]
    assert len(data["warnings"]) == 6
    assert data["warnings"][-1] == "and 3 more such warnings; out/errors.jsonl lists all errors"


def test_inputs(spoken):
    Path("a.csv").write_text("text\nOne.\nTwo.\n")
    Path("a.txt").write_text("One.\nTwo.\nThree.\n")
    assert run("render", "a.csv", "out").stderr.startswith("Wrote 2 rows")
    assert run("render", "a.txt", "out").stderr.startswith("Wrote 1 rows into out")
    assert run("render", "-", "out", "--input-format", "text", stdin="Four.\n").stderr.startswith("Wrote 1 rows")
    assert run("render", "-", "out", stdin='{"text": "Four."}').exit_code == 0
    result = run("render", "-", "out", stdin="\n")
    assert (result.exit_code, result.stderr.splitlines()[0]) == (0, "warning: there are no rows")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["gone.jsonl", "out"], "gone.jsonl cannot be read"),
        (["job.jsonl", "no/out"], "there is no folder"),
        (["job.jsonl", "job.jsonl"], "it is not a folder"),
        (["job.jsonl", "out", "--shard", "3/2"], "give i/n"),
        (["job.jsonl", "out", "--batch", "0"], "batch"),
        (["job.jsonl", "out", "--format", "aac"], "aac"),
    ],
)
def test_mistakes_end_with_status_2(spoken, arguments, words):
    write({"text": "One."})
    refused(run("render", *arguments), words)


def test_what_stops_a_run_ends_with_status_2(spoken, monkeypatch):
    def compute(self, payload):
        raise BundleError("the bundle is damaged")

    monkeypatch.setattr(FakeVoice, "compute", compute)
    refused(run("render", write({"text": "One."}), "out"), "the bundle is damaged")


def test_shards_and_limits(spoken):
    job = write(*({"id": f"r{n}", "text": f"Line {n}."} for n in range(5)))
    assert run("render", job, "out", "--shard", "1/2", "--limit", "1").stderr.endswith(
        "; 2 are left, and the same command goes on\n"
    )
    assert run("render", job, "out", "--shard", "2/2").exit_code == 0
    data = json.loads(run("render", job, "out", "--json").stdout)
    assert (data["made"], data["skipped"]) == (2, 3)
    assert files(Path("out")) == [*(f"audio/r{n}.wav" for n in range(5)), "errors.jsonl", "manifest.jsonl"]


# --- with the embedded voice ---------------------------------------------------------------------------------------------------

ROWS = [
    {"id": "plain", "text": "Good morning."},
    {"id": "own", "text": "How are you? I am fine.", "voice": "slt", "seed": 3, "temperature": 0.5, "top_k": 20},
    {"id": "cut", "text": "This is cut off.", "max_frames": 9},
    {"id": "two", "turns": [{"voice": "awb", "text": "Hello."}, {"voice": "slt", "text": "Hello."}]},
]


def samples(path: Path) -> np.ndarray:
    return soundfile.read(path, dtype="int16")[0].astype(int)


@pytest.mark.parametrize("batch", [1, 3])
def test_rows_equal_the_speech_of_speak(tmp_path, batch):
    """In a batch the codes of minnow are the same, and the last bits may differ."""
    with TTS.load(provider="cpu", threads=1) as tts:
        report = render(tts, ROWS, tmp_path, batch=batch)
        assert (report.made, report.errors) == (4, 0), (tmp_path / "errors.jsonl").read_text()
        entries = {entry["id"]: entry for entry in lines(tmp_path / "manifest.jsonl")}
        requests = {
            "plain": Request("Good morning."),
            "own": Request("How are you? I am fine.", ["slt"], Sampling(0.5, top_k=20)),
            "cut": Request("This is cut off.", max_frames=9),
            "two": Request("<|speaker:0|>Hello.\n<|speaker:1|>Hello.", ["awb", "slt"]),
        }
        for id, request in requests.items():
            speech = tts.speak(request, seed=entries[id]["seed"])
            speech.save(tmp_path / "speech.wav")
            expected, got = samples(tmp_path / "speech.wav"), samples(tmp_path / entries[id]["audio"])
            assert len(got) == len(expected)
            assert np.abs(got - expected).max() <= (0 if batch == 1 else 1), id
            assert entries[id]["stop"] == list(dict.fromkeys(speech.info.stop_reasons))
            assert entries[id]["seconds"] == round(speech.duration_s, 3)
        assert entries["own"]["seed"] == 3
        assert entries["cut"]["stop"] == ["max_frames"]
        assert render(tts, ROWS, tmp_path, batch=batch).skipped == 4


def test_a_reference_is_imitated_as_speak_does(tmp_path):
    recording = Path(__file__).parents[2] / "export/minnow/references/awb/reference.flac"
    words = recording.with_suffix(".lab").read_text(encoding="utf-8").strip()
    (tmp_path / "me.flac").write_bytes(recording.read_bytes())
    rows = [
        {"id": "a", "text": "Good morning.", "seed": 1, "references": [{"audio": "me.flac", "text": words}]},
        {"id": "b", "text": "Good morning.", "references": [{"audio": "me.flac"}]},
    ]
    with TTS.load(provider="cpu", threads=1) as tts:
        from fishrt.voices.voice import Voice

        report = render(tts, rows, tmp_path / "out", base=tmp_path)
        speech = tts.speak("Good morning.", voice=Voice.from_audio(tts, tmp_path / "me.flac", words), seed=1)
    speech.save(tmp_path / "speech.wav")
    assert (samples(tmp_path / "out/audio/a.wav") == samples(tmp_path / "speech.wav")).all()
    assert report.errors == 1
    assert "transcript" in lines(tmp_path / "out/errors.jsonl")[0]["error"]


def test_a_diffusion_model_speaks_rows_as_speak_does(tmp_path):
    rows = [{"id": "a", "text": "Good morning.", "seed": 3}, {"id": "b", "text": "Hello.", "temperature": 0.5}]
    tts, settings = diffusion_tts(tmp_path / "bundle"), Denoising(steps=3)
    report = render(tts, rows, tmp_path / "out", defaults=Request("", denoising=settings))
    assert (report.made, report.errors) == (1, 1)
    assert "for language models" in lines(tmp_path / "out/errors.jsonl")[0]["error"]
    tts.speak("Good morning.", seed=3, denoising=settings).save(tmp_path / "speech.wav")
    assert (samples(tmp_path / "out/audio/a.wav") == samples(tmp_path / "speech.wav")).all()
    again = render(tts, rows[:1], tmp_path / "out", defaults=Request("", denoising=Denoising(steps=2)))
    assert again.made == 1, "the settings are part of the digest"


def test_a_second_signal_ends_the_process_at_once():
    before = signal.getsignal(signal.SIGTERM)
    with _stopping() as stop:
        assert not stop()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop()
        assert signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_in_order(tmp_path, number):
    """The rows in work are dropped, those that are done stay, and the same command goes on."""
    job = tmp_path / "job.jsonl"
    job.write_text(
        "".join(json.dumps({"id": f"r{n}", "text": "The sun is shining, and the birds sing."}) + "\n" for n in range(200))
    )
    command = [sys.executable, "-m", "fishrt", "render", str(job), str(tmp_path / "out"), "--threads", "1", "--batch", "4"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        manifest, until = tmp_path / "out/manifest.jsonl", time.monotonic() + 60
        while not (manifest.is_file() and manifest.stat().st_size) and time.monotonic() < until:
            time.sleep(0.05)
        os.kill(process.pid, number)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    done = len(lines(manifest))
    assert said.splitlines()[-1] == f"{done} of 200 done; the same command goes on"
    assert 0 < done < 200
    assert [name for name in files(tmp_path / "out") if name.startswith("audio/")] == sorted(
        entry["audio"] for entry in lines(manifest)
    )
    assert (tmp_path / "out/errors.jsonl").read_bytes() == b""
