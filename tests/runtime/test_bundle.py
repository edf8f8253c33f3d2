"""Faulty bundles are refused, and the error names the place."""

from __future__ import annotations

import json
import typing
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fishrt.bundle import strict
from fishrt.bundle.folder import Bundle, embedded_bundle
from fishrt.bundle.manifest import MANIFEST, SCHEMA, Manifest
from fishrt.bundle.strict import AGAIN
from fishrt.errors import BundleError
from helpers_text import bundle_folder, manifest, voice


def change(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = folder / MANIFEST
    data = json.loads(path.read_text(encoding="utf-8"))
    edit(data)
    path.write_text(json.dumps(data), encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    bundle_folder(tmp_path / "bundle", voices=[voice()])
    return tmp_path / "bundle"


def test_round_trip() -> None:
    written = manifest()
    assert Manifest.from_json(written.to_json()) == written


def test_the_types_of_each_class_are_evaluated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """That takes longer than all the rest of reading a manifest, which has hundreds of objects of few classes."""
    evaluated: list[type] = []
    evaluate = typing.get_type_hints
    monkeypatch.setattr(typing, "get_type_hints", lambda kind: evaluated.append(kind) or evaluate(kind))
    strict._fields.cache_clear()
    Manifest.from_json((embedded_bundle() / MANIFEST).read_text(encoding="utf-8"))
    assert len(evaluated) == len(set(evaluated)) > 10


def test_a_whole_bundle_loads_and_verifies(folder: Path) -> None:
    read: list[int] = []
    bundle = Bundle.load(folder)
    bundle.verify(read.append)
    assert sum(read) == sum(entry.bytes for entry in bundle.manifest.files.values())


@pytest.mark.parametrize(
    ("edit", "where"),
    [
        (lambda m: m.update(colour="red"), "manifest.*unknown.*colour"),
        (lambda m: m["codec"].update(colour="red"), r"manifest\.codec.*unknown.*colour"),
        (lambda m: m["graphs"]["slow_ar"]["spec"]["inputs"][0].update(colour="red"), r"inputs\[0\].*unknown.*colour"),
        (lambda m: m.pop("codec"), "lacks.*codec"),
        (lambda m: m["model"]["sampling"].pop("top_p"), r"model\.sampling lacks.*top_p"),
        (lambda m: m["codec"].update(hop="640"), r"manifest\.codec\.hop is '640'"),
        (lambda m: m["codec"].update(hop=640.5), r"manifest\.codec\.hop is 640\.5"),
        (lambda m: m["codec"].update(hop=True), r"manifest\.codec\.hop is True"),
        (lambda m: m["codec"].update(codebook_sizes=[160, None]), r"codebook_sizes\[1\]"),
        (lambda m: m["codec"].update(codebook_sizes=160), r"codebook_sizes is 160"),
        (lambda m: m.update(licence=None), r"manifest\.licence is None"),
        (lambda m: m.update(graphs=[]), r"manifest\.graphs"),
        (lambda m: m.update(schema="1"), "no schema number"),
        (lambda m: m.pop("schema"), "no schema number"),
    ],
)
def test_the_manifest_is_strict(folder: Path, edit: Callable[[dict[str, Any]], object], where: str) -> None:
    change(folder, edit)
    with pytest.raises(BundleError, match=where):
        Bundle.load(folder)


def lm(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda m: m["model"].update(changes)


def codec(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda m: m["codec"].update(changes)


def defaults(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda m: m["model"]["sampling"].update(changes)


def form(of: str, role: str = "slow_ar", **changes: Any) -> Callable[[dict[str, Any]], object]:
    """Add a form to a role: of the graph of another one, with changes of its description."""

    def edit(m: dict[str, Any]) -> None:
        spec = {**m["graphs"][of]["spec"], "file": f"{role}_cpu.onnx", **changes}
        m["graphs"][role]["forms"] = [{"provider": "cpu", "spec": spec}]

    return edit


def tensors(*described: tuple[str, str, list[object]]) -> list[dict[str, Any]]:
    return [{"name": name, "dtype": dtype, "shape": shape} for name, dtype, shape in described]


COLUMN = tensors(("column", "int64", ["batch", 5]))
LOGITS = tensors(("logits", "float32", ["batch", 161]))

REPEATS = {"window": 10, "temperature": 1.0, "top_p": 0.9}


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        *[(lm(**{name: 0}), f"{name} is 0") for name in ("codebook_width", "max_seq_len", "vocab_size", "chunk_bytes")],
        *[(codec(**{name: -1}), f"{name} is -1") for name in ("hop", "sample_rate", "max_frames")],
        (codec(codebook_sizes=[160, 0, 160, 160]), r"codebook_sizes\[1\] is 0"),
        (codec(codebook_sizes=[160, 160]), "num_codebooks is 4, but there are 2"),
        (lm(head="half"), "head is 'half'"),
        (lm(prompt_dialect="morse"), "prompt_dialect is 'morse'"),
        (lm(semantic_begin_id=-1), "semantic ids are -1"),
        (lm(semantic_begin_id=500, semantic_end_id=499), "semantic ids are 500 to 499"),
        (lm(semantic_end_id=640), "to 640 in a vocabulary of 640"),
        (lm(end_id=640), "end_id is 640"),
        (lm(end_id=-1), "end_id is -1"),
        (lambda m: m["model"].update(end_id=m["model"]["semantic_begin_id"]), "one of the semantic ids"),
        (lm(code_offset=1), "code_offset is 1 where code 0 comes from main"),
        (lm(code_zero="fast", code_offset=1, fast_candidates=1), "leaves nothing above code_offset 1"),
        (lm(fast_candidates=161), "fast_candidates is 161, above codebook_width 160"),
        (lm(main_tokens="any"), "main_tokens is 'any', but the head"),
        (lm(history_window=0), "history_window is 0"),
        (lm(max_prompt=1024), "max_prompt is 1024, which leaves no room"),
        (lm(cleaning={"replace": {"": "x"}, "keep": None, "drop": [], "collapse": ""}), "replaces nothing by something"),
        (lm(cleaning={"replace": {}, "keep": [[9, 1]], "drop": [], "collapse": ""}), r"cleaning holds \[9, 1\]"),
        (codec(context={"left": -1, "ahead": 0}), "context is -1 and 0 frames"),
        (codec(context={"left": 400, "ahead": 100}), "but the graphs take 500"),
        (defaults(repetition_penalty={"penalty": 3.0, "window": 16, "main": "row"}), r"repetition_penalty is 3\.0"),
        (defaults(repetition_penalty={"penalty": 1.2, "window": 16, "main": "no"}), r"repetition_penalty\.main is 'no'"),
        (lambda m: m["graphs"].update(fast_ar=m["graphs"]["codec_encode"]), "logits of fast_ar is missing"),
        (lm(codebook_width=200), r"logits of fast_ar is \['batch', 160\], expected a second dimension of 200"),
        (lm(head="full"), r"logits of slow_ar is \['batch', 161\]"),
        (lm(num_codebooks=3), r"prompt of slow_ar is \['batch', 5, 'length'\], expected a second dimension of 4"),
        (codec(codebook_sizes=[160] * 5), r"codes of codec_encode .* of 5; codes of codec_decode"),
        (defaults(temperature=-1), r"sampling\.temperature is -1"),
        (defaults(top_p=1.5), r"sampling\.top_p is 1\.5"),
        (defaults(top_k=0), r"sampling\.top_k is 0"),
        (defaults(repetition_aware={**REPEATS, "window": 0}), r"repetition_aware\.window is 0"),
        (defaults(repetition_aware={**REPEATS, "top_p": 0}), r"repetition_aware\.top_p is 0"),
        (lambda m: m["graphs"].pop("fast_ar"), "the graphs are slow_ar, codec_encode, codec_decode; they must be"),
        (lambda m: m["graphs"].update(other=m["graphs"]["fast_ar"]), "codec_decode, other; they must be"),
        (lambda m: m["voices"].update(default="ben"), "default voice 'ben' is not among the voices"),
        (form("fast_ar"), ": logits of slow_ar_cpu.onnx are not as in slow_ar.onnx"),
        (form("codec_decode"), "codes, key_cache.0, logits, prompt of slow_ar_cpu.onnx are not as in slow_ar.onnx"),
        (form("slow_ar", states=[]), r"key_cache\.0, key_cache_out\.0 of slow_ar_cpu.onnx are not as in slow_ar.onnx"),
        (form("fast_ar", "fast_ar", inputs=[], outputs=COLUMN, states=[]), "logits of fast_ar_cpu.onnx are not as in"),
        (
            form("fast_ar", "fast_ar", inputs=LOGITS, outputs=tensors(("column", "int64", [1, 4])), states=[]),
            "column of fast_ar_cpu",
        ),
    ],
)
def test_values_that_cannot_be(folder: Path, edit: Callable[[dict[str, Any]], object], says: str) -> None:
    change(folder, edit)
    with pytest.raises(BundleError, match=says):
        Bundle.load(folder)


def test_all_that_is_wrong_is_told_at_once() -> None:
    good = manifest()
    good.check()
    bad = replace(good, codec=replace(good.codec, hop=0), model=replace(good.model, head="half", end_id=-5))
    with pytest.raises(BundleError, match=r"head is 'half'.*end_id is -5.*hop is 0"):
        bad.check()


def test_a_newer_schema_asks_for_an_update(folder: Path) -> None:
    change(folder, lambda m: m.update(schema=SCHEMA + 1, something_new={}))
    with pytest.raises(BundleError, match=str(SCHEMA + 1)) as caught:
        Bundle.load(folder)
    assert caught.value.hint == "update fishrt"


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00", '"text"'])
def test_a_manifest_that_is_none(folder: Path, text: str) -> None:
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    with pytest.raises(BundleError, match=MANIFEST):
        Bundle.load(folder)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"schema": ' + "9" * 5000 + "}"], ids=["nested", "digits"])
def test_json_that_python_refuses(folder: Path, text: str) -> None:
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    with pytest.raises(BundleError, match="is not JSON"):
        Bundle.load(folder)


@pytest.mark.parametrize("rate", [float("nan"), float("inf"), 10**400])
def test_numbers_that_are_not_finite(folder: Path, rate: float) -> None:
    change(folder, lambda m: m["model"]["sampling"].update(top_p=rate))
    with pytest.raises(BundleError, match=r"top_p is .*; expected float"):
        Bundle.load(folder)


def test_names_that_are_too_long(folder: Path) -> None:
    with pytest.raises(BundleError, match="cannot be read: File name too long"):
        Bundle.load("x" * 300)
    change(folder, lambda m: m["files"].update({"x" * 300: {"bytes": 1, "sha256": ""}}))
    with pytest.raises(BundleError, match="is missing"):
        Bundle.load(folder)


def test_a_manifest_with_a_byte_order_mark(folder: Path) -> None:
    manifest = Bundle.load(folder).manifest
    path = folder / "manifest.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert Bundle.load(folder).manifest == manifest


def test_a_manifest_that_is_not_text(folder: Path) -> None:
    (folder / MANIFEST).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BundleError, match=r"manifest\.json is not UTF-8"):
        Bundle.load(folder)


def test_a_path_that_is_no_bundle(tmp_path: Path) -> None:
    """The error has no text of Python's exceptions, and a hint."""
    checkpoint, file = tmp_path / "my checkpoint", tmp_path / "file"
    checkpoint.mkdir()
    (checkpoint / "config.json").touch()
    file.touch()
    for path, says, hint in (
        (tmp_path, "is not a bundle: it has no manifest.json", "the folder that `fishrt export` wrote"),
        (tmp_path / "absent", "absent does not exist", "hf:OWNER/NAME"),
        (file, "is a file, not a bundle", "the folder"),
        (checkpoint, "is a checkpoint, not a bundle", f"first: fishrt export '{checkpoint}' BUNDLE"),
    ):
        with pytest.raises(BundleError, match=says) as caught:
            Bundle.load(path)
        assert hint in str(caught.value.hint)
        assert "Errno" not in str(caught.value)


def test_a_bundle_of_the_schema_before_names_the_command_that_mends_it(folder: Path) -> None:
    change(folder, lambda m: m.update(schema=SCHEMA - 1))
    with pytest.raises(BundleError, match=f"has schema {SCHEMA - 1}") as caught:
        Bundle.load(folder)
    assert "`fishrt retarget BUNDLE --target cpu`" in str(caught.value.hint)


def test_an_identity_that_is_not_that_of_the_files(folder: Path) -> None:
    change(folder, lambda m: m["graphs"]["fast_ar"]["spec"].update(identity="0" * 64))
    with pytest.raises(BundleError, match="identities of graphs are not those of their files"):
        Bundle.load(folder).verify()


@pytest.mark.parametrize("name", ["tokenizer.json", "slow_ar.onnx", "voices/anna/codes.npy"])
def test_a_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(BundleError, match=f"{name} is missing") as caught:
        Bundle.load(folder)
    assert caught.value.hint == AGAIN


def test_a_file_of_another_size(folder: Path) -> None:
    with (folder / "slow_ar.onnx").open("ab") as file:
        file.write(b"x")
    with pytest.raises(BundleError, match=r"slow_ar\.onnx has 12 bytes instead of 11") as caught:
        Bundle.load(folder)
    assert caught.value.hint == AGAIN


def test_an_altered_file_of_the_same_size_is_found_by_its_hash(folder: Path) -> None:
    (folder / "slow_ar.onnx").write_bytes(b"not a grape")
    bundle = Bundle.load(folder)
    with pytest.raises(BundleError, match=r"slow_ar\.onnx was altered") as caught:
        bundle.verify()
    assert caught.value.hint == AGAIN


def test_a_graph_that_is_not_listed(folder: Path) -> None:
    change(folder, lambda m: m["files"].pop("slow_ar.onnx"))
    with pytest.raises(BundleError, match=r"slow_ar\.onnx") as caught:
        Bundle.load(folder)
    assert caught.value.hint == AGAIN


@pytest.mark.parametrize("name", ["old.onnx", "more/slow_ar.onnx", "slow_ar.onnx.data", "other.onnx.data"])
def test_a_graph_or_weights_that_the_manifest_does_not_list(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"weights from elsewhere")
    with pytest.raises(BundleError, match=f"does not list: {name}"):
        Bundle.load(folder)


def test_weights_of_a_graph_by_another_name(folder: Path) -> None:
    (folder / "slow_ar.onnx").rename(folder / "slow.graph")
    change(folder, lambda m: m["files"].update({"slow.graph": m["files"].pop("slow_ar.onnx")}))
    change(folder, lambda m: m["graphs"]["slow_ar"]["spec"].update(file="slow.graph"))
    Bundle.load(folder)
    (folder / "notes.txt").write_text("Other files may lie there.")
    Bundle.load(folder)
    (folder / "slow.graph.data").write_bytes(b"weights from elsewhere")
    with pytest.raises(BundleError, match=r"does not list: slow\.graph\.data"):
        Bundle.load(folder)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", ""])
def test_a_name_that_leads_out_of_the_folder(folder: Path, name: str) -> None:
    change(folder, lambda m: m["files"].update({name: {"bytes": 1, "sha256": "0"}}))
    with pytest.raises(BundleError, match="outside the bundle"):
        Bundle.load(folder)
