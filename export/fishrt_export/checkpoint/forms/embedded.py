"""What a GGUF file has beside weights: the config, the tokenizer, and the names of both halves' tensors. Loads no torch.

s2.cpp states the sizes one by one; audio.cpp embeds whole files.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from ...errors import ExportError
from ..content import DAMAGED
from .gguf import Gguf, GgufArray, GgufTensor, read_gguf

_CODEC = ("c.", "codec_weights/")
_LANGUAGE_MODEL = "model_weights/"
SIZES = {
    "dim": "fish-speech.embedding_length",
    "n_layer": "fish-speech.block_count",
    "n_head": "fish-speech.attention.head_count",
    "n_local_heads": "fish-speech.attention.head_count_kv",
    "intermediate_size": "fish-speech.feed_forward_length",
    "max_seq_len": "fish-speech.context_length",
    "vocab_size": "fish-speech.vocab_size",
    "rope_base": "fish-speech.rope.freq_base",
    "norm_eps": "fish-speech.attention.layer_norm_rms_epsilon",
    **{name: f"fish_speech.{name}" for name in ("codebook_size", "num_codebooks", "semantic_begin_id", "semantic_end_id")},
    **{name: f"fish_speech.{name}" for name in ("scale_codebook_embeddings", "norm_fastlayer_input", "tie_word_embeddings")},
    **{name: f"fish_speech.{name}" for name in ("attention_qk_norm", "attention_qkv_bias", "attention_o_bias")},
    **{name: f"fish_speech.{name}" for name in ("fast_attention_qk_norm", "fast_attention_qkv_bias", "fast_attention_o_bias")},
    "fast_dim": "fish_speech.fast_embedding_length",
    "fast_intermediate_size": "fish_speech.fast_feed_forward_length",
    "n_fast_layer": "fish_speech.fast_block_count",
    "fast_n_head": "fish_speech.fast_head_count",
    "fast_n_local_heads": "fish_speech.fast_head_count_kv",
    "fast_head_dim": "fish_speech.fast_head_dim",
}
"""Fields of a flat config.json, and where s2.cpp states them."""


def language_model_tensors(path: Path) -> dict[str, GgufTensor]:
    """Return the language model's tensors by the original's names, with q, k and v apart where they are."""
    tensors = _read(path).tensors
    return {n.removeprefix(_LANGUAGE_MODEL): tensor for n, tensor in tensors.items() if not n.startswith(_CODEC)}


def codec_tensors(path: Path) -> dict[str, GgufTensor]:
    """Return the codec's tensors by the original's names."""
    tensors = _read(path).tensors
    return {name.removeprefix(start): t for name, t in tensors.items() for start in _CODEC if name.startswith(start)}


def read_config(path: Path) -> Mapping[str, Any]:
    """Return the config, flat or nested as it is. Raises ExportError."""
    if (text := _embedded(path, "config.json")) is not None:
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise ExportError(f"{path} holds a config.json that is no JSON object", hint=DAMAGED)
        return found
    file, tensors = _read(path), language_model_tensors(path)
    config: dict[str, Any] = {name: file.values[key] for name, key in SIZES.items() if key in file.values}
    if "norm_eps" in config:  # it is stored in float32
        config["norm_eps"] = float(f"{config['norm_eps']:.7g}")
    heads = config.get("n_head", 0) + 2 * config.get("n_local_heads", 0)
    norm, joined = (tensors.get(f"layers.0.attention.{name}.weight") for name in ("q_norm", "wqkv"))
    if norm is not None:
        config["head_dim"] = norm.shape[0]
    elif joined is not None and heads:
        config["head_dim"] = joined.shape[0] // heads
    return {"model_type": "dual_ar", "norm_fastlayer_input": True, **config}


def read_tokenizer(path: Path) -> str | None:
    """Return the text of the tokenizer.json inside, or None. Raises ExportError."""
    text = _embedded(path, "tokenizer.json")
    try:
        return None if text is None else text.decode()
    except UnicodeDecodeError:
        raise ExportError(f"{path} holds a tokenizer.json that is not UTF-8", hint=DAMAGED) from None


def _embedded(path: Path, name: str) -> bytes | None:
    """Return the content of a file that audio.cpp has put inside, or None. Raises ExportError."""
    values = _read(path).values
    names, data, contents, offsets = (
        values.get(f"audiocpp.embedded_files.{key}") for key in ("names", "data", "contents", "offsets")
    )
    if not isinstance(names, GgufArray):
        return None
    try:
        at = next((i for i, known in enumerate(names.texts()) if known.decode().rpartition("/")[2] == name), None)
        if at is None:
            return None
        if isinstance(contents, GgufArray):
            return contents.texts()[at]
        if isinstance(data, GgufArray) and isinstance(offsets, GgufArray):
            begin, end = offsets.numbers()[at : at + 2]
            return data.raw()[begin:end]
    except (IndexError, ValueError, struct.error):
        raise ExportError(f"{path} holds a damaged {name}", hint=DAMAGED) from None
    return None


@lru_cache(maxsize=4)
def _read_once(path: Path, _changed: int) -> Gguf:
    return read_gguf(path)


def _read(path: Path) -> Gguf:
    return _read_once(path, path.stat().st_mtime_ns)
