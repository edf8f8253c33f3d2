"""Every form of a checkpoint is read to the same weights; an error lists all faults at once."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import synthetic
from fishrt_export.checkpoint.config import read_config
from fishrt_export.checkpoint.families import S2
from fishrt_export.checkpoint.files import (
    find_codec,
    find_language_model,
    read_tensors,
    read_weights,
    unwrap,
)
from fishrt_export.checkpoint.lora import Lora
from fishrt_export.checkpoint.weights import LANGUAGE_MODEL_PARTS, raise_if_any
from fishrt_export.errors import ExportError
from fishrt_export.models.fast_ar import FastAR
from fishrt_export.models.slow_ar import SlowAR
from fishrt_export.sources.language_model import LanguageModelSource, open_language_model
from synthetic import BEGIN, EVERYTHING, PLAIN, SEMANTIC, TEXT, millions, random_weights, write_flat, write_nested

NESTED = {**EVERYTHING, "tie_word_embeddings": True}


def open_flat(folder: Path) -> LanguageModelSource:
    """Open a flat checkpoint as S2, without identification by its config."""
    return open_language_model(folder, family="s2")


def assert_same_weights(source: LanguageModelSource, weights: dict[str, torch.Tensor]) -> None:
    assert source.problems() == []
    assert source.weights.keys() == weights.keys()
    for name, tensor in weights.items():
        assert source.weights[name].dtype == tensor.dtype
        assert torch.equal(source.weights[name], tensor), name


# ---- forms


@pytest.mark.parametrize("shards", [0, 1, 3])
@pytest.mark.parametrize("tied", [True, False])
def test_nested_form(tmp_path: Path, shards: int, tied: bool) -> None:
    config = {**EVERYTHING, "tie_word_embeddings": tied}
    weights = random_weights(config)
    source = open_language_model(write_nested(tmp_path, config, weights, shards=shards))
    assert_same_weights(source, weights)
    assert source.config == read_config(config, S2)
    assert source.family == S2
    assert (source.ids.semantic, source.ids.end) == (range(BEGIN, BEGIN + SEMANTIC), TEXT)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda w: w,
        lambda w: {"state_dict": w, "epoch": 3},
        lambda w: {f"model.{name}": tensor for name, tensor in w.items()},
        lambda w: {"state_dict": {f"model.{name}": tensor for name, tensor in w.items()}},
        lambda w: {**w, "audio_projector.0.weight": torch.zeros(3)},
    ],
    ids=["plain", "state_dict", "model-prefix", "both", "audio-projector"],
)
def test_flat_form(tmp_path: Path, wrap: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    weights = random_weights(EVERYTHING)
    assert_same_weights(open_flat(write_flat(tmp_path, EVERYTHING, wrap(weights))), weights)


def test_separate_projections_are_joined(tmp_path: Path) -> None:
    weights = random_weights(EVERYTHING)
    stored = dict(weights)
    for half, layers in (("", "n_layer"), ("fast_", "n_fast_layer")):
        heads, kv_heads, width = (EVERYTHING[half + key] for key in ("n_head", "n_local_heads", "head_dim"))
        for i in range(EVERYTHING[layers]):
            prefix = f"{half}layers.{i}.attention."
            parts = stored.pop(f"{prefix}wqkv.weight").split([heads * width, kv_heads * width, kv_heads * width])
            stored |= {f"{prefix}{name}.weight": part.clone() for name, part in zip(("wq", "wk", "wv"), parts, strict=True)}
    assert_same_weights(open_flat(write_flat(tmp_path, EVERYTHING, stored)), weights)


def test_ignored_by_name(tmp_path: Path) -> None:
    """A tied model's head and the audio encoder, which S2-Pro's loader does not map."""
    weights = random_weights(NESTED)
    write_nested(tmp_path, NESTED, weights)
    from safetensors.torch import load_file, save_file

    path = tmp_path / "model.safetensors"
    extra = {"text_model.lm_head.weight": torch.zeros(2, 2), "audio_encoder.conv.weight": torch.zeros(3)}
    save_file({**load_file(path), **extra}, path)
    assert_same_weights(open_language_model(tmp_path), weights)


PREFIXES = ("model.", "module.", "_orig_mod.", "model._orig_mod.", "model.module.", "trainer.net.")


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("form", ["pickle", "safetensors", "shards"])
def test_a_prefix_of_all_names_is_taken_off(tmp_path: Path, form: str, prefix: str) -> None:
    """Of the flat names and of the nested ones, in each container."""
    for folder, nested in ((tmp_path / "flat", False), (tmp_path / "nested", True)):
        weights = random_weights(NESTED)
        names = synthetic.nested_names(weights) if nested else weights
        stored = {prefix + name: tensor for name, tensor in names.items()}
        write_flat(folder, NESTED, stored)
        if nested:
            (folder / "config.json").write_text(json.dumps(synthetic.nested_config(NESTED)))
        if form != "pickle":
            (folder / "model.pth").unlink()
            synthetic.write_safetensors(folder, stored, shards=2 if form == "shards" else 0)
        assert_same_weights(open_language_model(folder, family="s2"), weights)


def test_names_of_compiled_layers(tmp_path: Path) -> None:
    """`torch.compile` on single layers changes their names only."""
    weights = random_weights(EVERYTHING)
    stored = {name.replace("layers.0.", "layers.0._orig_mod."): tensor for name, tensor in weights.items()}
    assert_same_weights(open_flat(write_flat(tmp_path, EVERYTHING, stored)), weights)


def test_only_a_prefix_that_leads_to_known_names_is_taken_off() -> None:
    """A part of the model that all names share is no prefix, and neither is one before foreign names."""
    for names in (
        ["layers.0.attention.wo.lora_A", "layers.0.attention.wo.lora_B"],
        ["text_model.model.norm.weight", "text_model.model.embeddings.weight"],
        ["transformer.h.0.weight", "transformer.h.1.weight"],
        ["model.norm.weight", "norm.weight"],
        ["embeddings.weight"],
    ):
        tensors = dict.fromkeys(names, torch.zeros(1))
        assert list(unwrap(tensors, LANGUAGE_MODEL_PARTS, Path("model.pth"))) == names
    with pytest.raises(ExportError, match=r"several tensors for one name: layers\.0\.x"):
        unwrap({"layers._orig_mod.0.x": 1, "layers.0.x": 2}, LANGUAGE_MODEL_PARTS, Path("model.pth"))


def test_tensors_of_no_part_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As upstream does, but with a warning; and a head that a tied model does not use."""
    weights = random_weights(NESTED)
    stored = {**weights, "vision.proj.weight": torch.zeros(2), "output.weight": weights["embeddings.weight"].clone()}
    assert_same_weights(open_flat(write_flat(tmp_path, NESTED, stored)), weights)
    assert [record.getMessage() for record in caplog.records] == [
        "the weights hold tensors that belong to no part of the model and are left out: vision.proj.weight"
    ]
    caplog.clear()
    assert_same_weights(open_flat(write_flat(tmp_path, NESTED, {**weights, "output.weight": torch.zeros(2, 2)})), weights)
    assert "the head among the weights is left out" in caplog.text


@pytest.mark.parametrize("single", ["model.safetensors", None])
@pytest.mark.parametrize("pickled", ["model.pth", None])
def test_several_sets_of_weights_are_named(tmp_path: Path, single: str | None, pickled: str | None) -> None:
    """The user must choose: an arbitrary choice could ignore the trained weights."""
    weights = random_weights(NESTED)
    write_nested(tmp_path, NESTED, weights, shards=2)
    if single:
        synthetic.write_safetensors(tmp_path, synthetic.nested_names(weights))
    if pickled:
        torch.save(weights, tmp_path / pickled)
    names = [name for name in ("model.safetensors.index.json", single, pickled) if name]
    if len(names) == 1:
        assert_same_weights(open_language_model(tmp_path), weights)
        return
    with pytest.raises(ExportError, match=f"has {len(names)} sets of weights: {', '.join(names)}"):
        open_language_model(tmp_path)


def test_a_single_file_may_have_an_index(tmp_path: Path) -> None:
    """Then the file is a shard, not another set."""
    weights = random_weights(NESTED)
    write_nested(tmp_path, NESTED, weights)
    places = dict.fromkeys(synthetic.nested_names(weights), "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert_same_weights(open_language_model(tmp_path), weights)


def test_safetensors_may_be_named_like_a_pickle(tmp_path: Path) -> None:
    weights = random_weights(NESTED)
    write_nested(tmp_path, NESTED, weights)
    (tmp_path / "model.safetensors").rename(tmp_path / "model.pth")
    assert_same_weights(open_language_model(tmp_path), weights)


def test_double_precision_becomes_single(tmp_path: Path) -> None:
    weights = random_weights(EVERYTHING, dtype=torch.float32)
    stored = {name: tensor.double() for name, tensor in weights.items()}
    assert_same_weights(open_flat(write_flat(tmp_path, EVERYTHING, stored)), weights)


def test_a_folder_as_a_hub_keeps_it(tmp_path: Path) -> None:
    """Names are links to files that are named by their hashes."""
    weights = random_weights(NESTED)
    write_nested(tmp_path / "plain", NESTED, weights, shards=2)
    snapshot, blobs = tmp_path / "snapshots/abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted((tmp_path / "plain").iterdir())):
        path.rename(blobs / f"{number:040x}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"{number:040x}")
    assert_same_weights(open_language_model(snapshot), weights)


# ---- configuration


def test_absent_and_null_fields() -> None:
    assert read_config({"model_type": "dual_ar"}, S2).slow.hidden == 11008
    config = read_config(
        {"model_type": "dual_ar", "dim": 64, "n_head": 4, "head_dim": None, "fast_dim": None, "intermediate_size": 100}, S2
    )
    assert (config.slow.head_dim, config.slow.kv_heads, config.fast.dim, config.fast.layers) == (16, 4, 64, 4)
    assert (config.fast.hidden, config.fast.kv_heads, config.fast.head_dim, config.tied_head) == (100, 4, 16, True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type 'llama'"),
        ({"dim": "64"}, "dim is '64'"),
        ({"dim": 0}, "dim is 0"),
        ({"n_layer": True}, "n_layer is True"),
        ({"rope_base": -1}, "rope_base is -1"),
        ({"rope_base": float("inf")}, "rope_base is inf"),
        ({"attention_qk_norm": 1}, "attention_qk_norm is 1"),
        ({"n_local_heads": 3}, "n_head 4 is not a multiple of n_local_heads 3"),
        ({"fast_n_local_heads": 3}, "fast_n_head 4 is not a multiple of fast_n_local_heads 3"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
    ],
)
def test_a_config_that_cannot_be(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        read_config({**PLAIN, **change}, S2)


def test_the_official_sizes() -> None:
    """Millions of parameters of S2-Pro, as its publisher's tables add up."""
    text = {
        "vocab_size": 155776,
        "n_layer": 36,
        "n_head": 32,
        "n_local_heads": 8,
        "head_dim": 128,
        "dim": 2560,
        "intermediate_size": 9728,
    }
    text |= {"rope_base": 1000000, "norm_eps": 1e-6, "max_seq_len": 32768, "tie_word_embeddings": True, "attention_qk_norm": True}
    decoder = {
        "vocab_size": 4096,
        "num_codebooks": 10,
        "n_layer": 4,
        "dim": 2560,
        "n_head": 32,
        "n_local_heads": 8,
        "head_dim": 128,
    }
    decoder |= {"intermediate_size": 9728, "attention_qk_norm": False}
    config = read_config({"model_type": "fish_qwen3_omni", "text_config": text, "audio_decoder_config": decoder}, S2)
    with torch.device("meta"):
        slow, fast = SlowAR(config, range(151678, 155774), None), FastAR(config)
    assert millions(slow) == 4137.16
    assert millions(fast) == 424.70


# ---- ids


def test_ids_come_from_the_tokenizer(tmp_path: Path) -> None:
    write_nested(tmp_path, NESTED, random_weights(NESTED))
    data = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**data, "semantic_start_token_id": 1, "semantic_end_token_id": 5}))
    synthetic.write_tokenizer(tmp_path, end=BEGIN + SEMANTIC + 1)
    source = open_language_model(tmp_path)
    assert source.ids.semantic == range(BEGIN, BEGIN + SEMANTIC)
    assert source.audio_head == [*range(BEGIN, BEGIN + SEMANTIC), BEGIN + SEMANTIC + 1]


def test_ids_of_the_config_are_the_fallback(tmp_path: Path) -> None:
    write_nested(tmp_path, NESTED, random_weights(NESTED))
    synthetic.write_tokenizer(tmp_path, semantic=False)
    source = open_language_model(tmp_path)
    assert source.ids.semantic == range(BEGIN, BEGIN + SEMANTIC)
    assert source.audio_head == [TEXT, *range(BEGIN, BEGIN + SEMANTIC)]


# ---- damage


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


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_file(tmp_path: Path, name: str) -> None:
    write_nested(tmp_path, NESTED, random_weights(NESTED))
    (tmp_path / name).unlink()
    with pytest.raises(ExportError, match=f"lacks .*{name}"):
        open_language_model(tmp_path)


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ExportError, match=r"config.json, weights \(.*\), a tokenizer \(tokenizer.json or tokenizer.tiktoken\)"):
        find_language_model(tmp_path)
    with pytest.raises(ExportError, match=r"codec\.pth"):
        find_codec(tmp_path)
    for path in (tmp_path / "absent", tmp_path / "notes.txt"):
        with pytest.raises(ExportError, match=r"does not exist|is a file, not a folder"):
            find_language_model(path)


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


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "model.pth"])
@pytest.mark.parametrize("content", [b"\xff\xfe\x00nonsense", b"[1, 2, 3]", b"null"])
def test_a_foreign_file(tmp_path: Path, name: str, content: bytes) -> None:
    weights = random_weights(EVERYTHING)
    write = write_flat if name == "model.pth" else write_nested
    write(tmp_path, EVERYTHING, weights)
    (tmp_path / name).write_bytes(content)
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
NOT_WEIGHTS: dict[str, tuple[Any, str]] = {
    **STAND_INS,
    "message": (REFUSAL, "cannot be read: it is text, not weights: .*restricted"),
    "gguf": (b"GGUF\x03\x00\x00\x00" + bytes(40), "is a GGUF file"),
    "zeros": (bytes(4000), "is damaged"),
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


@pytest.mark.parametrize(("content", "message"), STAND_INS.values(), ids=STAND_INS)
@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "model.safetensors.index.json", "fishrt.json", "tokenizer.tiktoken"]
)
def test_files_that_are_no_text_of_a_checkpoint(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    write_nested(tmp_path, NESTED, random_weights(NESTED), shards=2)
    if name == "tokenizer.tiktoken":
        (tmp_path / "tokenizer.json").unlink()
    (tmp_path / name).write_bytes(content)
    assert re.search(rf"{re.escape(name)} {message}", refusal(tmp_path, family="s1" if "tiktoken" in name else "s2"))


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


QUANTISED = {
    "GPTQ": ("layers.0.attention.wo.qweight", "layers.0.attention.wo.qzeros"),
    "bitsandbytes": ("layers.0.attention.wo.weight.quant_state.bitsandbytes__nf4", "layers.0.attention.wo.weight.absmax"),
    "FP8": ("layers.0.attention.wo.weight.scale",),
    "MLX": ("layers.0.attention.wo.scales", "layers.0.attention.wo.biases"),
}


@pytest.mark.parametrize(("form", "names"), QUANTISED.items(), ids=QUANTISED)
def test_quantised_forms_of_other_tools_are_named(tmp_path: Path, form: str, names: tuple[str, ...]) -> None:
    write_flat(tmp_path, PLAIN, random_weights(PLAIN) | {name: torch.zeros(2) for name in names})
    text = refusal(tmp_path, family="s2")
    assert "the weights are quantised" in text
    assert form in text


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


def test_only_weights_are_read_from_the_flat_form(tmp_path: Path) -> None:
    weights = random_weights(PLAIN)
    write_flat(tmp_path, PLAIN, weights)
    assert read_weights(tmp_path / "model.pth").keys() == weights.keys()


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
    for read in (lambda: read_weights(index), lambda: find_codec(Path("x" * 300))):
        with pytest.raises(ExportError, match="File name too long"):
            read()
