"""The configs of the official checkpoints, and small ones of the same form."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

_TRAINING: dict[str, Any] = {"dropout": 0.1, "initializer_range": 0.02, "use_gradient_checkpointing": True}

_FISH_1_2: dict[str, Any] = {
    "model_type": "dual_ar",
    "vocab_size": 32000,
    "n_layer": 24,
    "n_head": 16,
    "n_local_heads": 2,
    "head_dim": 64,
    "dim": 1024,
    "intermediate_size": 4096,
    "rope_base": 1000000,
    "norm_eps": 1e-6,
    "max_seq_len": 4096,
    "tie_word_embeddings": False,
    "attention_qkv_bias": False,
    "codebook_size": 1024,
    "num_codebooks": 4,
    "n_fast_layer": 4,
    **_TRAINING,
}
_FISH_1_4 = {**_FISH_1_2, "num_codebooks": 8, "is_reward_model": False, "share_codebook_embeddings": True}
_FISH_1_5 = {**_FISH_1_4, "vocab_size": 102048, "max_seq_len": 8192, "scale_codebook_embeddings": False}
_S1 = {
    "model_type": "dual_ar",
    "vocab_size": 155776,
    "n_layer": 28,
    "n_head": 16,
    "n_local_heads": 8,
    "head_dim": 128,
    "dim": 1024,
    "intermediate_size": 3072,
    "rope_base": 1000000,
    "norm_eps": 1e-6,
    "max_seq_len": 8192,
    "tie_word_embeddings": True,
    "attention_qkv_bias": False,
    "attention_o_bias": False,
    "attention_qk_norm": True,
    "codebook_size": 4096,
    "num_codebooks": 10,
    "n_fast_layer": 4,
    "fast_dim": 1024,
    "fast_n_head": 16,
    "fast_n_local_heads": 8,
    "fast_head_dim": 64,
    "fast_intermediate_size": 3072,
    "fast_attention_qkv_bias": False,
    "fast_attention_o_bias": False,
    "fast_attention_qk_norm": False,
    "scale_codebook_embeddings": True,
    "is_reward_model": False,
    **_TRAINING,
}
_S2_COMMON = {
    "n_head": 32,
    "n_local_heads": 8,
    "head_dim": 128,
    "dim": 2560,
    "intermediate_size": 9728,
    "rope_base": 1000000,
    "norm_eps": 1e-6,
    "attention_qkv_bias": False,
    "attention_o_bias": False,
    **_TRAINING,
}
_S2: dict[str, Any] = {
    "model_type": "fish_qwen3_omni",
    "dtype": "bfloat16",
    "text_config": {
        "model_type": "fish_qwen3",
        "vocab_size": 155776,
        "n_layer": 36,
        "max_seq_len": 32768,
        "tie_word_embeddings": True,
        "attention_qk_norm": True,
        **_S2_COMMON,
    },
    "audio_decoder_config": {
        "model_type": "fish_qwen3_audio_decoder",
        "vocab_size": 4096,
        "num_codebooks": 10,
        "n_layer": 4,
        "max_seq_len": 11,
        "tie_word_embeddings": False,
        "attention_qk_norm": False,
        "text_dim": 2560,
        **_S2_COMMON,
    },
    "eos_token_id": 151645,
    "pad_token_id": 151669,
    "audio_pad_token_id": 151677,
    "semantic_start_token_id": 151678,
    "semantic_end_token_id": 155773,
}

_SMALL = {"n_layer": 2, "n_fast_layer": 2, "n_head": 4, "n_local_heads": 2, "head_dim": 16, "dim": 64, "intermediate_size": 128}
_SMALL_FAST = {"fast_dim": 64, "fast_n_head": 4, "fast_n_local_heads": 2, "fast_head_dim": 16, "fast_intermediate_size": 128}
_SMALL_NESTED = {name: value for name, value in _SMALL.items() if name != "n_fast_layer"}
_SMALL_FIREFLY = {
    "backbone": {"depths": [1, 1, 1, 1], "dims": [8, 16, 16, 64]},
    "head": {"num_mels": 64, "upsample_initial_channel": 64},
    "quantizer": {"input_dim": 64},
}
_SMALL_TRANSFORMER = {"n_layer": 2, "n_head": 4, "dim": 64, "intermediate_size": 128, "head_dim": 16}
_SMALL_MODULE = {"window_size": 16, "input_dim": 64, "config": _SMALL_TRANSFORMER}
SMALL_DAC = {
    "encoder_dim": 4,
    "decoder_dim": 64,
    "encoder_transformer_layers": [0, 0, 0, 1],
    "quantizer": {"input_dim": 64, "pre_module": _SMALL_MODULE, "post_module": _SMALL_MODULE},
}


@dataclass(frozen=True, slots=True)
class Release:
    """The configs and file names of one family's checkpoint folder."""

    config: dict[str, Any]
    """config.json."""
    tiny: dict[str, Any]
    """Changes of config.json for a small checkpoint."""
    text_tokens: int
    """Tokens below the control tokens of `tokenizer.tiktoken` or of S2's `tokenizer.json`; for 1.2 and 1.4, all tokens."""
    codec: str
    """File name of the codec."""
    tiny_codec: dict[str, Any]
    """Changes of the codec's config for a small checkpoint."""
    tokenizer_file: str


def _firefly(rows: int, rate: int) -> str:
    return f"firefly-gan-vq-fsq-{rows}x1024-{rate}hz-generator.pth"


FAMILIES = {
    "1.2": Release(_FISH_1_2, _SMALL, 32000, _firefly(4, 42), _SMALL_FIREFLY, "tokenizer.json"),
    "1.4": Release(_FISH_1_4, _SMALL, 32000, _firefly(8, 21), _SMALL_FIREFLY, "tokenizer.json"),
    "1.5": Release(_FISH_1_5, _SMALL, 100000, _firefly(8, 21), _SMALL_FIREFLY, "tokenizer.tiktoken"),
    "s1": Release(_S1, {**_SMALL, **_SMALL_FAST}, 151643, "codec.pth", SMALL_DAC, "tokenizer.tiktoken"),
    "s2": Release(
        _S2,
        {"text_config": _SMALL_NESTED, "audio_decoder_config": _SMALL_NESTED},
        151643,
        "codec.pth",
        SMALL_DAC,
        "tokenizer.json",
    ),
}


def overlaid(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a config with the values of `changes`, section by section."""
    found = copy.deepcopy(base)
    for name, value in changes.items():
        found[name] = overlaid(found[name], value) if isinstance(value, dict) and isinstance(found.get(name), dict) else value
    return found
