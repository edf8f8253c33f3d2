"""The lines of `fishrt render`: what each may say, where its file lies, and what its digest is made of."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import soundfile

from fake_render import FakeVoice, fake_tts, files, lines, rendered
from fishrt.bulk import places as places_module
from fishrt.bulk.places import file_name, places
from fishrt.bulk.render import RenderJob, Speakable, digest_of, same_in_batches
from fishrt.bulk.rows import NAMES, Line, content_id, read_lines
from fishrt.bundle.quantisation import LayerReport, Quantisation
from fishrt.errors import FishrtError
from fishrt.jobs.engine import BadRow, Row
from fishrt.language_model.sampling import Sampling
from fishrt.request import Request

BAD = {
    '{"text": "a", "temprature": 1}': "no field 'temprature'; did you mean temperature?",
    '{"text": "a", "zzz": 1}': "no field 'zzz'; known are text, id, voice",
    "[1]": r"the line is no object: \[1\]",
    "{": "not JSON",
    '{"id": "x"}': "needs a text, or turns",
    '{"text": 3}': "text is 3; a text is expected",
    '{"text": "a", "turns": [{"voice": "b", "text": "c"}]}': "a text and turns",
    '{"text": "a", "id": true}': "id is true",
    '{"text": "a", "id": 1.5}': "a text or a whole number",
    '{"text": "a", "id": " "}': "id is",
    '{"text": "a", "voice": []}': "a name, or a list of names",
    '{"text": "a", "seed": -1}': "a whole number of at least 0",
    '{"text": "a", "seed": 1.0}': "a whole number of at least 0",
    '{"text": "a", "top_k": 0}': "a whole number of at least 1",
    '{"text": "a", "top_p": "1"}': "a number is expected",
    '{"text": "a", "top_p": true}': "a number is expected",
    '{"text": "a", "format": "aac"}': "one of wav, flac, ogg, mp3",
    '{"text": "a", "references": [{"text": "b"}]}': "a list of",
    '{"turns": [{"text": "b"}]}': "a list of",
    '{"turns": [{"voice": "a", "text": "b"}, {"speaker": 0, "text": "b"}]}': "a list of",
    '{"turns": []}': "a list of",
    '{"turns": [{"speaker": -1, "text": "b"}]}': "a list of",
    '{"text": "\\ud800"}': "half of a surrogate pair",
    '{"text": "a", "temperature": 3}': "temperature",
    '{"text": "a", "temperature": NaN}': "temperature",
    '{"text": "a", "speed": 9}': "speed is 9",
    '{"text": "a", "voice": "nobody"}': "no voice 'nobody'",
    '{"text": "a", "references": [{"audio": "gone.wav"}]}': "gone.wav cannot be read",
    '{"text": "a", "references": [{"audio": "/dev/zero"}]}': "/dev/zero cannot be read: not a regular file",
    '{"text": "a", "references": [{"audio": "a\\u0000b"}]}': "cannot be read: embedded null byte",
    '{"text": "a", "seed": ' + "1" * 5000 + "}": "a number is too long",
    "[" * 100_000: "too deep",
}


@pytest.mark.parametrize("line", BAD, ids=lambda line: line[:40])
def test_a_bad_line_is_an_error_of_its_own(tmp_path, line):
    report = rendered(b'{"text": "First."}\n' + line.encode() + b'\n{"text": "Last."}', tmp_path)
    assert (report.made, report.errors) == (2, 1)
    (error,) = lines(tmp_path / "errors.jsonl")
    assert error["line"] == 2
    assert re.search(BAD[line], error["error"]), error


def test_a_line_that_is_not_utf8(tmp_path):
    assert rendered(b'{"text": "a"}\n\xff\xfe\n{"text": "b"}', tmp_path).made == 2
    assert "not UTF-8" in lines(tmp_path / "errors.jsonl")[0]["error"]


def test_blank_lines_and_marks_of_byte_order_are_no_rows(tmp_path):
    assert rendered(b'\xef\xbb\xbf\n{"text": "a"}\r\n  \n{"text": "b", "seed": null}\n', tmp_path).rows == 2
    assert [entry["line"] for entry in lines(tmp_path / "manifest.jsonl")] == [2, 4]
    assert rendered(b"\n", tmp_path / "none").rows == 0


def rows(data: bytes | list[dict], out: Path = Path("none"), **job) -> list[Row | BadRow]:
    data = data if isinstance(data, bytes) else b"\n".join(json.dumps(row).encode() for row in data)
    settings = {"kind": "jsonl", "base": Path(), "defaults": Request(""), "format": "wav", "batch": 1, **job}
    made = RenderJob(settings.pop("tts", None) or fake_tts(), data, settings.pop("kind"), out, **settings)
    return list(made.rows({}))


def test_what_a_row_asks_for():
    given = {"temperature": 0.5, "top_p": 0.6, "top_k": 7, "repetition_penalty": None, "max_frames": 9, "system": "Be kind."}
    (row,) = rows([{"id": 7, "text": "Hi.", "voice": ["a", "b"], "seed": 3, "speed": 2, "format": "mp3", **given}])
    assert (row.id, row.target, row.size) == ("7", "audio/7.mp3", 3)
    expected = Request("Hi.", ["a", "b"], Sampling(0.5, 0.6, 7), 3, max_frames=9, system="Be kind.", speed=2)
    assert row.payload == Speakable(expected, (), "mp3", row.digest)


def test_options_are_for_rows_that_say_nothing_else():
    usual = Request("", ["a"], Sampling(0.5, top_k=3), max_frames=9, system="s", speed=2.0)
    plain, own = rows([{"text": "x"}, {"text": "x", "voice": "b", "top_k": 4, "speed": 1, "max_frames": 2}], defaults=usual)
    assert plain.payload.request == replace(usual, text="x", seed=plain.payload.request.seed)
    request = own.payload.request
    assert (request.voice, request.sampling, request.speed, request.max_frames) == (["b"], Sampling(0.5, top_k=4), 1, 2)


def test_a_row_without_a_seed_has_that_of_its_id():
    first, again, other = rows([{"id": "a", "text": "x"}, {"id": "a", "text": "y"}, {"id": "b", "text": "x"}])
    seeds = [row.payload.request.seed for row in (first, again, other)]
    assert seeds[0] == seeds[1] != seeds[2]
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_ids_come_from_the_content_of_a_row():
    ids = {content_id(Line(**row)) for row in ({"text": "a"}, {"text": "b"}, {"text": "a", "seed": 1}, {"text": "a", "seed": 0})}
    assert len(ids) == 4
    assert all(re.fullmatch("[0-9a-f]{16}", id) for id in ids)
    assert content_id(Line(text="a", id="x")) == content_id(Line(text="a"))


def test_dialogues():
    by_voice, by_speaker = rows(
        [
            {"turns": [{"voice": "a", "text": "One."}, {"voice": "b", "text": "Two."}, {"voice": "a", "text": "Three."}]},
            {"voice": ["a", "b"], "turns": [{"speaker": 0, "text": "One."}, {"speaker": 1, "text": "Two."}]},
        ]
    )
    assert by_voice.payload.request.text == "<|speaker:0|>One.\n<|speaker:1|>Two.\n<|speaker:0|>Three."
    assert by_voice.payload.request.voice == ["a", "b"]
    assert by_speaker.payload.request.text == "<|speaker:0|>One.\n<|speaker:1|>Two."
    (bad,) = rows([{"voice": "a", "turns": [{"voice": "a", "text": "One."}]}])
    assert "give one" in bad.error


def test_references_are_relative_to_the_job(tmp_path):
    (tmp_path / "me.wav").write_bytes(b"one")
    line = {"text": "x", "references": [{"audio": "me.wav", "text": "Words."}]}
    (row,) = rows([line], base=tmp_path, defaults=Request("", ["a"]))
    assert row.payload.references == ((tmp_path / "me.wav", "Words."),)
    assert row.payload.request.voice is None, "a voice of the options does not speak, too"
    (tmp_path / "me.wav").write_bytes(b"two")
    assert rows([line], base=tmp_path)[0].digest != row.digest


CHANGES = [
    {"text": "y"},
    {"seed": 2},
    {"voice": "b"},
    {"voice": ["a", "a"]},
    {"temperature": 0.5},
    {"top_p": 0.5},
    {"top_k": 3},
    {"max_frames": 3},
    {"system": "s"},
    {"speed": 2},
    {"format": "flac"},
]


def test_the_digest_is_made_of_all_that_decides_the_sound():
    base = {"id": "a", "text": "x", "seed": 1, "voice": "a"}
    digests = [rows([{**base, **change}])[0].digest for change in ({}, *CHANGES)]
    other = fake_tts()
    other.bundle_sha256 = "01"
    elsewhere = fake_tts()
    elsewhere.provider = "cuda"
    digests += [rows([base], tts=tts)[0].digest for tts in (other, elsewhere)]
    digests.append(rows([base], batch=2)[0].digest)
    assert len(set(digests)) == len(digests)
    assert all(re.fullmatch("[0-9a-f]{32}", digest) for digest in digests)
    (plain,) = rows([base], format="flac", defaults=Request("", "b", speed=2.0))
    assert plain.digest == rows([{**base, "format": "flac", "speed": 2.0}])[0].digest, "it is that of the resolved row"


def test_every_field_is_known_and_described():
    page = (Path(__file__).parents[2] / "docs/render.md").read_text(encoding="utf-8")
    assert [name for name in NAMES if f"`{name}`" not in page] == []


# --- other inputs --------------------------------------------------------------------------------------------------------------


def test_a_table(tmp_path):
    table = (
        'id,text,voice,seed,temperature\na,"One, two.",slt,3,\n,"Three\nlines\nhere.",,,0.5\n'
        '\nb,\xe9,"[""a"", ""b""]",,\nc,x,,y,\nd,x,,,,,\n'
    )
    report = rendered(table.encode(), tmp_path, job={"kind": "csv"})
    assert (report.made, report.errors) == (3, 2)
    entries = lines(tmp_path / "manifest.jsonl")
    assert [(entry["line"], entry["seed"]) for entry in entries[:1]] == [(2, 3)]
    assert [entry["line"] for entry in entries] == [2, 3, 7]
    assert [(each["line"], each["error"]) for each in lines(tmp_path / "errors.jsonl")] == [
        (8, "seed is 'y'; a number is expected"),
        (9, "the line has 7 cells, and the table 5 columns"),
    ]
    assert rows(b"id,text\na,\xff\nb,y", kind="csv")[0].error == "the line is not UTF-8"


@pytest.mark.parametrize(
    ("table", "words"),
    [(b"txt\nx", "no column 'txt'"), (b"id\nx", "no column text"), (b"text,text\nx,y", "have one name")],
)
def test_a_table_whose_columns_are_wrong_ends_the_run(tmp_path, table, words):
    with pytest.raises(FishrtError, match=words):
        rendered(table, tmp_path, job={"kind": "csv"})


def test_lines_of_text(tmp_path):
    worker = FakeVoice()
    assert rendered("One.\n\n  Two. \r\nÜ".encode(), tmp_path, worker, job={"kind": "text"}).made == 3
    assert sorted(worker.said) == ["One.", "Two.", "Ü"]
    assert [entry["line"] for entry in lines(tmp_path / "manifest.jsonl")] == [1, 3, 4]
    assert [number for number, _ in read_lines(b"a\nb", "text")] == [1, 2]


# --- places --------------------------------------------------------------------------------------------------------------------


def test_names_of_files():
    assert [file_name(id) for id in ("a", "0_b-c", "a" * 100)] == ["a", "0_b-c", "a" * 100]
    odd = ["A", "a.b", "a b", "../x", "/", "ü", "con", "com1", "a" * 101, "-a", "", "a\n", "語", "_"]
    names = [file_name(id) for id in odd]
    assert len({*names, "a", "x"}) == len(names) + 2
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,99}", name) for name in names), names
    assert names[3].startswith("x-")


def test_folders_are_not_too_full(tmp_path, monkeypatch):
    monkeypatch.setattr(places_module, "MOST_FILES", 4)
    assert places(tmp_path / "none", {"a", "b"}) == {"a": "a", "b": "b"}
    names = {f"{n}.wav" for n in range(5)}
    found = places(tmp_path, names)
    assert all(re.fullmatch(rf"[0-9a-f]{{2}}/{re.escape(name)}", place) for name, place in found.items())
    (tmp_path / "3.wav").touch()
    (tmp_path / found["1.wav"]).parent.mkdir()
    (tmp_path / found["1.wav"]).touch()
    assert places(tmp_path, {*names, "6.wav"}) == {
        **found,
        "3.wav": "3.wav",
        "6.wav": places(tmp_path, {"6.wav", *"abcd"})["6.wav"],
    }
    assert places(tmp_path, {"1.wav"}) == {"1.wav": found["1.wav"]}, "a file stays where it is"


def test_a_job_that_grows_moves_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(places_module, "MOST_FILES", 3)
    few = [{"id": f"r{n}", "text": "x"} for n in range(3)]
    rendered(few, tmp_path)
    report = rendered([*few, *({"id": f"s{n}", "text": "x"} for n in range(3))], tmp_path)
    assert (report.skipped, report.made) == (3, 3)
    assert sorted(Path(name).name for name in files(tmp_path) if name.startswith("audio/")) == [
        f"{c}{n}.wav" for c in "rs" for n in range(3)
    ]
    assert all((tmp_path / entry["audio"]).is_file() for entry in lines(tmp_path / "manifest.jsonl"))


# --- digests in files, batches -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["wav", "flac", "ogg", "mp3"])
def test_every_format_carries_the_digest(tmp_path, format):
    rendered([{"id": "a", "text": "x", "format": format}], tmp_path)
    (entry,) = lines(tmp_path / "manifest.jsonl")
    assert digest_of(tmp_path / entry["audio"]) == entry["digest"]
    (tmp_path / "manifest.jsonl").unlink()
    assert rendered([{"id": "a", "text": "x", "format": format}], tmp_path).skipped == 1
    (again,) = lines(tmp_path / "manifest.jsonl")
    assert (again["stop"], again["seed"], again["digest"]) == (entry["stop"], entry["seed"], entry["digest"])
    assert again["seconds"] == pytest.approx(entry["seconds"], abs=0.1)  # mp3 pads its end


def test_files_of_others_carry_none(tmp_path):
    soundfile.write(tmp_path / "a.wav", [0.0], 8000)
    with soundfile.SoundFile(tmp_path / "b.wav", "w", 8000, 1) as file:
        file.comment = "recorded by me"
        file.write([0.0])
    (tmp_path / "c.wav").write_bytes(b"x")
    (tmp_path / "d.wav").mkdir()
    assert [digest_of(tmp_path / f"{name}.wav") for name in "abcd"] == [None] * 4


def layer(name: str, precision: str, block: int | None = None) -> LayerReport:
    return LayerReport(name, precision, block, 0.0)


def test_which_bundles_give_the_same_in_a_batch():
    """Only where all products are in integers by rows: those of floats round by the size of a batch."""
    by_rows = [
        layer("slow_ar.embeddings", "fp16"),
        layer("slow_ar.layers.0.q", "int8-rows", 64),
        layer("fast_ar.output", "int8-rows", 64),
    ]
    head = layer("slow_ar.output", "int8-rows", 64)

    def same(*layers: LayerReport, provider: str = "cpu") -> bool:
        return same_in_batches(SimpleNamespace(quantisation=Quantisation(layers) if layers else None), provider)

    assert same(*by_rows, head)
    assert not same(*by_rows, head, provider="cuda")
    assert not same(*by_rows), "the table is the head, too: a product of floats"
    assert not same(*by_rows, head, layer("slow_ar.layers.1.q", "fp16"))
    assert not same(*by_rows, layer("slow_ar.output", "int8", 64))
    assert not same()
