"""The block that slow AR and fast AR share: pre-norm attention over a fixed-length KV cache, then SwiGLU.

Sub-module names are the checkpoint's. The cache is an input and an output of the graph. `Step` has the cache row of each column
and the mask, so that one graph serves prefill, chunked prefill and single steps of ragged batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checkpoint.config import StackConfig
from .stack import Stack

ONNX_OPSET = 24


class Step(NamedTuple):
    """The inputs of one call that all layers share."""

    cos: Tensor
    sin: Tensor
    position_ids: Tensor
    """int64 [batch, length]."""
    write_index: Tensor | int
    """int64 [batch], or one number for all: the cache row of the first column."""
    mask: Tensor
    """bool [batch, 1, length, cache]: True where a column attends to a row of the cache."""


class Attention(nn.Module):
    """Grouped-query attention. x [batch, length, dim], caches [batch, kv_heads, cache, head_dim]."""

    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        rows = (config.heads + 2 * config.kv_heads) * config.head_dim
        self.wqkv = nn.Linear(config.dim, rows, bias=config.qkv_bias)
        self.wo = nn.Linear(config.heads * config.head_dim, config.dim, bias=config.o_bias)
        norms = (nn.RMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else nn.Identity() for _ in range(2))
        self.q_norm, self.k_norm = norms

    def forward(self, x: Tensor, step: Step, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the output and the updated caches."""
        heads = self.wqkv(x).unflatten(-1, (-1, self.head_dim)).split([self.heads, self.kv_heads, self.kv_heads], dim=2)
        q, k, v = (part.transpose(1, 2) for part in (self.q_norm(heads[0]), self.k_norm(heads[1]), heads[2]))
        q, k = (apply_rope(part, step.cos, step.sin, step.position_ids) for part in (q, k))
        keys, values = scatter(keys, k, step.write_index), scatter(values, v, step.write_index)
        y = attend(q, keys, values, step.mask)
        return cast(Tensor, self.wo(y.transpose(1, 2).flatten(2))), keys, values


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) · w3 x)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.w2(F.silu(self.w1(x)) * self.w3(x)))


class Block(nn.Module):
    """One layer: attention and feed-forward, each with its norm and its residual connection."""

    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config.dim, config.hidden)
        self.ffn_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)

    def forward(self, x: Tensor, step: Step, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the output and the updated caches."""
        y, keys, values = self.attention(self.attention_norm(x), step, keys, values)
        x = x + y
        return x + cast(Tensor, self.feed_forward(self.ffn_norm(x))), keys, values


class Transformer(Stack):
    """Blocks with caches, the norm after them, and rotary tables of `max_length` rows."""

    SHARED, STREAM = ("position_ids", "write_index"), ("batch", "length")
    cos: Tensor
    sin: Tensor

    def __init__(self, config: StackConfig, max_length: int) -> None:
        super().__init__()
        self.width = config.dim
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        cos, sin = rope_table(max_length, config.head_dim, config.rope_base)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def run_layers(
        self, x: Tensor, position_ids: Tensor, write_index: Tensor, caches: Sequence[Tensor], layers: slice = slice(None)
    ) -> tuple[Tensor, list[Tensor]]:
        """Return x [batch, length, dim] after these blocks, without the norm, and their updated caches.

        `caches` has a key and a value tensor for each block, in turn.
        """
        rows = torch.arange(caches[0].shape[2], device=x.device)
        mask = rows <= position_ids.unsqueeze(1).unsqueeze(-1)
        step = Step(self.cos, self.sin, position_ids, write_index, mask)
        updated: list[Tensor] = []
        for layer, keys, values in zip(self.layers[layers], caches[0::2], caches[1::2], strict=True):
            x, keys, values = layer(x, step, keys, values)
            updated += (keys, values)
        return x, updated


def rope_table(rows: int, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Return cos and sin, each float32 [rows, head_dim/2], of angle = row · base^(−2m/head_dim).

    As in the originals, angles are rounded to float32 and tables to bfloat16, whatever the model's dtype. Tables with other
    rounding drift audibly over a long output.
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    theta = 1 / np.power(float(base), exponent, dtype=np.float64).astype(np.float32)
    angle = torch.from_numpy((np.arange(rows, dtype=np.float32)[:, None] * theta).astype(np.float64))
    return tuple(f(angle).to(torch.bfloat16).to(torch.float32) for f in (torch.cos, torch.sin))  # type: ignore[return-value]


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor) -> Tensor:
    """Rotate pairs (2m, 2m+1) of x [batch, heads, length, head_dim] by the table rows at position_ids int64 [batch, length]."""
    if torch.onnx.is_in_onnx_export():
        return torch.onnx.ops.rotary_embedding(x, cos, sin, position_ids, interleaved=True)
    c, s = cos[position_ids].unsqueeze(1).to(x.dtype), sin[position_ids].unsqueeze(1).to(x.dtype)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * c - odd * s, odd * c + even * s), dim=-1).flatten(-2)


def scatter(cache: Tensor, new: Tensor, write_index: Tensor | int) -> Tensor:
    """Return the cache with `new` written from row write_index[b] on.

    cache [batch, heads, rows, head_dim], new [batch, heads, length, head_dim], write_index int64 [batch] or one number for all.
    """
    if isinstance(write_index, int):
        write_index = torch.full(cache.shape[:1], write_index, device=cache.device)
    if torch.onnx.is_in_onnx_export():
        return torch.onnx.ops.symbolic(
            "TensorScatter",
            (cache, new, write_index),
            attrs={"axis": -2},
            dtype=cache.dtype,
            shape=cache.shape,
            version=ONNX_OPSET,
        )
    rows = write_index.unsqueeze(1) + torch.arange(new.shape[2], device=new.device)
    return cache.scatter(2, rows[:, None, :, None].expand_as(new), new)


def attend(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Return the attention of q [batch, heads, length, head_dim] over keys and values [batch, kv_heads, cache, head_dim].

    Query head j uses key head j // (heads / kv_heads).
    """
    if torch.onnx.is_in_onnx_export():
        return torch.onnx.ops.symbolic(
            "Attention", (q, keys, values, mask), attrs={"is_causal": 0}, dtype=q.dtype, shape=q.shape, version=ONNX_OPSET
        )
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=True)


def cache_names(layers: int) -> list[tuple[str, str]]:
    """Return the input and output name of every cache tensor, in the order of the modules' list of caches."""
    return [(f"{kind}_cache.{i}", f"{kind}_cache_out.{i}") for i in range(layers) for kind in ("key", "value")]
