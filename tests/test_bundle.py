"""Bundles that are not what they should be are refused, and the error says where."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fishrt.bundle import MANIFEST, SCHEMA, Bundle, Manifest
from fishrt.errors import BundleError
from helpers_text import bundle_folder, manifest, voice


def change(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = folder / MANIFEST
    data = json.loads(path.read_text(encoding="utf-8"))
    edit(data)
    path.write_text(json.dumps(data), encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    bundle_folder(tmp_path / "bundle", voices={"anna": voice()})
    return tmp_path / "bundle"


def test_round_trip() -> None:
    written = manifest()
    assert Manifest.from_json(written.to_json()) == written


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
        (lambda m: m["graphs"]["slow_ar"]["inputs"][0].update(colour="red"), r"inputs\[0\].*unknown.*colour"),
        (lambda m: m.pop("codec"), "lacks.*codec"),
        (lambda m: m["language_model"]["sampling"].pop("top_p"), r"language_model\.sampling lacks.*top_p"),
        (lambda m: m["codec"].update(hop="640"), r"manifest\.codec\.hop is '640'"),
        (lambda m: m["codec"].update(hop=640.5), r"manifest\.codec\.hop is 640\.5"),
        (lambda m: m["codec"].update(hop=True), r"manifest\.codec\.hop is True"),
        (lambda m: m["codec"].update(codebook_sizes=[160, None]), r"codebook_sizes\[1\]"),
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


def test_a_manifest_that_is_not_text(folder: Path) -> None:
    (folder / MANIFEST).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BundleError, match="cannot be read"):
        Bundle.load(folder)


def test_a_folder_that_is_no_bundle(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(BundleError, match="is not a bundle"):
            Bundle.load(path)


@pytest.mark.parametrize("name", ["tokenizer.json", "slow_ar.onnx", "voices/anna/codes.npy"])
def test_a_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(BundleError, match=f"{name} is missing"):
        Bundle.load(folder)


def test_a_file_of_another_size(folder: Path) -> None:
    with (folder / "slow_ar.onnx").open("ab") as file:
        file.write(b"x")
    with pytest.raises(BundleError, match=r"slow_ar\.onnx has 12 bytes instead of 11"):
        Bundle.load(folder)


def test_an_altered_file_of_the_same_size_is_found_by_its_hash(folder: Path) -> None:
    (folder / "slow_ar.onnx").write_bytes(b"not a grape")
    bundle = Bundle.load(folder)
    with pytest.raises(BundleError, match=r"slow_ar\.onnx was altered"):
        bundle.verify()


def test_a_graph_that_is_not_listed(folder: Path) -> None:
    change(folder, lambda m: m["files"].pop("slow_ar.onnx"))
    with pytest.raises(BundleError, match=r"slow_ar\.onnx"):
        Bundle.load(folder)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", ""])
def test_a_name_that_leads_out_of_the_folder(folder: Path, name: str) -> None:
    change(folder, lambda m: m["files"].update({name: {"bytes": 1, "sha256": "0"}}))
    with pytest.raises(BundleError, match="outside the bundle"):
        Bundle.load(folder)
