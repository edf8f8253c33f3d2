"""`fishrt codec encode FOLDER OUT`: recordings become codes, in upstream's layout, as a job."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

import helpers_cli
from fake_render import files, lines
from helpers_cli import HOP, RATE, refused, run, tone

fake = helpers_cli.fake


@pytest.fixture
def folder(fake, monkeypatch) -> Path:
    """Recordings of two speakers, one without its words, beside bad ones; `fake.encoded` counts what is encoded."""
    root = Path("in")
    for name, seconds in (("A/1.5-2.0", 1.0), ("A/2", 0.5), ("B/1", 0.4)):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(f"{root / name}.wav", tone(seconds), RATE)
        Path(f"{root / name}.lab").write_text(f"Words of {name}.")
    (root / "A/2.lab").unlink()
    (root / "notes.txt").write_text("no audio")
    (root / ".hidden.wav").write_text("no audio")
    encode = fake.encode

    def counted(pcm, rate):
        fake.encoded.append(len(pcm))
        return encode(pcm, rate)

    fake.encoded = []
    monkeypatch.setattr(fake, "encode", counted)
    return root


CODES = ["A/1.5-2.0.npy", "A/2.npy", "B/1.npy"]


def test_a_folder_becomes_the_same_tree_of_codes(fake, folder):
    result = run("codec", "encode", folder, "out")
    assert result.exit_code == 0, result.output
    assert result.stderr.splitlines()[0] == "warning: line 2: in/A/2.wav has no transcript: .lab beside it"
    assert files(Path("out")) == sorted([*CODES, "A/1.5-2.0.lab", "B/1.lab", "errors.jsonl", "manifest.jsonl"])
    codes = np.load("out/A/1.5-2.0.npy")
    assert (codes.dtype, codes.shape) == (np.int64, (4, -(-RATE // HOP)))
    assert Path("out/B/1.lab").read_text() == "Words of B/1."
    entries = lines(Path("out/manifest.jsonl"))
    assert [(entry["id"], entry["line"], entry["codes"], entry["seconds"]) for entry in entries] == [
        ("A/1.5-2.0", 1, "A/1.5-2.0.npy", 1.0),
        ("A/2", 2, "A/2.npy", 0.5),
        ("B/1", 3, "B/1.npy", 0.4),
    ]
    assert all(len(entry["source"]["sha256"]) == 64 for entry in entries)


def test_only_what_changed_is_encoded_again(fake, folder):
    run("codec", "encode", folder, "out")
    data = json.loads(run("codec", "encode", folder, "out", "--json").stdout)
    assert (data["skipped"], data["made"], len(fake.encoded)) == (3, 0, 3)
    soundfile.write(folder / "B/1.wav", tone(0.6), RATE)
    (folder / "A/2.lab").write_text("Words.")
    Path("out/A/1.5-2.0.npy").unlink()
    assert json.loads(run("codec", "encode", folder, "out", "--json").stdout)["made"] == 3
    assert Path("out/A/2.lab").read_text() == "Words."
    Path("out/manifest.jsonl").unlink()
    assert json.loads(run("codec", "encode", folder, "out", "--json").stdout)["made"] == 3, "codes have no place for a digest"


def test_codes_may_lie_beside_the_recordings(fake, folder):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.lab")}
    assert run("codec", "encode", folder, folder).exit_code == 0
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*.npy")) == CODES
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.lab")} == before
    assert json.loads(run("codec", "encode", folder, folder, "--json").stdout)["skipped"] == 3


def test_bad_recordings_stop_no_other(fake, folder):
    (folder / "C.wav").write_bytes(b"RIFF no audio")
    soundfile.write(folder / "A/2.flac", tone(0.5), RATE)
    soundfile.write(folder / "silent.wav", np.zeros(RATE, np.float32), RATE)
    soundfile.write(folder / "long.wav", tone(fake.bundle.manifest.codec.max_frames * HOP / RATE + 1), RATE)
    refused(run("codec", "encode", folder, "out"), "4 of 7 rows have no result", kind=1)
    errors = {entry["id"]: entry["error"] for entry in lines(Path("out/errors.jsonl"))}
    assert errors["A/2"].startswith("line 2 has the id 'A/2' with other content"), "of two, the later"
    assert ("not audio" in errors["C"], "silent" in errors["silent"], "too long" in errors["long"]) == (True, True, True)
    assert [name for name in files(Path("out")) if name.endswith(".npy")] == sorted([CODES[0], "A/2.npy", CODES[2]])


def test_links_that_lead_out_are_not_followed(fake, folder, tmp_path):
    (tmp_path / "other").mkdir()
    soundfile.write(tmp_path / "other/x.wav", tone(0.5), RATE)
    (folder / "linked").symlink_to(tmp_path / "other")
    (folder / "x.wav").symlink_to(tmp_path / "other/x.wav")
    (folder / "again.wav").symlink_to("B/1.wav")
    run("codec", "encode", folder, "out")
    assert [name for name in files(Path("out")) if name.endswith(".npy")] == sorted([*CODES, "again.npy"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["in"], "give OUT"),
        (["in", "out", "-o", "a.npy"], "no -o"),
        (["in/A/2.wav", "out"], "OUT is for a folder"),
        (["in", "no/out"], "there is no folder"),
    ],
)
def test_mistakes(fake, folder, arguments, words):
    refused(run("codec", "encode", *arguments), words)
