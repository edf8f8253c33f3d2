"""The modified DAC codec of OpenAudio S1 and Fish Audio S2: waveform ↔ one semantic and several residual codebooks.

    encode: audio → Encoder → downsample → pre_module → semantic VQ, then residual VQs → codes
    decode: codes → sum of codebook rows → post_module → upsample → Decoder → audio

Every layer is causal, so decoding the first t frames gives the first t · hop samples of the whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checkpoint import CODEC_CONFIG
from ..errors import ExportError
from ..fields import Fields
from .layers import CausalConv1d, CausalConvTranspose1d, ConvNeXtBlock, ResidualUnit, Snake, WindowTransformer

ENCODER_WINDOW = 512
"""Attention window of the encoder's transformer; fixed in the originals, whatever their config says."""
MAX_FRAMES = 4096
"""Longest sequence a codec graph takes, in frames (190 s at 21.5 Hz): the size of its rotary tables."""
HEAD = 64
"""Channels of the encoder's transformer for each of its heads."""

# The last lines: what only training uses, what is built and never used, and limits that are ours here (MAX_FRAMES).
_FIELDS = (
    "sample_rate",
    "encoder_dim",
    "encoder_rates",
    "decoder_dim",
    "decoder_rates",
    "latent_dim",
    "encoder_transformer_layers",
    "transformer_general_config",
    "quantizer",
    "decoder_transformer_layers",
)
_QUANTIZER_FIELDS = (
    "input_dim",
    "n_codebooks",
    "codebook_size",
    "codebook_dim",
    "semantic_codebook_size",
    "downsample_factor",
    "pre_module",
    "post_module",
    "quantizer_dropout",
)
_TRANSFORMER_FIELDS = (
    "n_layer",
    "n_head",
    "n_local_heads",
    "dim",
    "intermediate_size",
    "head_dim",
    "rope_base",
    "norm_eps",
    "channels_first",
    "block_size",
    "dropout_rate",
    "attn_dropout_rate",
)


@dataclass(frozen=True, slots=True)
class TransformerConfig:
    """A windowed transformer; `window` counts the position itself."""

    layers: int
    dim: int
    hidden: int
    heads: int
    head_dim: int
    window: int
    rope_base: float
    norm_eps: float

    def build(self, max_length: int) -> WindowTransformer:
        """The module, with rotary tables of `max_length` rows."""
        return WindowTransformer(
            layers=self.layers,
            dim=self.dim,
            hidden=self.hidden,
            heads=self.heads,
            head_dim=self.head_dim,
            window=self.window,
            rope_base=self.rope_base,
            norm_eps=self.norm_eps,
            max_length=max_length,
        )


@dataclass(frozen=True, slots=True)
class DacConfig:
    """Sizes of a codec. Rates are strides; their product times that of `downsample` is the hop in samples."""

    sample_rate: int
    encoder_dim: int
    encoder_rates: tuple[int, ...]
    decoder_dim: int
    decoder_rates: tuple[int, ...]
    latent_dim: int
    encoder_transformers: tuple[TransformerConfig | None, ...]
    pre_module: TransformerConfig
    post_module: TransformerConfig
    downsample: tuple[int, ...]
    semantic_codebook_size: int
    codebook_size: int
    codebook_dim: int
    residual_codebooks: int

    @property
    def hop(self) -> int:
        """Samples per frame."""
        return math.prod(self.encoder_rates) * math.prod(self.downsample)

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Entries of each codebook, the semantic one first."""
        return (self.semantic_codebook_size, *[self.codebook_size] * self.residual_codebooks)

    @property
    def kind(self) -> str:
        """As a codec source tells it."""
        return "dac"

    @property
    def max_frames(self) -> int:
        """The rows of the rotary tables."""
        return MAX_FRAMES

    @property
    def sample_multiple(self) -> int:
        """Whole frames are encoded."""
        return self.hop

    @property
    def min_samples(self) -> int:
        """Any sound can be filled up to a frame."""
        return 1

    @property
    def context(self) -> None:
        """Attention layer upon layer, and positions counted from the start: every earlier frame counts."""
        return None

    @property
    def sight(self) -> int:
        """Frames of the longest attention window, rounded up."""
        windows, rate = [self.pre_module.window, self.post_module.window], self.hop  # rate: positions a frame
        for stride, transformer in zip(self.encoder_rates, self.encoder_transformers, strict=True):
            rate //= stride
            if transformer:
                windows.append(-(-transformer.window // rate))
        return max(windows)

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> DacConfig:
        """Reads the originals' field names. Raises ExportError for a missing, mistyped, contradictory or unknown field."""
        read = Fields(config, CODEC_CONFIG)
        quantizer, general = read.section("quantizer"), read.section("transformer_general_config")
        read.only(_FIELDS)
        quantizer.only(_QUANTIZER_FIELDS)
        _check_common(general)
        rates, depths = read.counts("encoder_rates"), read.counts("encoder_transformer_layers", least=0)
        if len(depths) != len(rates):
            raise read.error("encoder_transformer_layers", f"one number for each of the {len(rates)} encoder_rates")
        width = read.count("encoder_dim")
        self = cls(
            sample_rate=read.count("sample_rate"),
            encoder_dim=width,
            encoder_rates=rates,
            decoder_dim=read.count("decoder_dim"),
            decoder_rates=read.counts("decoder_rates"),
            latent_dim=width * 2 ** len(rates) if config.get("latent_dim") is None else read.count("latent_dim"),
            encoder_transformers=tuple(_in_encoder(general, n, width * 2**block) for block, n in enumerate(depths, start=1)),
            pre_module=_transformer(quantizer.section("pre_module")),
            post_module=_transformer(quantizer.section("post_module")),
            downsample=quantizer.counts("downsample_factor"),
            semantic_codebook_size=quantizer.count("semantic_codebook_size"),
            codebook_size=quantizer.count("codebook_size"),
            codebook_dim=quantizer.count("codebook_dim"),
            residual_codebooks=quantizer.count("n_codebooks"),
        )
        if math.prod(self.decoder_rates) != math.prod(rates):
            raise read.error("decoder_rates", f"numbers with the product of encoder_rates, {math.prod(rates)}")
        if self.decoder_dim % 2 ** len(self.decoder_rates):
            raise read.error("decoder_dim", "a number that can be halved once for each of decoder_rates")
        for part in (quantizer, quantizer.section("pre_module"), quantizer.section("post_module")):
            if part.count("input_dim") != self.latent_dim:
                raise part.error("input_dim", f"the encoder's width, {self.latent_dim}")
        return self


def _in_encoder(general: Fields, layers: int, dim: int) -> TransformerConfig | None:
    """The transformer of one block of the encoder, if it has one. Its number of heads does not depend on their size."""
    if not layers:
        return None
    if dim < HEAD:
        raise ExportError(f"{general.source}: encoder_transformer_layers has one of width {dim}; expected at least {HEAD}")
    return TransformerConfig(
        layers=layers,
        dim=dim,
        hidden=3 * dim,
        heads=dim // HEAD,
        head_dim=_head_dim(general) if "head_dim" in general.values else HEAD,
        window=ENCODER_WINDOW,
        rope_base=general.number("rope_base"),
        norm_eps=general.number("norm_eps"),
    )


def _transformer(module: Fields) -> TransformerConfig:
    module.only(("input_dim", "window_size", "config", "causal"))
    if module.values.get("causal", True) is not True:
        raise module.error("causal", "true")
    config = module.section("config")
    _check_common(config)
    if config.count("dim") != module.count("input_dim"):
        raise config.error("dim", f"the input_dim around it, {module.count('input_dim')}")
    return TransformerConfig(
        layers=config.count("n_layer"),
        dim=config.count("dim"),
        hidden=config.count("intermediate_size"),
        heads=config.count("n_head"),
        head_dim=_head_dim(config),
        window=module.count("window_size"),
        rope_base=config.number("rope_base"),
        norm_eps=config.number("norm_eps"),
    )


def _check_common(config: Fields) -> None:
    """What every transformer's config may say."""
    config.only(_TRANSFORMER_FIELDS)
    if config.values.get("n_local_heads", -1) not in (-1, config.values.get("n_head", -1)):
        raise config.error("n_local_heads", "-1, as many as n_head")
    if config.values.get("channels_first", True) is not True:
        raise config.error("channels_first", "true")


def _head_dim(config: Fields) -> int:
    size = config.count("head_dim")
    if size % 2:
        raise config.error("head_dim", "an even number: rotary positions need pairs")
    return size


class EncoderBlock(nn.Module):
    """Three residual units, then a strided convolution that doubles the channels, then perhaps a transformer."""

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
            blocks.append(EncoderBlock(channels, stride, transformer.build(length) if transformer else None))
            channels *= 2
        self.block = nn.Sequential(*blocks, Snake(channels), CausalConv1d(channels, config.latent_dim, 3))

    def forward(self, audio: Tensor) -> Tensor:
        return cast(Tensor, self.block(audio))


class DecoderBlock(nn.Module):
    """A transposed convolution that halves the channels, then three residual units."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        half = channels // 2
        self.block = nn.Sequential(
            Snake(channels),
            CausalConvTranspose1d(channels, half, 2 * stride, stride),
            *(ResidualUnit(half, dilation) for dilation in (1, 3, 9)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.block(x))


class Decoder(nn.Module):
    """features [batch, latent_dim, n] → audio [batch, 1, n · product of the rates], within −1..1."""

    def __init__(self, config: DacConfig) -> None:
        super().__init__()
        channels = config.decoder_dim
        blocks: list[nn.Module] = [CausalConv1d(config.latent_dim, channels, 7)]
        for stride in config.decoder_rates:
            blocks.append(DecoderBlock(channels, stride))
            channels //= 2
        self.model = nn.Sequential(*blocks, Snake(channels), CausalConv1d(channels, 1, 7))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.model(x))


class VectorQuantizer(nn.Module):
    """One codebook, searched by cosine similarity in a space of few dimensions."""

    def __init__(self, dim: int, size: int, codebook_dim: int) -> None:
        super().__init__()
        self.in_proj = nn.Conv1d(dim, codebook_dim, 1)
        self.out_proj = nn.Conv1d(codebook_dim, dim, 1)
        self.codebook = nn.Embedding(size, codebook_dim)

    def project(self, z: Tensor) -> Tensor:
        """z [batch, dim, n] → its place in codebook space, [batch, codebook_dim, n]."""
        return cast(Tensor, self.in_proj(z))

    def nearest(self, e: Tensor) -> Tensor:
        """Index of the codebook row most like e by cosine: int64 [batch, n]; a tie goes to the lowest index."""
        rows = F.normalize(self.codebook.weight, dim=1)
        return (F.normalize(e, dim=1).transpose(1, 2) @ rows.T).argmax(dim=-1)

    def lookup(self, indices: Tensor) -> Tensor:
        """indices int64 [batch, n] → features [batch, dim, n]. Indices past the end mean the last row, −1 means nothing."""
        rows = self.codebook(indices.clamp(0, self.codebook.num_embeddings - 1))
        features: Tensor = self.out_proj(rows.transpose(1, 2))
        return features * (indices >= 0).unsqueeze(1).to(features.dtype)


class QuantizerStack(nn.Module):
    """Codebooks one after another, each coding what the ones before left over."""

    def __init__(self, dim: int, count: int, size: int, codebook_dim: int) -> None:
        super().__init__()
        self.quantizers = nn.ModuleList(VectorQuantizer(dim, size, codebook_dim) for _ in range(count))


class Quantizer(nn.Module):
    """Features at the encoder's rate ↔ codes at the frame rate."""

    def __init__(self, config: DacConfig, max_frames: int) -> None:
        super().__init__()
        dim = config.latent_dim
        self.downsample = nn.Sequential(
            *(nn.Sequential(CausalConv1d(dim, dim, f, stride=f), ConvNeXtBlock(dim)) for f in config.downsample)
        )
        self.pre_module = config.pre_module.build(max_frames)
        self.semantic_quantizer = QuantizerStack(dim, 1, config.semantic_codebook_size, config.codebook_dim)
        self.quantizer = QuantizerStack(dim, config.residual_codebooks, config.codebook_size, config.codebook_dim)
        self.post_module = config.post_module.build(max_frames)
        self.upsample = nn.Sequential(
            *(nn.Sequential(CausalConvTranspose1d(dim, dim, f, f), ConvNeXtBlock(dim)) for f in reversed(config.downsample))
        )

    @property
    def codebooks(self) -> list[VectorQuantizer]:
        """All codebooks in code order, the semantic one first."""
        return [cast(VectorQuantizer, q) for q in (*self.semantic_quantizer.quantizers, *self.quantizer.quantizers)]

    def encode(self, features: Tensor) -> Tensor:
        """[batch, dim, frames·downsampling] → codes int64 [batch, codebooks, frames]."""
        residual = self.pre_module(self.downsample(features))
        codes = []
        for quantizer in self.codebooks:
            indices = quantizer.nearest(quantizer.project(residual))
            residual = residual - quantizer.lookup(indices)
            codes.append(indices)
        return torch.stack(codes, dim=1)

    def dequantize(self, codes: Tensor) -> Tensor:
        """codes int64 [batch, codebooks, frames] → [batch, dim, frames]. A code of −1 contributes nothing."""
        return torch.stack([q.lookup(codes[:, i]) for i, q in enumerate(self.codebooks)]).sum(dim=0)

    def decode(self, codes: Tensor) -> Tensor:
        """codes → features [batch, dim, frames·downsampling] for the decoder."""
        return cast(Tensor, self.upsample(self.post_module(self.dequantize(codes))))


class Dac(nn.Module):
    """The whole codec. The weights are plain: weight norm is fused when a checkpoint is read."""

    def __init__(self, config: DacConfig, max_frames: int = MAX_FRAMES) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config, max_frames)
        self.quantizer = Quantizer(config, max_frames)
        self.decoder = Decoder(config)

    def encode(self, audio: Tensor) -> Tensor:
        """audio float32 [batch, 1, frames·hop], −1..1 → codes int64 [batch, codebooks, frames]."""
        return self.quantizer.encode(self.encoder(audio))

    def decode(self, codes: Tensor) -> Tensor:
        """codes int64 [batch, codebooks, frames] → audio float32 [batch, 1, frames·hop]."""
        return cast(Tensor, self.decoder(self.quantizer.decode(codes)))
