"""Building blocks of the codecs. Sub-module names are the checkpoint's, so that a state dict loads by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..transformer import FeedForward, apply_rope, rope_table
from .carry import Carry, Carrying, Chain, through

KERNEL = 7
"""Kernel of the quantisers' ConvNeXt blocks and of Firefly's causal backbone's first convolution; no config field changes it."""


class CausalConv1d(Carrying):
    """Causal convolution: [batch, in, n] → [batch, out, ⌈n / stride⌉].

    (k−1)·dilation − (stride−1) zeros before the first sample pad it, and zeros after the last sample complete its stride. With
    stride 1 it carries the last (k−1)·dilation inputs.

    by_rows: with a carry, compute it with `_convolve_rows`, for layers with few positions in a call.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        by_rows: bool = False,
    ) -> None:
        super().__init__()
        self.by_rows = by_rows
        self.conv = nn.Conv1d(inputs, outputs, kernel, stride, dilation=dilation, groups=groups)
        self.padding = ((kernel - 1) * dilation + 1 - stride, stride - 1)

    def forward(self, x: Tensor, carry: Carry | None = None) -> Tensor:
        if carry is None:
            return cast(Tensor, self.conv(F.pad(x, self.padding)))
        assert self.conv.stride == (1,)
        x = carry.join(x, self.padding[0])
        return _convolve_rows(x, self.conv) if self.by_rows else cast(Tensor, self.conv(x))


class CausalConvTranspose1d(Carrying):
    """Transposed convolution without its last kernel − stride outputs: [batch, in, n] → [batch, out, stride·n].

    It carries the inputs that reach beyond their own stride: one if the kernel is twice the stride, none if it is the stride.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose1d(inputs, outputs, kernel, stride)
        self.trim = kernel - stride
        self.reach = (kernel - 1) // stride

    def forward(self, x: Tensor, carry: Carry | None = None) -> Tensor:
        first = 0
        if carry is not None and not self.reach and not self.trim:
            return _spread_rows(x, self.conv)
        if carry is not None:
            x, first = carry.join(x, self.reach), self.reach * self.conv.stride[0]
        y: Tensor = self.conv(x)
        return y[..., first : -self.trim or None]


def _convolve_rows(x: Tensor, conv: nn.Conv1d) -> Tensor:
    """Return a convolution without padding as a matrix product, one row per position: [batch, in, n + reach] → [batch, out, n].

    ONNX Runtime sums a matrix product in the same order for any number of rows. It sums a convolution of up to 64 positions in
    longer runs than one of more positions, so that a stream would differ from the whole and be less exact.
    """
    (kernel,), (dilation,) = conv.kernel_size, conv.dilation
    reach, rows = (kernel - 1) * dilation, x.transpose(1, 2)
    seen = torch.cat([rows[:, at : at - reach or None] for at in range(0, reach + 1, dilation)], dim=-1)
    y = seen @ conv.weight.permute(2, 1, 0).flatten(0, 1) + cast(Tensor, conv.bias)
    return y.transpose(1, 2)


def _spread_rows(x: Tensor, conv: nn.ConvTranspose1d) -> Tensor:
    """Return a transposed convolution whose kernel is its stride as a matrix product: [batch, in, n] → [batch, out, stride·n].

    For the reason, see `_convolve_rows`.
    """
    spread = x.transpose(1, 2) @ conv.weight.permute(0, 2, 1).flatten(1)
    y = spread.reshape(x.shape[0], -1, conv.out_channels) + cast(Tensor, conv.bias)
    return y.transpose(1, 2)


def conv1d(
    inputs: int,
    outputs: int,
    kernel: int,
    *,
    causal: bool,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    by_rows: bool = False,
) -> CausalConv1d | nn.Conv1d:
    """Return a causal convolution, or a centred one with equal padding on both sides.

    A centred one has no padding if kernel and stride are equal, so that an incomplete last stride is dropped.
    """
    if causal:
        return CausalConv1d(inputs, outputs, kernel, stride=stride, dilation=dilation, groups=groups, by_rows=by_rows)
    padding = ((kernel - 1) * dilation + 1 - stride) // 2
    return nn.Conv1d(inputs, outputs, kernel, stride, padding, dilation, groups)


def conv_transpose1d(
    inputs: int, outputs: int, kernel: int, stride: int, *, causal: bool
) -> CausalConvTranspose1d | nn.ConvTranspose1d:
    """Return a transposed convolution [batch, in, n] → [batch, out, stride·n], causal or centred.

    A causal one drops outputs at the end, a centred one at both ends.
    """
    if causal:
        return CausalConvTranspose1d(inputs, outputs, kernel, stride)
    return nn.ConvTranspose1d(inputs, outputs, kernel, stride, (kernel - stride) // 2)


class Snake(nn.Module):
    """x + sin²(αx) / (α + 1e-9), with one α per channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.sin(self.alpha * x).square() * (1 / (self.alpha + 1e-9))


class ResidualUnit(Carrying):
    """x + conv1(snake(conv7(snake(x)))), the wide convolution dilated."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.block = Chain(
            Snake(channels),
            CausalConv1d(channels, channels, 7, dilation=dilation),
            Snake(channels),
            CausalConv1d(channels, channels, 1),
        )

    def forward(self, x: Tensor, carry: Carry | None = None) -> Tensor:
        return x + cast(Tensor, self.block(x, carry))


class ConvNeXtBlock(Carrying):
    """Depthwise convolution over time, then a two-layer network over channels, scaled by gamma and added to the input."""

    def __init__(self, channels: int, kernel: int = KERNEL, *, causal: bool = True) -> None:
        super().__init__()
        self.dwconv = conv1d(channels, channels, kernel, causal=causal, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.pwconv1 = nn.Linear(channels, 4 * channels)
        self.pwconv2 = nn.Linear(4 * channels, channels)
        self.gamma = nn.Parameter(torch.full((channels,), 1e-1))

    def forward(self, x: Tensor, carry: Carry | None = None) -> Tensor:
        y = self.norm(through(self.dwconv, x, carry).transpose(1, 2))
        y = self.gamma * self.pwconv2(F.gelu(self.pwconv1(y)))
        return x + cast(Tensor, y.transpose(1, 2))


def downsampling(dim: int, factors: Sequence[int], *, causal: bool = True) -> nn.Sequential:
    """Return the quantisers' layers [batch, dim, n] → [batch, dim, n / product of the factors]."""
    stages = ((conv1d(dim, dim, f, causal=causal, stride=f), ConvNeXtBlock(dim, causal=causal)) for f in factors)
    return nn.Sequential(*(nn.Sequential(*stage) for stage in stages))


def upsampling(dim: int, factors: Sequence[int], *, causal: bool = True) -> Chain:
    """Return the layers that mirror `downsampling`: [batch, dim, n] → [batch, dim, n · product of the factors]."""
    stages = ((conv_transpose1d(dim, dim, f, f, causal=causal), ConvNeXtBlock(dim, causal=causal)) for f in reversed(factors))
    return Chain(*(Chain(*stage) for stage in stages))


class LayerScale(nn.Module):
    """A learned factor per channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((channels,), 1e-1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


_HIDDEN = -30000.0
"""Added to the scores of masked keys: far below any score, and finite in float16."""


@dataclass(frozen=True, slots=True)
class View:
    """The inputs of one call that all layers of a windowed transformer share."""

    cos: Tensor
    sin: Tensor
    position_ids: Tensor
    """int64 [batch, length]."""
    mask: Tensor
    """bool, broadcast to [batch, heads, length, past + length]: the keys that a position attends to, the carried ones first."""
    past: int
    """Number of carried keys and values."""
    carry: Carry | None


@dataclass(frozen=True, slots=True)
class TransformerConfig:
    """Sizes of a windowed transformer. `window` includes the position itself."""

    layers: int
    dim: int
    hidden: int
    heads: int
    head_dim: int
    window: int
    rope_base: float
    norm_eps: float


class SelfAttention(nn.Module):
    """Multi-head attention under a given mask, with rotary positions."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.heads, self.head_dim = config.heads, config.head_dim
        self.wqkv = nn.Linear(config.dim, 3 * config.heads * config.head_dim, bias=False)
        self.wo = nn.Linear(config.heads * config.head_dim, config.dim, bias=False)

    def forward(self, x: Tensor, view: View) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
            for part in self.wqkv(x).split(self.heads * self.head_dim, dim=-1)
        )
        q, k = (apply_rope(part, view.cos, view.sin, view.position_ids) for part in (q, k))
        if view.carry is not None:
            k = view.carry.join(k, view.past, kind="key_cache", dim=-2)
            v = view.carry.join(v, view.past, kind="value_cache", dim=-2)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=view.mask) if view.carry is None else _attend(q, k, v, view.mask)
        return cast(Tensor, self.wo(y.transpose(1, 2).flatten(2)))


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Return the attention with the same rounding in a stream and in the whole sequence.

    Its sums are matrix products, to which a masked key adds exact zeros. A softmax would sum a row in as many parts as a vector
    register has lanes, and the keys before a key decide its lane. The first query is computed twice, since ONNX Runtime sums
    products of a single row in another order.
    """
    bias = torch.where(mask, torch.zeros((), dtype=q.dtype), torch.full((), _HIDDEN, dtype=q.dtype))
    q, bias = (torch.cat([rows, rows[..., :1, :]], dim=-2) for rows in (q, bias))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2) + bias
    weights = torch.exp(scores - scores.amax(dim=-1, keepdim=True))
    ones = v * 0 + 1  # without shapes, which CoreML does not compute
    return ((weights @ v) / (weights @ ones))[..., :-1, :]


class TransformerLayer(nn.Module):
    """Pre-norm attention and feed-forward, each branch scaled by a learned gamma."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attention = SelfAttention(config)
        self.feed_forward = FeedForward(config.dim, config.hidden)
        self.ffn_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.attention_layer_scale = LayerScale(config.dim)
        self.ffn_layer_scale = LayerScale(config.dim)

    def forward(self, x: Tensor, view: View) -> Tensor:
        x = x + self.attention_layer_scale(self.attention(self.attention_norm(x), view))
        return x + cast(Tensor, self.ffn_layer_scale(self.feed_forward(self.ffn_norm(x))))


class WindowTransformer(Carrying):
    """Causal transformer in which position i attends to positions i − window + 1 … i. [batch, dim, length] in and out.

    It carries the last window − 1 keys and values of each layer; the keys are already rotated to their absolute positions. The
    rotary tables have `max_length` rows.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: TransformerConfig, max_length: int) -> None:
        super().__init__()
        self.window, self.past = config.window, config.window - 1
        self.layers = nn.ModuleList(TransformerLayer(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        cos, sin = rope_table(max_length, config.head_dim, config.rope_base)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, x: Tensor, carry: Carry | None = None) -> Tensor:
        x = x.transpose(1, 2)
        if carry is None:
            positions = torch.arange(x.shape[1], device=x.device)
            distance = positions.unsqueeze(1) - positions.unsqueeze(0)
            mask = (distance >= 0) & (distance < self.window)
            view = View(self.cos, self.sin, positions.unsqueeze(0).expand(x.shape[0], -1), mask, 0, None)
        else:
            position_ids = carry.position_ids
            assert position_ids is not None
            before = position_ids[:, :1] + torch.arange(-self.past, 0, device=x.device)
            keys = torch.cat([before, position_ids], dim=1).unsqueeze(1)
            distance = position_ids.unsqueeze(2) - keys
            # Positions below 0 are before the stream: the state has no keys for them.
            mask = (distance >= 0) & (distance < self.window) & (keys >= 0)
            view = View(self.cos, self.sin, position_ids, mask.unsqueeze(1), self.past, carry)
        for layer in self.layers:
            x = layer(x, view)
        return cast(Tensor, self.norm(x)).transpose(1, 2)
