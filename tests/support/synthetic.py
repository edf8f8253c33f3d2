"""Language model checkpoints of any configuration, with seeded random weights, in every supported form; and recordings."""

from __future__ import annotations

import json
from base64 import b64encode
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, models
from torch import Tensor

BEGIN, SEMANTIC, TEXT = 30, 12, 20
"""Id of <|semantic:0|>, number of semantic tokens, number of text tokens."""

PLAIN: dict[str, Any] = {
    "model_type": "dual_ar",
    "vocab_size": 48,
    "n_layer": 2,
    "n_head": 4,
    "n_local_heads": 2,
    "head_dim": 6,
    "dim": 16,
    "intermediate_size": 24,
    "rope_base": 10000,
    "norm_eps": 1e-5,
    "max_seq_len": 64,
    "tie_word_embeddings": True,
    "attention_qkv_bias": False,
    "attention_o_bias": False,
    "attention_qk_norm": False,
    "codebook_size": 14,
    "num_codebooks": 3,
    "n_fast_layer": 1,
    "fast_dim": 16,
    "fast_n_head": 4,
    "fast_n_local_heads": 2,
    "fast_head_dim": 6,
    "fast_intermediate_size": 24,
    "fast_attention_qkv_bias": False,
    "fast_attention_o_bias": False,
    "fast_attention_qk_norm": False,
    "scale_codebook_embeddings": False,
    "norm_fastlayer_input": False,
}
"""A flat config with every switch off."""

EVERYTHING: dict[str, Any] = {
    **PLAIN,
    "n_head": 6,
    "n_local_heads": 2,
    "tie_word_embeddings": False,
    "attention_qkv_bias": True,
    "attention_o_bias": True,
    "attention_qk_norm": True,
    "num_codebooks": 5,
    "n_fast_layer": 2,
    "fast_dim": 10,
    "fast_n_head": 2,
    "fast_n_local_heads": 1,
    "fast_head_dim": 4,
    "fast_intermediate_size": 14,
    "fast_attention_qkv_bias": True,
    "fast_attention_o_bias": True,
    "fast_attention_qk_norm": True,
    "scale_codebook_embeddings": True,
    "norm_fastlayer_input": True,
}
"""A flat config with every switch on, and all sizes different."""


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor by its flat name."""
    dim, fast, width, vocabulary = (config[key] for key in ("dim", "fast_dim", "codebook_size", "vocab_size"))
    found = {"embeddings.weight": (vocabulary, dim), "codebook_embeddings.weight": (config["num_codebooks"] * width, dim)}
    if not config["tie_word_embeddings"]:
        found["output.weight"] = (vocabulary, dim)
    if fast != dim:
        found |= {"fast_project_in.weight": (fast, dim), "fast_project_in.bias": (fast,)}
    found |= {
        "norm.weight": (dim,),
        "fast_norm.weight": (fast,),
        "fast_embeddings.weight": (width, fast),
        "fast_output.weight": (width, fast),
    }
    for half, layers in (("", "n_layer"), ("fast_", "n_fast_layer")):
        for i in range(config[layers]):
            found |= {f"{half}layers.{i}.{name}": shape for name, shape in _block_shapes(config, half).items()}
    return found


def _block_shapes(config: dict[str, Any], half: str) -> dict[str, tuple[int, ...]]:
    dim, hidden, heads, kv_heads, width = (
        config[half + key] for key in ("dim", "intermediate_size", "n_head", "n_local_heads", "head_dim")
    )
    rows = (heads + 2 * kv_heads) * width
    found: dict[str, tuple[int, ...]] = {
        "attention.wqkv.weight": (rows, dim),
        "attention.wo.weight": (dim, heads * width),
        "feed_forward.w1.weight": (hidden, dim),
        "feed_forward.w3.weight": (hidden, dim),
        "feed_forward.w2.weight": (dim, hidden),
        "attention_norm.weight": (dim,),
        "ffn_norm.weight": (dim,),
    }
    if config[f"{half}attention_qkv_bias"]:
        found["attention.wqkv.bias"] = (rows,)
    if config[f"{half}attention_o_bias"]:
        found["attention.wo.bias"] = (dim,)
    if config[f"{half}attention_qk_norm"]:
        found |= {"attention.q_norm.weight": (width,), "attention.k_norm.weight": (width,)}
    return found


def random_weights(config: dict[str, Any], seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Return random weights: norms near 1, everything else near 0."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (0.3 * torch.randn(shape, generator=generator) + ("norm" in name)).to(dtype)
        for name, shape in shapes(config).items()
    }


def write_tokenizer(folder: Path, *, end: int = TEXT, semantic: bool = True, one: bool = False) -> None:
    """Write a tokenizer with one token a word; `end` is the id of <|im_end|>. Unnamed ids get filler tokens.

    one: a single semantic token stands for every frame.
    """
    names = {TEXT: "filler", end: "<|im_end|>"}
    if one:
        names[BEGIN] = "<|semantic|>"
    elif semantic:
        names |= {BEGIN + i: f"<|semantic:{i}|>" for i in range(SEMANTIC)}
    vocabulary = {names.get(i, f"word{i}"): i for i in range(BEGIN + SEMANTIC + 2)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="word0"))
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in vocabulary if name.startswith("<|")])
    tokenizer.save(str(folder / "tokenizer.json"))


def write_tiktoken(folder: Path, control: list[str] | None) -> None:
    """Write a tokenizer with one token a byte. control: the tokens of a `special_tokens.json`; None: no such file."""
    lines = "\n".join(f"{b64encode(bytes([byte])).decode()} {byte}" for byte in range(256))
    (folder / "tokenizer.tiktoken").write_text(lines, encoding="utf-8")
    if control is not None:
        (folder / "special_tokens.json").write_text(json.dumps(dict.fromkeys(control, 0)), encoding="utf-8")


def write_flat(folder: Path, config: dict[str, Any], weights: dict[str, Any]) -> Path:
    """Write a `dual_ar` config and model.pth."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    torch.save(weights, folder / "model.pth")
    write_tokenizer(folder)
    return folder


def nested_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config in S2-Pro's form, which implies scaled embeddings and a normed fast input."""
    text = {
        key: value
        for key, value in config.items()
        if not key.startswith(("fast_", "n_fast", "codebook", "num_", "model", "scale", "norm_f"))
    }
    decoder = {key.removeprefix("fast_"): value for key, value in config.items() if key.startswith("fast_")}
    decoder |= {
        "n_layer": config["n_fast_layer"],
        "vocab_size": config["codebook_size"],
        "num_codebooks": config["num_codebooks"],
    }
    ids = {"semantic_start_token_id": BEGIN, "semantic_end_token_id": BEGIN + SEMANTIC - 1}
    return {"model_type": "fish_qwen3_omni", "dtype": "bfloat16", "text_config": text, "audio_decoder_config": decoder, **ids}


def nested_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return weights under the names of S2-Pro's files."""

    def nested(name: str) -> str:
        if name == "output.weight":
            return "text_model.lm_head.weight"
        if name.startswith("fast_"):
            return "audio_decoder." + name.removeprefix("fast_")
        return ("audio_decoder." if name.startswith("codebook") else "text_model.model.") + name

    return {nested(name): tensor for name, tensor in weights.items()}


def write_nested(folder: Path, config: dict[str, Any], weights: dict[str, Tensor], *, shards: int = 0) -> Path:
    """Write S2-Pro's form, in one file or in shards. weights: by flat names."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(nested_config(config)), encoding="utf-8")
    write_tokenizer(folder)
    write_safetensors(folder, nested_names(weights), shards=shards)
    return folder


def write_safetensors(folder: Path, tensors: dict[str, Tensor], *, shards: int = 0) -> None:
    """Write one safetensors file, or shards and their index."""
    if not shards:
        save_file(tensors, folder / "model.safetensors")
        return
    places = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(tensors)}
    for shard in set(places.values()):
        save_file({name: tensors[name] for name, place in places.items() if place == shard}, folder / shard)
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def write_reference(checkpoint: Path, name: str, seconds: float = 0.5) -> None:
    """Write a built-in voice of a checkpoint: seeded noise at 16 kHz and its transcript."""
    folder = checkpoint / "references" / name
    folder.mkdir(parents=True)
    samples = np.random.default_rng(len(name)).uniform(-0.4, 0.4, int(16000 * seconds))
    soundfile.write(folder / "a.wav", samples, 16000)
    (folder / "a.lab").write_text(f"This is {name}.", encoding="utf-8")


def millions(*modules: torch.nn.Module) -> float:
    """Return the number of parameters in millions, to two places."""
    return round(sum(p.numel() for module in modules for p in module.parameters()) / 1e6, 2)
