"""The Firefly codec of Fish Speech 1.2 to 1.5: it codes a log-mel spectrogram, and a HiFi-GAN decodes the codes.

    encode: audio → LogMel → Backbone → downsample → grouped FSQ → codes
    decode: codes → FSQ entries → upsample → Head → audio

The convolutions are causal, or centred in the oldest release. In both, a sample depends only on a few frames around it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fishrt.bundle.features import DecodeContext

from ...checkpoint.config import Fields
from ...checkpoint.names import CODEC_CONFIG
from .carry import Carry, Carrying, through
from .dac_config import MAX_FRAMES
from .fsq import GroupedFSQ
from .layers import KERNEL, ConvNeXtBlock, conv1d, conv_transpose1d, downsampling, upsampling
from .mel import LogMel

_FIELDS = {
    "spec_transform": ("sample_rate", "n_mels", "n_fft", "hop_length", "win_length"),
    "backbone": ("input_channels", "depths", "dims", "kernel_size", "drop_path_rate"),
    "head": (
        *("hop_length", "upsample_rates", "upsample_kernel_sizes", "resblock_kernel_sizes", "resblock_dilation_sizes"),
        *("num_mels", "upsample_initial_channel", "pre_conv_kernel_size", "post_conv_kernel_size", "use_template"),
    ),
    "quantizer": ("input_dim", "n_codebooks", "n_groups", "levels", "downsample_factor"),
}


@dataclass(frozen=True, slots=True)
class FireflyConfig:
    """Sizes of a codec. `rates` are the strides of the head; their product is the hop of the spectrogram, in samples."""

    causal: bool
    sample_rate: int
    bands: int
    window: int
    mel_hop: int
    depths: tuple[int, ...]
    dims: tuple[int, ...]
    kernel: int
    rates: tuple[int, ...]
    rate_kernels: tuple[int, ...]
    block_kernels: tuple[int, ...]
    dilations: tuple[tuple[int, ...], ...]
    head_channels: int
    """Channels before the first of `rates`; each halves them, rounding down."""
    pre_kernel: int
    post_kernel: int
    groups: int
    residuals: int
    levels: tuple[int, ...]
    downsample: tuple[int, ...]

    max_frames: ClassVar[int] = MAX_FRAMES
    """The limit of the DAC: this codec has none of its own, but memory needs one."""
    sample_multiple: ClassVar[int] = 1
    """Any number of samples can be encoded."""

    @property
    def hop(self) -> int:
        """Return the samples of a frame."""
        return self.mel_hop * math.prod(self.downsample)

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Return the number of entries of each row of codes."""
        return (math.prod(self.levels),) * (self.groups * self.residuals)

    @property
    def kind(self) -> str:
        """Return the kind of the codec; see CodecSource.kind."""
        return "firefly" if self.causal else "centred firefly"

    @property
    def min_samples(self) -> int:
        """Return the samples that reflection padding needs, at least a step of the spectrogram, or a frame if not causal."""
        return max(-(-(self.window - self.mel_hop) // 2) + 1, self.mel_hop if self.causal else self.hop)

    @property
    def context(self) -> DecodeContext:
        """Return the frames before and after a frame that its samples depend on.

        The first and the last position that they depend on are followed back through the layers.
        """
        first, last = 0, self.hop - 1
        for kernel, stride in self._decoding_layers():
            if stride:  # transposed: output j depends on inputs ⌈(j + cut − kernel + 1) / stride⌉ … ⌊(j + cut) / stride⌋
                cut = 0 if self.causal else (kernel - stride) // 2
                first, last = -((kernel - 1 - cut - first) // stride), (last + cut) // stride
            else:
                first, last = (first - kernel + 1, last) if self.causal else (first - kernel // 2, last + kernel // 2)
        return DecodeContext(left=-first, ahead=last)

    @property
    def sight(self) -> int:
        """Return the number of frames around a frame that its samples depend on."""
        return self.context.left + self.context.ahead

    def _decoding_layers(self) -> list[tuple[int, int]]:
        """Return (kernel, stride) of the layers, the last first. Stride 0 is a convolution, or a row of them as one."""
        layers = [(self.post_kernel, 0)]
        reach = max(
            (kernel - 1) * (sum(row) + (sum(row) if self.causal else len(row)))
            for kernel, row in zip(self.block_kernels, self.dilations, strict=True)
        )
        for rate, kernel in zip(reversed(self.rates), reversed(self.rate_kernels), strict=True):
            layers += [(reach + 1, 0), (kernel, rate)]
        layers.append((self.pre_kernel, 0))
        for factor in self.downsample:
            layers += [(KERNEL, 0), (factor, factor)]
        return layers

    @classmethod
    def from_json(cls, config: Mapping[str, Any], *, causal: bool) -> FireflyConfig:
        """Read the originals' field names. Raises ExportError for a missing, mistyped, contradictory or unknown field."""
        read = Fields(config, CODEC_CONFIG)
        read.only(_FIELDS)
        spectrum, backbone, head, quantizer = (read.section(name) for name in _FIELDS)
        for part, known in zip((spectrum, backbone, head, quantizer), _FIELDS.values(), strict=True):
            part.only(known)
        kernels = head.counts("resblock_kernel_sizes")
        self = cls(
            causal=causal,
            sample_rate=spectrum.count("sample_rate"),
            bands=spectrum.count("n_mels"),
            window=spectrum.count("n_fft"),
            mel_hop=spectrum.count("hop_length"),
            depths=backbone.counts("depths", least=0),
            dims=backbone.counts("dims"),
            kernel=backbone.count("kernel_size"),
            rates=head.counts("upsample_rates"),
            rate_kernels=head.counts("upsample_kernel_sizes"),
            block_kernels=kernels,
            dilations=_dilations(head, len(kernels)),
            head_channels=head.count("upsample_initial_channel"),
            pre_kernel=head.count("pre_conv_kernel_size"),
            post_kernel=head.count("post_conv_kernel_size"),
            groups=quantizer.count("n_groups"),
            residuals=quantizer.count("n_codebooks"),
            levels=quantizer.counts("levels", least=2),
            downsample=quantizer.counts("downsample_factor"),
        )
        width, hop = self.dims[-1], math.prod(self.rates)
        same = (
            (spectrum, "win_length", self.window),
            (spectrum, "hop_length", hop),
            (head, "hop_length", hop),
            (backbone, "input_channels", self.bands),
            (quantizer, "input_dim", width),
            (head, "num_mels", width),
        )
        for part, name, value in same:
            if part.count(name) != value:
                raise part.error(name, f"{value}, to fit the other fields")
        if head.values.get("use_template", False) is not False:
            raise head.error("use_template", "false")
        if self.window < hop:
            raise spectrum.error("n_fft", f"at least hop_length, {hop}")
        if len(self.depths) != len(self.dims):
            raise backbone.error("depths", f"one number for each of the {len(self.dims)} dims")
        if width % self.groups:
            raise quantizer.error("n_groups", f"a divisor of input_dim, {width}")
        if not self.head_channels >> len(self.rates):
            least = "enough channels that one is left after they are halved once for each of upsample_rates"
            raise head.error("upsample_initial_channel", least)
        self._check_kernels(backbone, head)
        return self

    def _check_kernels(self, backbone: Fields, head: Fields) -> None:
        """Check that convolutions keep the number of positions and transposed ones multiply it by their stride.

        Raises ExportError.
        """
        pairs = list(zip(self.rate_kernels, self.rates, strict=False))
        spare = [kernel - rate for kernel, rate in pairs]
        if len(self.rate_kernels) != len(self.rates) or min(spare) < 0 or (not self.causal and any(n % 2 for n in spare)):
            even = "" if self.causal else " or an even number above it"
            raise head.error("upsample_kernel_sizes", f"one for each of upsample_rates, at least as large{even}")
        if self.causal:
            return
        for part, name, kernels in (
            (backbone, "kernel_size", (self.kernel,)),
            (head, "resblock_kernel_sizes", self.block_kernels),
            (head, "pre_conv_kernel_size", (self.pre_kernel,)),
            (head, "post_conv_kernel_size", (self.post_kernel,)),
        ):
            if not all(kernel % 2 for kernel in kernels):
                raise part.error(name, "odd numbers: the convolutions of this checkpoint are centred")


def _dilations(head: Fields, blocks: int) -> tuple[tuple[int, ...], ...]:
    rows = head.raw("resblock_dilation_sizes")
    if not isinstance(rows, list) or len(rows) != blocks:
        raise head.error("resblock_dilation_sizes", "one list for each of resblock_kernel_sizes")
    numbered = Fields({f"[{i}]": row for i, row in enumerate(rows)}, head.source, f"{head.prefix}resblock_dilation_sizes")
    return tuple(numbered.counts(name) for name in numbered.values)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of [batch, channels, length]."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class Backbone(nn.Module):
    """ConvNeXt: spectrogram [batch, bands, n] → features [batch, dims[-1], n]."""

    def __init__(self, config: FireflyConfig) -> None:
        super().__init__()
        dims, causal = config.dims, config.causal
        stem = conv1d(config.bands, dims[0], KERNEL if causal else config.kernel, causal=causal)
        widen = (nn.Sequential(ChannelNorm(a), nn.Conv1d(a, b, 1)) for a, b in pairwise(dims))
        self.downsample_layers = nn.ModuleList([nn.Sequential(stem, ChannelNorm(dims[0])), *widen])
        self.stages = nn.ModuleList(
            nn.Sequential(*(ConvNeXtBlock(dim, config.kernel, causal=causal) for _ in range(depth)))
            for dim, depth in zip(dims, config.depths, strict=True)
        )
        self.norm = ChannelNorm(dims[-1])

    def forward(self, x: Tensor) -> Tensor:
        for widen, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(widen(x))
        return cast(Tensor, self.norm(x))


class Quantizer(nn.Module):
    """Features at the spectrogram's rate ↔ codes at the frame rate."""

    def __init__(self, config: FireflyConfig) -> None:
        super().__init__()
        dim, causal = config.dims[-1], config.causal
        self.residual_fsq = GroupedFSQ(dim, config.groups, config.residuals, config.levels)
        self.downsample = downsampling(dim, config.downsample, causal=causal)
        self.upsample = upsampling(dim, config.downsample, causal=causal)

    def encode(self, features: Tensor) -> Tensor:
        """Return codes int64 [batch, codebooks, frames] of features [batch, dim, n]."""
        return self.residual_fsq.encode(self.downsample(features))

    def decode(self, codes: Tensor, carry: Carry | None = None) -> Tensor:
        """Return the head's features [batch, dim, frames·downsampling] of codes int64 [batch, codebooks, frames]."""
        return cast(Tensor, self.upsample(self.residual_fsq.decode(codes), carry))


class ResidualBlock(Carrying):
    """Rounds of two convolutions with SiLU before each, and a residual connection around each round.

    In the oldest release, the second convolution of a round is not dilated.
    """

    def __init__(self, channels: int, kernel: int, dilations: tuple[int, ...], *, causal: bool) -> None:
        super().__init__()
        self.convs1 = nn.ModuleList(conv1d(channels, channels, kernel, causal=causal, dilation=d) for d in dilations)
        self.convs2 = nn.ModuleList(
            conv1d(channels, channels, kernel, causal=causal, dilation=d if causal else 1) for d in dilations
        )

    def forward(self, x: Tensor, carry: Carry | None = None) -> Tensor:
        for first, second in zip(self.convs1, self.convs2, strict=True):
            x = x + through(second, F.silu(through(first, F.silu(x), carry)), carry)
        return x


class ParallelBlocks(Carrying):
    """The mean of residual blocks with different kernels."""

    def __init__(self, channels: int, config: FireflyConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            ResidualBlock(channels, kernel, dilations, causal=config.causal)
            for kernel, dilations in zip(config.block_kernels, config.dilations, strict=True)
        )

    def forward(self, x: Tensor, carry: Carry | None = None) -> Tensor:
        first, *others = (block(x, carry) for block in self.blocks)
        return cast(Tensor, sum(others, first)) / len(self.blocks)


class Head(nn.Module):
    """HiFi-GAN: features [batch, dims[-1], n] → audio [batch, 1, n · product of the rates], within −1..1."""

    def __init__(self, config: FireflyConfig) -> None:
        super().__init__()
        channels, causal = config.head_channels, config.causal
        self.conv_pre = conv1d(config.dims[-1], channels, config.pre_kernel, causal=causal, by_rows=True)
        self.ups, self.resblocks = nn.ModuleList(), nn.ModuleList()
        for rate, kernel in zip(config.rates, config.rate_kernels, strict=True):
            self.ups.append(conv_transpose1d(channels, channels // 2, kernel, rate, causal=causal))
            channels //= 2
            self.resblocks.append(ParallelBlocks(channels, config))
        self.conv_post = conv1d(channels, 1, config.post_kernel, causal=causal)

    def forward(self, x: Tensor, carry: Carry | None = None) -> Tensor:
        x = through(self.conv_pre, x, carry)
        for up, blocks in zip(self.ups, self.resblocks, strict=True):
            x = blocks(through(up, F.silu(x), carry), carry)
        return torch.tanh(through(self.conv_post, F.silu(x), carry))


class Firefly(nn.Module):
    """The whole codec. Its weights have no weight norm, which is fused when a checkpoint is read."""

    def __init__(self, config: FireflyConfig) -> None:
        super().__init__()
        self.config = config
        self.mel = LogMel(sample_rate=config.sample_rate, bands=config.bands, window=config.window, hop=config.mel_hop)
        self.backbone = Backbone(config)
        self.quantizer = Quantizer(config)
        self.head = Head(config)

    def encode(self, audio: Tensor) -> Tensor:
        """Return codes int64 [batch, codebooks, frames] of audio float32 [batch, 1, samples], −1..1."""
        return self.quantizer.encode(self.backbone(self.mel(audio)))

    def decode(self, codes: Tensor, carry: Carry | None = None) -> Tensor:
        """Return audio float32 [batch, 1, frames·hop] of codes int64 [batch, codebooks, frames]. Only a causal codec carries."""
        return cast(Tensor, self.head(self.quantizer.decode(codes, carry), carry))
