"""Every form of a checkpoint is read to the same weights, and what does not fit is refused, all of it at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import synthetic
from fishrt_export.checkpoint import find_codec, find_language_model, read_weights
from fishrt_export.config import read_config
from fishrt_export.errors import ExportError
from fishrt_export.families import S2
from fishrt_export.fast_ar import FastAR
from fishrt_export.graphs import LanguageModelSource, open_language_model
from fishrt_export.slow_ar import SlowAR
from reference_lm import fast_forward, slow_forward
from synthetic import BEGIN, EVERYTHING, PLAIN, SEMANTIC, TEXT, millions, random_weights, write_flat, write_nested
from tiny import caches
from tolerances import TOLERANCES

NESTED = {**EVERYTHING, "tie_word_embeddings": True}


def open_flat(folder: Path) -> LanguageModelSource:
    """Without regard to fields that this family's own config would have."""
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


def test_the_newest_form_is_preferred(tmp_path: Path) -> None:
    new, old = random_weights(NESTED, seed=1), random_weights(NESTED, seed=2)
    write_nested(tmp_path, NESTED, old)
    torch.save(old, tmp_path / "model.pth")
    write_nested(tmp_path, NESTED, new, shards=2)
    assert_same_weights(open_language_model(tmp_path), new)


# ---- configuration


VARIANTS = {
    "plain": PLAIN,
    "everything": EVERYTHING,
    "qkv bias": {**PLAIN, "attention_qkv_bias": True, "fast_attention_qkv_bias": True},
    "output bias": {**PLAIN, "attention_o_bias": True, "fast_attention_o_bias": True},
    "qk norm, slow": {**PLAIN, "attention_qk_norm": True},
    "qk norm, fast": {**PLAIN, "fast_attention_qk_norm": True},
    "untied": {**PLAIN, "tie_word_embeddings": False},
    "projected": {**PLAIN, "fast_dim": 10, "norm_fastlayer_input": True},
    "projected, not normed": {**PLAIN, "fast_dim": 24},
    "scaled": {**PLAIN, "scale_codebook_embeddings": True},
    "normed": {**PLAIN, "norm_fastlayer_input": True},
    "one head": {**PLAIN, "n_head": 1, "n_local_heads": 1, "head_dim": 2},
    "no groups": {**PLAIN, "n_local_heads": 4, "fast_n_local_heads": 4},
    "one group": {**PLAIN, "n_head": 8, "n_local_heads": 1, "rope_base": 1000000.0},
    "one codebook": {**PLAIN, "num_codebooks": 1},
    "many codebooks": {**PLAIN, "num_codebooks": 17},
}


def random_input(config: dict[str, Any], length: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    main = np.where(rng.random(length) < 0.5, rng.integers(BEGIN, BEGIN + SEMANTIC, length), rng.integers(0, TEXT, length))
    codes = rng.integers(0, config["codebook_size"], (config["num_codebooks"], length))
    return np.concatenate([main[None], codes * (main >= BEGIN)])


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_every_switch_of_the_config(tmp_path: Path, config: dict[str, Any]) -> None:
    """The torch modules against a plain numpy model that was written from the rules."""
    weights = random_weights(config)
    source = open_flat(write_flat(tmp_path, config, weights))
    assert source.problems() == []
    exact = {name: tensor.double().numpy() for name, tensor in weights.items()}
    prompt = random_input(config, length=9)
    logits, hidden = slow_forward(config, exact, prompt, BEGIN, BEGIN + SEMANTIC - 1)

    slow, (slow_job, fast_job) = source.slow_ar("full"), source.jobs("full")
    ids = torch.from_numpy(prompt)[None]
    with torch.no_grad():
        start = torch.zeros(1, dtype=torch.int64)
        x, _ = slow.run_layers(
            slow.enter(ids), torch.arange(9)[None], start, caches(slow_job.spec.state_tensors, batch=1, cache=9)
        )
        found_logits, found_hidden = slow.read_out(x)
        assert np.abs(found_logits[0].numpy() - logits).max() <= TOLERANCES["reference"]
        assert np.abs(found_hidden[0].numpy() - hidden).max() <= TOLERANCES["reference"]

        codes, count = prompt[1:, -1], config["num_codebooks"]
        found, *_ = source.fast_ar()(
            torch.from_numpy(hidden[-1:]).float(),
            torch.from_numpy(np.concatenate([[0], codes[:-1]]))[None],
            torch.arange(count)[None],
            start,
            caches(fast_job.spec.state_tensors, batch=1),
        )
    expected = fast_forward(config, exact, hidden[-1], codes[:-1])
    assert np.abs(found[0].numpy() - expected[-1]).max() <= TOLERANCES["reference"]


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
    with pytest.raises(ExportError, match=r"config.json, tokenizer \(tokenizer.json or tokenizer.tiktoken\), weights"):
        find_language_model(tmp_path)
    with pytest.raises(ExportError, match=r"codec\.pth"):
        find_codec(tmp_path)
    for path in (tmp_path / "absent", tmp_path / "notes.txt"):
        with pytest.raises(ExportError, match="is not a folder"):
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


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    write_flat(tmp_path, PLAIN, {"embeddings.weight": Path("not a tensor")})
    with pytest.raises(ExportError, match=r"model\.pth cannot be read"):
        open_flat(tmp_path)


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
