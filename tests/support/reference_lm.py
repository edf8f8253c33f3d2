"""A reference of the language model in plain numpy and float64: no cache, one sequence, every position at once.

It is written from the rules of the models, not from fishrt's modules, for tests of configurations without golden vectors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

Weights = Mapping[str, np.ndarray]


def slow_forward(
    config: Mapping[str, Any], weights: Weights, prompt: np.ndarray, begin: int, end: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return logits [T, vocabulary] and hidden for the fast AR [T, fast_dim] of prompt int64 [1 + C, T]. config: flat names."""
    main, codes = prompt[0], prompt[1:]
    x = weights["embeddings.weight"][main]
    for i, row in enumerate(codes):
        audio = (begin <= main) & (main <= end)
        x = x + audio[:, None] * weights["codebook_embeddings.weight"][i * config["codebook_size"] + row]
    if config["scale_codebook_embeddings"]:
        x = np.where(audio[:, None], x / np.sqrt(len(codes) + 1), x)
    for i in range(config["n_layer"]):
        x = _block(config, weights, f"layers.{i}.", x, "")
    normed = _rms(x, weights["norm.weight"], config["norm_eps"])
    head = weights["embeddings.weight" if config["tie_word_embeddings"] else "output.weight"]
    hidden = normed if config["norm_fastlayer_input"] else x
    if "fast_project_in.weight" in weights:
        hidden = hidden @ weights["fast_project_in.weight"].T + weights["fast_project_in.bias"]
    return normed @ head.T, hidden


def fast_forward(config: Mapping[str, Any], weights: Weights, hidden: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Return logits [C, codebook_size] of hidden [fast_dim] and all codes but the last, int64 [C − 1]."""
    x = np.concatenate([hidden[None], weights["fast_embeddings.weight"][codes]])
    for i in range(config["n_fast_layer"]):
        x = _block(config, weights, f"fast_layers.{i}.", x, "fast_")
    return _rms(x, weights["fast_norm.weight"], config["norm_eps"]) @ weights["fast_output.weight"].T


def _block(config: Mapping[str, Any], weights: Weights, name: str, x: np.ndarray, half: str) -> np.ndarray:
    eps = config["norm_eps"]
    heads, kv_heads, width = (config[f"{half}{key}"] for key in ("n_head", "n_local_heads", "head_dim"))
    n = _rms(x, weights[f"{name}attention_norm.weight"], eps)
    mixed = _linear(weights, f"{name}attention.wqkv", n).reshape(len(x), heads + 2 * kv_heads, width)
    q, k, v = mixed[:, :heads], mixed[:, heads : heads + kv_heads], mixed[:, heads + kv_heads :]
    if config[f"{half}attention_qk_norm"]:
        q = _rms(q, weights[f"{name}attention.q_norm.weight"], eps)
        k = _rms(k, weights[f"{name}attention.k_norm.weight"], eps)
    q, k = (_rotate(part, config["rope_base"]) for part in (q, k))
    seen = np.tril(np.ones((len(x), len(x)), bool))
    out = np.empty_like(q)
    for head in range(heads):
        shared = head // (heads // kv_heads)
        scores = np.where(seen, q[:, head] @ k[:, shared].T / np.sqrt(width), -np.inf)
        exp = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[:, head] = exp / exp.sum(axis=1, keepdims=True) @ v[:, shared]
    x = x + _linear(weights, f"{name}attention.wo", out.reshape(len(x), -1))
    n = _rms(x, weights[f"{name}ffn_norm.weight"], eps)
    gate = n @ weights[f"{name}feed_forward.w1.weight"].T
    return (
        x
        + (gate / (1 + np.exp(-gate)) * (n @ weights[f"{name}feed_forward.w3.weight"].T))
        @ weights[f"{name}feed_forward.w2.weight"].T
    )


def _linear(weights: Weights, name: str, x: np.ndarray) -> np.ndarray:
    return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)


def _rms(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight


def _rotate(x: np.ndarray, base: float) -> np.ndarray:
    """Return x [T, heads, width] with rotary positions, of interleaved pairs."""
    length, _, width = x.shape
    angle = np.arange(length)[:, None] * base ** (-2.0 * np.arange(width // 2) / width)
    cos, sin = (_bfloat16(f(angle))[:, None] for f in (np.cos, np.sin))
    out = np.empty_like(x)
    out[..., 0::2] = x[..., 0::2] * cos - x[..., 1::2] * sin
    out[..., 1::2] = x[..., 1::2] * cos + x[..., 0::2] * sin
    return out


def _bfloat16(x: np.ndarray) -> np.ndarray:
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32).astype(np.float64)
