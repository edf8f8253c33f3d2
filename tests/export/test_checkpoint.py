"""Every form of a checkpoint is read to the same weights; an error lists all faults at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import synthetic
from fishrt_export.checkpoint.config import read_config
from fishrt_export.checkpoint.families import S2
from fishrt_export.checkpoint.files import (
    unwrap,
)
from fishrt_export.checkpoint.weights import LANGUAGE_MODEL_PARTS
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


def separate_projections(weights: dict[str, Any]) -> dict[str, Any]:
    """wq, wk and wv in place of wqkv."""
    stored = dict(weights)
    for half, layers in (("", "n_layer"), ("fast_", "n_fast_layer")):
        heads, kv_heads, width = (EVERYTHING[half + key] for key in ("n_head", "n_local_heads", "head_dim"))
        for i in range(EVERYTHING[layers]):
            prefix = f"{half}layers.{i}.attention."
            parts = stored.pop(f"{prefix}wqkv.weight").split([heads * width, kv_heads * width, kv_heads * width])
            stored |= {f"{prefix}{name}.weight": part.clone() for name, part in zip(("wq", "wk", "wv"), parts, strict=True)}
    return stored


FORMS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "plain": lambda w: w,
    "state_dict": lambda w: {"state_dict": w, "epoch": 3},
    "prefix": lambda w: {f"model.{name}": tensor for name, tensor in w.items()},
    "state_dict and prefix": lambda w: {"state_dict": {f"model.{name}": tensor for name, tensor in w.items()}},
    "prefix of some": lambda w: {**{f"model.{name}": tensor for name, tensor in w.items()}, "audio_encoder.x": torch.zeros(3)},
    "audio projector": lambda w: {**w, "audio_projector.0.weight": torch.zeros(3)},
    "compiled layers": lambda w: {name.replace("layers.0.", "layers.0._orig_mod."): tensor for name, tensor in w.items()},
    "float64": lambda w: {name: tensor.double() for name, tensor in w.items()},
    "separate projections": separate_projections,
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_flat_form(tmp_path: Path, form: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    weights = random_weights(EVERYTHING, dtype=torch.float32)
    assert_same_weights(open_flat(write_flat(tmp_path, EVERYTHING, form(weights))), weights)


def with_ignored_tensors(folder: Path) -> None:
    """A tied model's head and the audio encoder, which S2-Pro's loader does not map."""
    path = folder / "model.safetensors"
    extra = {"text_model.lm_head.weight": torch.zeros(2, 2), "audio_encoder.conv.weight": torch.zeros(3)}
    save_file({**load_file(path), **extra}, path)


def with_an_index(folder: Path) -> None:
    """The single file is then a shard, not another set."""
    places = dict.fromkeys(load_file(folder / "model.safetensors"), "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def as_a_hub_keeps_it(folder: Path) -> None:
    """Names are links to files that are named by their hashes."""
    blobs = folder.with_name("blobs")
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / f"{number:040x}")
        path.symlink_to(Path("../blobs") / f"{number:040x}")


def named_like_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model.pth")


@pytest.mark.parametrize("rearrange", [with_ignored_tensors, with_an_index, as_a_hub_keeps_it, named_like_a_pickle])
def test_files_in_another_arrangement(tmp_path: Path, rearrange: Callable[[Path], None]) -> None:
    weights = random_weights(NESTED)
    folder = write_nested(tmp_path / "checkpoint", NESTED, weights)
    rearrange(folder)
    assert_same_weights(open_language_model(folder), weights)


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
    heads = {"n_head": 32, "n_local_heads": 8, "head_dim": 128, "dim": 2560, "intermediate_size": 9728}
    text = {**heads, "vocab_size": 155776, "n_layer": 36, "attention_qk_norm": True, "tie_word_embeddings": True}
    text |= {"rope_base": 1000000, "norm_eps": 1e-6, "max_seq_len": 32768}
    decoder = {**heads, "vocab_size": 4096, "num_codebooks": 10, "n_layer": 4, "attention_qk_norm": False}
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
