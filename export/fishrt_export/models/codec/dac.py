"""The modified DAC codec of OpenAudio S1 and Fish Audio S2: waveform ↔ one semantic and several residual codebooks.

    encode: audio → Encoder → downsample → pre_module → semantic VQ, then residual VQs → codes
    decode: codes → sum of codebook rows → post_module → upsample → Decoder → audio

Every layer is causal, so decoding the first t frames gives the first t · hop samples of the whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .carry import Carry, Carrying, Chain
from .dac_config import MAX_FRAMES, DacConfig
from .layers import CausalConv1d, CausalConvTranspose1d, ResidualUnit, Snake, WindowTransformer, downsampling, upsampling


class EncoderBlock(nn.Module):
    """Three residual units, a strided convolution that doubles the channels, and a transformer if there is one."""

    def __init__(self, channels: int, stride: int, transformer: WindowTransformer | None) -> None:
        super().__init__()
        units = [ResidualUnit(channels, dilation) for dilation in (1, 3, 9)]
        down = CausalConv1d(channels, 2 * channels, 2 * stride, stride=stride)
        self.block = nn.Sequential(*units, Snake(channels), down, *([transformer] if transformer else []))

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.block(x))


class Encoder(nn.Module):
    """audio [batch, 1, frames·hop] → features [batch, latent_dim, frames·downsampling]."""

    def __init__(self, config: DacConfig, max_frames: int) -> None:
        super().__init__()
        channels, length = config.encoder_dim, max_frames * config.hop
        blocks: list[nn.Module] = [CausalConv1d(1, channels, 7)]
        for stride, transformer in zip(config.encoder_rates, config.encoder_transformers, strict=True):
            length //= stride
            blocks.append(EncoderBlock(channels, stride, WindowTransformer(transformer, length) if transformer else None))
            channels *= 2
        self.block = nn.Sequential(*blocks, Snake(channels), CausalConv1d(channels, config.latent_dim, 3))

    def forward(self, audio: Tensor) -> Tensor:
        return cast(Tensor, self.block(audio))


class DecoderBlock(Carrying):
    """A transposed convolution that halves the channels, rounding down, then three residual units."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        half = channels // 2
        self.block = Chain(
            Snake(channels),
            CausalConvTranspose1d(channels, half, 2 * stride, stride),
            *(ResidualUnit(half, dilation) for dilation in (1, 3, 9)),
        )

    def forward(self, x: Tensor, carry: Carry | None = None) -> Tensor:
        return cast(Tensor, self.block(x, carry))


class Decoder(nn.Module):
    """features [batch, latent_dim, n] → audio [batch, 1, n · product of the rates], within −1..1."""

    def __init__(self, config: DacConfig) -> None:
        super().__init__()
        channels = config.decoder_dim
        blocks: list[nn.Module] = [CausalConv1d(config.latent_dim, channels, 7, by_rows=True)]
        for stride in config.decoder_rates:
            blocks.append(DecoderBlock(channels, stride))
            channels //= 2
        self.model = Chain(*blocks, Snake(channels), CausalConv1d(channels, 1, 7))

    def forward(self, x: Tensor, carry: Carry | None = None) -> Tensor:
        return torch.tanh(self.model(x, carry))


class VectorQuantizer(nn.Module):
    """One codebook, searched by cosine similarity in a space of few dimensions."""

    def __init__(self, dim: int, size: int, codebook_dim: int) -> None:
        super().__init__()
        self.in_proj = nn.Conv1d(dim, codebook_dim, 1)
        self.out_proj = nn.Conv1d(codebook_dim, dim, 1)
        self.codebook = nn.Embedding(size, codebook_dim)

    def project(self, z: Tensor) -> Tensor:
        """Project z [batch, dim, n] into codebook space, [batch, codebook_dim, n]."""
        return cast(Tensor, self.in_proj(z))

    def nearest(self, e: Tensor) -> Tensor:
        """Return the index of the codebook row with the largest cosine to e, int64 [batch, n]; of a tie, the lowest index."""
        rows = F.normalize(self.codebook.weight, dim=1)
        return (F.normalize(e, dim=1).transpose(1, 2) @ rows.T).argmax(dim=-1)

    def lookup(self, indices: Tensor) -> Tensor:
        """Return features [batch, dim, n] of indices int64 [batch, n]. Indices past the end mean the last row, −1 means zeros."""
        rows = self.codebook(indices.clamp(0, self.codebook.num_embeddings - 1))
        features: Tensor = F.linear(rows, self.out_proj.weight[..., 0], self.out_proj.bias).transpose(1, 2)
        return features * (indices >= 0).unsqueeze(1).to(features.dtype)


class QuantizerStack(nn.Module):
    """Successive codebooks, each of which codes the residual of the ones before."""

    def __init__(self, dim: int, count: int, size: int, codebook_dim: int) -> None:
        super().__init__()
        self.quantizers = nn.ModuleList(VectorQuantizer(dim, size, codebook_dim) for _ in range(count))


class Quantizer(nn.Module):
    """Features at the encoder's rate ↔ codes at the frame rate."""

    def __init__(self, config: DacConfig, max_frames: int) -> None:
        super().__init__()
        dim = config.latent_dim
        self.downsample = downsampling(dim, config.downsample)
        self.pre_module = WindowTransformer(config.pre_module, max_frames)
        self.semantic_quantizer = QuantizerStack(dim, 1, config.semantic_codebook_size, config.codebook_dim)
        self.quantizer = QuantizerStack(dim, config.residual_codebooks, config.codebook_size, config.codebook_dim)
        self.post_module = WindowTransformer(config.post_module, max_frames)
        self.upsample = upsampling(dim, config.downsample)

    @property
    def codebooks(self) -> list[VectorQuantizer]:
        """Return all codebooks in code order, the semantic one first."""
        return [cast(VectorQuantizer, q) for q in (*self.semantic_quantizer.quantizers, *self.quantizer.quantizers)]

    def encode(self, features: Tensor) -> Tensor:
        """Return codes int64 [batch, codebooks, frames] of features [batch, dim, frames·downsampling]."""
        return torch.stack([indices for indices, _ in self.search(features)], dim=1)

    def quantise(self, features: Tensor) -> Tensor:
        """Return the sum of the nearest codebook rows [batch, dim, frames] of features [batch, dim, frames·downsampling]."""
        return torch.stack([found for _, found in self.search(features)]).sum(dim=0)

    def search(self, features: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the indices int64 [batch, frames] of each codebook, and what they add to the sum, [batch, dim, frames]."""
        residual = self.pre_module(self.downsample(features))
        for quantizer in self.codebooks:
            indices = quantizer.nearest(quantizer.project(residual))
            found = quantizer.lookup(indices)
            residual = residual - found
            yield indices, found

    def dequantize(self, codes: Tensor) -> Tensor:
        """Return features [batch, dim, frames] of codes int64 [batch, codebooks, frames]. A code of −1 adds zeros."""
        return torch.stack([q.lookup(codes[:, i]) for i, q in enumerate(self.codebooks)]).sum(dim=0)

    def decode(self, codes: Tensor, carry: Carry | None = None) -> Tensor:
        """Return the decoder's features [batch, dim, frames·downsampling] of codes int64 [batch, codebooks, frames]."""
        return self.spread(self.dequantize(codes), carry)

    def spread(self, x: Tensor, carry: Carry | None = None) -> Tensor:
        """Return the decoder's features [batch, dim, frames·downsampling] of a sum of codebook rows [batch, dim, frames]."""
        return cast(Tensor, self.upsample(self.post_module(x, carry), carry))


class Dac(nn.Module):
    """The whole codec. Its weights have no weight norm, which is fused when a checkpoint is read."""

    def __init__(self, config: DacConfig, max_frames: int = MAX_FRAMES) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config, max_frames)
        self.quantizer = Quantizer(config, max_frames)
        self.decoder = Decoder(config)

    def encode(self, audio: Tensor) -> Tensor:
        """Return codes int64 [batch, codebooks, frames] of audio float32 [batch, 1, frames·hop], −1..1."""
        return self.quantizer.encode(self.encoder(audio))

    def decode(self, codes: Tensor, carry: Carry | None = None) -> Tensor:
        """Return audio float32 [batch, 1, frames·hop] of codes int64 [batch, codebooks, frames]."""
        return cast(Tensor, self.decoder(self.quantizer.decode(codes, carry), carry))
