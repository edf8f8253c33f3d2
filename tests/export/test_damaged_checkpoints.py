"""Files of a checkpoint that are damaged, missing or of something else: an error names the file, or lists all faults at once."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from test_checkpoint import NESTED, assert_same_weights, open_flat

import synthetic
from fishrt_export.checkpoint.files import read_tensors, read_weights
from fishrt_export.checkpoint.forms.folder import Checkpoint
from fishrt_export.checkpoint.weights import raise_if_any
from fishrt_export.errors import ExportError
from fishrt_export.options import Lora
from fishrt_export.sources.language_model import open_language_model
from synthetic import EVERYTHING, PLAIN, random_weights, write_flat, write_nested


def test_everything_that_does_not_fit_is_listed_at_once(tmp_path: Path) -> None:
    weights = random_weights(EVERYTHING)
    del weights["layers.0.attention.q_norm.weight"], weights["fast_norm.weight"]
    weights["layers.7.stray"] = torch.zeros(2, 3)
    weights["norm.weight"] = torch.zeros(99)
    weights["fast_output.weight"] = torch.zeros(weights["fast_output.weight"].shape, dtype=torch.int8)
    weights["embeddings.weight"][3, 4] = float("nan")
    weights["layers.1.ffn_norm.weight"][0] = float("inf")
    problems = open_flat(write_flat(tmp_path, EVERYTHING, weights)).problems()
    expected = (
        "missing: layers.0.attention.q_norm.weight [6]",
        "missing: fast_norm.weight [10]",
        "unexpected: layers.7.stray [2, 3]",
        "wrong shape: norm.weight is [99], expected [16]",
        "wrong type: fast_output.weight holds torch.int8; expected bfloat16, float16 or float32",
        "not finite: embeddings.weight holds NaN or infinity",
        "not finite: layers.1.ffn_norm.weight holds NaN or infinity",
    )
    assert sorted(problems) == sorted(expected)


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ExportError, match=r"config.json, weights \(.*\), a tokenizer \(tokenizer.json or tokenizer.tiktoken\)"):
        Checkpoint.of(tmp_path).language_model()
    with pytest.raises(ExportError, match=r"codec\.pth"):
        Checkpoint.of(tmp_path).codec_files()
    with pytest.raises(ExportError, match="does not exist"):
        Checkpoint.of(tmp_path / "absent")
    with pytest.raises(ExportError, match=r"lacks config\.json, a tokenizer"):
        Checkpoint.of(tmp_path / "notes.txt").language_model()


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "model.safetensors", "model.pth", "model.safetensors.index.json"]
)
@pytest.mark.parametrize("keep", [0, 0.5, 0.98])
def test_a_truncated_file(tmp_path: Path, name: str, keep: float) -> None:
    weights = random_weights(EVERYTHING)
    if name == "model.pth":
        write_flat(tmp_path, EVERYTHING, weights)
    else:
        write_nested(tmp_path, EVERYTHING, weights, shards=2 if "index" in name else 0)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: int(keep * len(content))])
    with pytest.raises(ExportError, match=name):
        open_language_model(tmp_path)


def whole_module(path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), path)


def whole_module_of_old(path: Path) -> None:
    torch.save({"state_dict": {}, "network": torch.nn.Linear(2, 2)}, path, _use_new_zipfile_serialization=False)


def program(path: Path) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save(path)  # type: ignore[no-untyped-call]


def cut_pickle(path: Path) -> None:
    torch.save({"embeddings.weight": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:-200])


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1275\n"
PAGE = b"\n<!DOCTYPE html>\n<html><head><title>Log in</title></head></html>"
REFUSAL = b'{"error": "Access to this model is restricted"}'
STAND_INS: dict[str, tuple[Any, str]] = {
    "pointer": (POINTER, "is a git-lfs pointer, not the file itself"),
    "web page": (PAGE, "is a web page, not the file itself"),
    "web page with a mark": (b"\xef\xbb\xbf" + PAGE, "is a web page, not the file itself"),
    "nothing": (b"", "cannot be read: it is empty"),
}
NOT_JSON: dict[str, tuple[Any, str]] = {
    **STAND_INS,
    "UTF-16": (b"\xff\xfe\x00nonsense", "is not UTF-8 and cannot be read"),
    "list": (b"[1, 2, 3]", "(is not valid: it holds no JSON object|cannot be read)"),
    "null": (b"null", "(is not valid: it holds no JSON object|cannot be read)"),
}
NOT_WEIGHTS: dict[str, tuple[Any, str]] = {
    **STAND_INS,
    "message": (REFUSAL, "cannot be read: it is text, not weights: .*restricted"),
    "gguf": (b"GGUF\x03\x00\x00\x00" + bytes(40), "(GGUF file|not a safetensors file|holds no LoRA)"),
    "zeros": (bytes(4000), "is damaged"),
    "nonsense": (b"\xff\xfe\x00nonsense", "is damaged"),
    "module": (whole_module, r"holds Python objects \(torch\.nn\.modules\.linear\.Linear\)"),
    "old module": (whole_module_of_old, r"holds Python objects \(torch\.nn\.modules\.linear\.Linear\)"),
    "object": (lambda path: torch.save({"x": Path("y")}, path), r"holds Python objects \(pathlib"),
    "program": (program, "is a TorchScript program"),
    "cut pickle": (cut_pickle, "is damaged"),
    "other pickle": (lambda path: path.write_bytes(pickle.dumps({"x": [1]}, protocol=4)), "is damaged"),
    "header too large": (b"\xff" * 8 + b"{}", "is damaged"),
}


def put(path: Path, content: Any) -> None:
    if callable(content):
        content(path)
    else:
        path.write_bytes(content)


def refusal(folder: Path, **options: Any) -> str:
    """Return the message and the hint of an error, which contain no words of torch or of the system."""
    with pytest.raises(ExportError) as caught:
        open_language_model(folder, **options)
    text = f"{caught.value} {caught.value.hint}"
    assert not re.search("weights_only|arbitrary|unsafe|Errno|Rust|deserializ", text), text
    return text


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize(("content", "message"), NOT_WEIGHTS.values(), ids=NOT_WEIGHTS)
@pytest.mark.parametrize("name", ["model.pth", "model.safetensors", "model-00002-of-00002.safetensors", "lora.ckpt"])
def test_files_that_are_no_weights(tmp_path: Path, name: str, content: Any, message: str) -> None:
    write = write_flat if name in ("model.pth", "lora.ckpt") else write_nested
    write(tmp_path, NESTED, random_weights(NESTED), **({"shards": 2} if "-of-" in name else {}))
    put(tmp_path / name, content)
    lora = Lora(tmp_path / name, alpha=1) if name == "lora.ckpt" else None
    if name.endswith(".safetensors") and callable(content):
        message = "is damaged, or not a safetensors file"
    text = refusal(tmp_path, family="s2", lora=lora)
    assert re.search(rf"{re.escape(name)} .*{message}", text), text


@pytest.mark.parametrize(("content", "message"), NOT_JSON.values(), ids=NOT_JSON)
@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "model.safetensors.index.json", "fishrt.json", "tokenizer.tiktoken"]
)
def test_files_that_are_no_text_of_a_checkpoint(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    write_nested(tmp_path, NESTED, random_weights(NESTED), shards=2)
    if name == "tokenizer.tiktoken":
        (tmp_path / "tokenizer.json").unlink()
    (tmp_path / name).write_bytes(content)
    assert re.search(rf"{re.escape(name)}[ ,].*{message}", refusal(tmp_path, family="s1" if "tiktoken" in name else "s2"))


def test_byte_order_marks_are_passed_over(tmp_path: Path) -> None:
    """In every text file of a checkpoint; and a file in UTF-16 says so."""
    weights = random_weights(NESTED)
    write_nested(tmp_path, NESTED, weights, shards=2)
    before = open_language_model(tmp_path)
    sampling = {"temperature": 0.5, "top_p": 0.6, "top_k": None, "repetition_aware": None, "repetition_penalty": None}
    (tmp_path / "fishrt.json").write_text(json.dumps({"chunk_bytes": 99, "sampling": sampling}))
    texts = sorted(tmp_path.glob("*.json"))
    assert len(texts) == 4
    for path in texts:
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    source = open_language_model(tmp_path)
    assert_same_weights(source, weights)
    assert (source.config, source.ids, source.tokenizer) == (before.config, before.ids, before.tokenizer)
    assert source.family.chunk_bytes == 99
    (tmp_path / "config.json").write_text(json.dumps(synthetic.nested_config(NESTED)), encoding="utf-16")
    assert "config.json is not UTF-8" in refusal(tmp_path)
    assert "from UTF-16 to UTF-8" in refusal(tmp_path)


def test_a_long_list_of_problems_is_cut(tmp_path: Path) -> None:
    """Some of each kind, and the number of the others."""
    config = {**PLAIN, "n_layer": 9}
    problems = open_flat(write_flat(tmp_path, config, {**random_weights(PLAIN), "norm.weight": torch.zeros(9)})).problems()
    assert len(problems) > 40
    with pytest.raises(ExportError, match=rf"\({len(problems)} problems\)") as caught:
        raise_if_any(problems)
    lines = str(caught.value).splitlines()[1:]
    assert len(lines) <= 21
    assert "  wrong shape: norm.weight is [9], expected [16]" in lines
    assert lines[-1] == f"  and {len(problems) - len(lines) + 1} more"
    with pytest.raises(ExportError) as caught:
        raise_if_any(problems[:20])
    assert len(str(caught.value).splitlines()) == 21


@pytest.mark.parametrize("content", [torch.zeros(3), {}, [1], {"embeddings.weight": 3}, {7: torch.zeros(3)}])
def test_a_pickle_of_something_else(tmp_path: Path, content: Any) -> None:
    write_flat(tmp_path, PLAIN, content)
    with pytest.raises(ExportError, match=r"model\.pth holds"):
        open_flat(tmp_path)


def test_shards_that_do_not_belong_together(tmp_path: Path) -> None:
    write_nested(tmp_path, NESTED, random_weights(NESTED), shards=2)
    first, second = sorted(tmp_path.glob("*-of-*.safetensors"))
    index = tmp_path / "model.safetensors.index.json"
    kept = second.read_bytes()
    second.write_bytes(first.read_bytes())
    with pytest.raises(ExportError, match=f"{second.name} lacks tensors"):
        open_language_model(tmp_path)
    second.unlink()
    with pytest.raises(ExportError, match=f"lacks shards .*{second.name}"):
        open_language_model(tmp_path)
    second.write_bytes(kept)
    data = json.loads(index.read_text())
    data["weight_map"]["stray"] = "../outside.safetensors"
    index.write_text(json.dumps(data))
    with pytest.raises(ExportError, match="outside its folder"):
        open_language_model(tmp_path)


@pytest.mark.parametrize("length", [0x3C, 0x3C20])
def test_a_header_length_that_looks_like_a_web_page(tmp_path: Path, length: int) -> None:
    """The first bytes of a safetensors file are a number, which may begin with "<", or with a space before it."""
    table = json.dumps({"layers.a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, separators=(",", ":"))
    header = table.replace("layers.a", "a").ljust(length) if length < 100 else table.ljust(length)
    path = tmp_path / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + header.encode() + bytes(4))
    assert path.read_bytes().lstrip().startswith(b"<")
    assert [tensor.tolist() for tensor in read_tensors(path).values()] == [[0.0]]


def test_names_that_are_too_long(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"layers.a": "x" * 300}}), encoding="utf-8")
    for read in (lambda: read_weights(index), lambda: Checkpoint.of(Path("x" * 300))):
        with pytest.raises(ExportError, match="File name too long"):
            read()
