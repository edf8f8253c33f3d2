"""Keys and values of all layers of the denoiser, computed once: of the text, of the voice, of the latents before a block.

tokens ───► embedding ─┐
latents ─► patches / 6 ─┴► encoder ─► norm ─► for each layer of the denoiser: keys, normed as its own, and values
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from fishrt_engines.engine import GraphSpec, TensorSpec

from .config import NORM_EPS, EchoConfig, EncoderSizes
from .layers import EncoderBlock, HeadNorm, Rotary, rotate

_LATENT_SCALE = 6.0
"""Patches of latents are divided by it behind their projection."""


class KeysValues(nn.Module):
    """Keys and values of one layer of the denoiser."""

    def __init__(self, config: EchoConfig, dim: int) -> None:
        super().__init__()
        self.wk, self.wv = (nn.Linear(dim, config.heads * config.head_dim, bias=False) for _ in range(2))
        self.k_norm = HeadNorm(config.heads, config.head_dim)

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values [batch, heads, n, head_dim] of states [batch, n, dim]."""
        k, v = (layer(states).unflatten(-1, self.k_norm.weight.shape) for layer in (self.wk, self.wv))
        return self.k_norm(k).transpose(1, 2), v.transpose(1, 2)


class Condition(nn.Module):
    """An encoder, its norm, and the keys and values for all layers of the denoiser."""

    def __init__(self, config: EchoConfig, sizes: EncoderSizes, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.rotary = encoder, Rotary(sizes.head_dim)
        self.norm = nn.RMSNorm(sizes.dim, eps=NORM_EPS)
        self.layers = nn.ModuleList(KeysValues(config, sizes.dim) for _ in range(config.layers))

    def encode(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return the states [batch, n, dim] of the first block's input. mask: bool, broadcast to [batch, 1, n, n]."""
        cos, sin = self.rotary(torch.arange(x.shape[1], device=x.device).unsqueeze(0).expand(x.shape[0], -1))
        for block in cast(nn.ModuleList, self.encoder.blocks):
            x = block(x, cos, sin, mask)
        return cast(Tensor, self.norm(x))

    def project(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values [batch, layers, heads, n, head_dim] of the encoder's states, without positions."""
        keys, values = zip(*(layer(states) for layer in self.layers), strict=True)
        return torch.stack(keys, dim=1), torch.stack(values, dim=1)


class TextEncoder(nn.Module):
    """Weights of the encoder of text."""

    def __init__(self, vocabulary: int, sizes: EncoderSizes) -> None:
        super().__init__()
        self.text_embedding = nn.Embedding(vocabulary, sizes.dim)
        self.blocks = nn.ModuleList(EncoderBlock(sizes) for _ in range(sizes.layers))


class TextCondition(Condition):
    """Keys and values of text. Every token sees all that are not masked."""

    def __init__(self, config: EchoConfig) -> None:
        super().__init__(config, config.text, TextEncoder(config.vocabulary, config.text))

    def states(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Return [batch, tokens, dim] of tokens int64 [batch, tokens] and mask bool [batch, tokens]."""
        embedding = cast(nn.Embedding, self.encoder.text_embedding)
        return self.encode(embedding(tokens), mask[:, None, None].expand(-1, 1, tokens.shape[1], -1))

    def forward(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return self.project(self.states(tokens, mask))


class LatentEncoder(nn.Module):
    """Weights of an encoder of latents."""

    def __init__(self, inputs: int, sizes: EncoderSizes) -> None:
        super().__init__()
        self.in_proj = nn.Linear(inputs, sizes.dim)
        self.blocks = nn.ModuleList(EncoderBlock(sizes) for _ in range(sizes.layers))


class LatentCondition(Condition):
    """Keys and values of latents, a position for each patch. A patch sees itself and those before it.

    positions: whether keys have rotary positions, on half of the heads: those of the patches' first frames.
    """

    def __init__(self, config: EchoConfig, sizes: EncoderSizes, *, positions: bool) -> None:
        super().__init__(config, sizes, LatentEncoder(config.patch * config.channels, sizes))
        self.patch, self.turned = config.patch, config.heads // 2 if positions else 0
        self.key_rotary = Rotary(config.head_dim)

    def states(self, latents: Tensor) -> Tensor:
        """Return [batch, patches, dim] of latents [batch, frames, channels]."""
        patches = latents.reshape(latents.shape[0], -1, self.patch * latents.shape[2])
        x = cast(nn.Linear, self.encoder.in_proj)(patches) / _LATENT_SCALE
        places = torch.arange(x.shape[1], device=x.device)
        mask = (places <= places.unsqueeze(1)).expand(x.shape[0], 1, -1, -1)
        return self.encode(x, mask)

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        states = self.states(latents)
        keys, values = self.project(states)
        if self.turned:
            places = torch.arange(keys.shape[3], device=keys.device) * self.patch
            cos, sin = self.key_rotary(places.unsqueeze(0).expand(keys.shape[0], -1))
            # Layers are like further heads: each turns its first half.
            keys = torch.stack([rotate(layer, cos, sin, self.turned) for layer in keys.unbind(1)], dim=1)
        return keys, values


def text_spec(config: EchoConfig) -> GraphSpec:
    """Return the inputs and outputs of the graph of TextCondition."""
    inputs = (TensorSpec("tokens", "int64", ("batch", "tokens")), TensorSpec("mask", "bool", ("batch", "tokens")))
    return GraphSpec("text_cond.onnx", inputs, keys_values(config, "text", "tokens"))


def latent_spec(config: EchoConfig, of: str) -> GraphSpec:
    """Return the input and outputs of the graph of LatentCondition. of: "speaker" or "latent"."""
    latents = TensorSpec("latents", "float32", ("batch", "frames", config.channels))
    return GraphSpec(f"{of}_cond.onnx", (latents,), keys_values(config, of, "patches"))


def keys_values(config: EchoConfig, of: str, length: str) -> tuple[TensorSpec, ...]:
    """Return the descriptions of keys and values of one kind for all layers. length: the dimension of positions."""
    shape = ("batch", config.layers, config.heads, length, config.head_dim)
    return tuple(TensorSpec(f"{of}_{kind}", "float32", shape) for kind in ("keys", "values"))
