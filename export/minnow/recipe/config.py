"""Sizes of the embedded voice: a codec of the DAC kind at 25 frames a second and a dual-AR model, five million weights."""

from __future__ import annotations

from typing import Any

SAMPLE_RATE = 16_000
HOP = 640
FEATURE_HOP = 160
"""Samples per step of the encoder's output: four steps per frame."""
DELAY = 320
"""Lag of the codec's output in samples: causal layers need this much of the future to place a sound."""


def _transformer(layers: int) -> dict[str, Any]:
    config = {"block_size": 4096, "n_layer": layers, "n_head": 4, "dim": 128, "intermediate_size": 384, "n_local_heads": -1}
    return {
        "causal": True,
        "window_size": 64,
        "input_dim": 128,
        "config": {**config, "head_dim": 32, "rope_base": 10000, "norm_eps": 1e-5, "channels_first": True},
    }


CODEC: dict[str, Any] = {
    "sample_rate": SAMPLE_RATE,
    "encoder_dim": 16,
    "encoder_rates": [4, 5, 8],
    "decoder_dim": 192,
    "decoder_rates": [2, 4, 4, 5],
    "encoder_transformer_layers": [0, 0, 0],
    "decoder_transformer_layers": [0, 0, 0, 0],
    "transformer_general_config": {
        "block_size": 4096,
        "n_local_heads": -1,
        "head_dim": 64,
        "rope_base": 10000,
        "norm_eps": 1e-5,
        "channels_first": True,
    },
    "quantizer": {
        "input_dim": 128,
        "n_codebooks": 7,
        "codebook_size": 256,
        "codebook_dim": 8,
        "semantic_codebook_size": 256,
        "downsample_factor": [2, 2],
        "pre_module": _transformer(1),
        "post_module": _transformer(2),
    },
}

LANGUAGE_MODEL: dict[str, Any] = {
    "model_type": "fish_qwen3_omni",
    "dtype": "bfloat16",
    "text_config": {
        "model_type": "fish_qwen3",
        "dim": 256,
        "n_layer": 6,
        "n_head": 4,
        "n_local_heads": 2,
        "head_dim": 64,
        "intermediate_size": 480,
        "rope_base": 10000,
        "norm_eps": 1e-6,
        "max_seq_len": 2048,
        "tie_word_embeddings": True,
        "attention_qkv_bias": False,
        "attention_o_bias": False,
        "attention_qk_norm": True,
    },
    "audio_decoder_config": {
        "model_type": "fish_qwen3_audio_decoder",
        "dim": 192,
        "n_layer": 2,
        "n_head": 3,
        "n_local_heads": 1,
        "head_dim": 64,
        "intermediate_size": 384,
        "rope_base": 10000,
        "norm_eps": 1e-6,
        "attention_qkv_bias": False,
        "attention_o_bias": False,
        "attention_qk_norm": False,
        "num_codebooks": 8,
        "vocab_size": 256,
    },
}
"""The `config.json` in the layout of Fish Audio S2-Pro; token ids and vocabulary size follow from the tokenizer."""

DEFAULTS: dict[str, Any] = {
    "chunk_bytes": 160,
    "voice_seconds": [2.0, 5.0],
    "sampling": {
        "temperature": 0.6,
        "top_p": 0.8,
        "top_k": 20,
        "repetition_aware": None,
        "repetition_penalty": None,
    },
    # The corpus has too few digits: "4 7 2" is read well, "12" mostly not.
    "reads": {"languages": ["en"], "characters": "abcdefghijklmnopqrstuvwxyz", "tags": []},
}
"""The content of the checkpoint's `fishrt.json`: the best settings for the voice, and the text that it reads well."""
