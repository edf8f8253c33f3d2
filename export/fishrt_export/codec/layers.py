"""Building blocks of the codecs. Sub-module names are the checkpoint's, so that a state dict loads by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..rope import apply_rope, rope_table
from .carry import Carry, Carrying, Chain, through


class CausalConv1d(Carrying):
    """Convolution that sees no future: zeros of length (k−1)·dilation − (stride−1) stand before the first sample.

    Input [batch, in, n], output [batch, out, ⌈n / stride⌉]: zeros behind the last sample complete its stride. Carries the last
    (k−1)·dilation inputs, if its stride is 1.

    by_rows: where there is a carry, it is computed as `_convolve_rows` does, for layers that get few positions in a call.
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
    """Transposed convolution with the last kernel − stride outputs dropped: [batch, in, n] → [batch, out, stride·n].

    Carries the inputs that reach beyond their own stride: one where the kernel is twice the stride, none where it is the stride.
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
    """A convolution without padding, as a product of one row for each position: [batch, in, n + reach] → [batch, out, n].

    ONNX Runtime adds up such a product in the same order, however many rows there are, and a convolution of up to 64 positions
    in longer runs than one of more: a stream would differ from the whole, and be less exact.
    """
    (kernel,), (dilation,) = conv.kernel_size, conv.dilation
    reach, rows = (kernel - 1) * dilation, x.transpose(1, 2)
    seen = torch.cat([rows[:, at : at - reach or None] for at in range(0, reach + 1, dilation)], dim=-1)
    y = seen @ conv.weight.permute(2, 1, 0).flatten(0, 1) + cast(Tensor, conv.bias)
    return y.transpose(1, 2)


def _spread_rows(x: Tensor, conv: nn.ConvTranspose1d) -> Tensor:
    """A transposed convolution whose kernel is its stride, by rows as well: [batch, in, n] → [batch, out, stride·n]."""
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
    """Causal, or centred: zeros on both sides alike, none where kernel and stride are equal, so that a last part is left out."""
    if causal:
        return CausalConv1d(inputs, outputs, kernel, stride=stride, dilation=dilation, groups=groups, by_rows=by_rows)
    padding = ((kernel - 1) * dilation + 1 - stride) // 2
    return nn.Conv1d(inputs, outputs, kernel, stride, padding, dilation, groups)


def conv_transpose1d(
    inputs: int, outputs: int, kernel: int, stride: int, *, causal: bool
) -> CausalConvTranspose1d | nn.ConvTranspose1d:
    """Causal, or centred: the outputs that are dropped are taken from both ends. [batch, in, n] → [batch, out, stride·n]."""
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

    def __init__(self, channels: int, kernel: int = 7, *, causal: bool = True) -> None:
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


class LayerScale(nn.Module):
    """A learned factor per channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((channels,), 1e-1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


_HIDDEN = -30000.0
"""Added to the score of a key that is not seen: far below any score, and still a number in float16."""


@dataclass(frozen=True, slots=True)
class View:
    """What all layers of a windowed transformer look at in one call."""

    cos: Tensor
    sin: Tensor
    position_ids: Tensor
    """int64 [batch, length]."""
    mask: Tensor
    """bool, broadcast to [batch, heads, length, past + length]: which keys a position sees, those carried standing first."""
    past: int
    """Keys and values that are carried."""
    carry: Carry | None


class SelfAttention(nn.Module):
    """Multi-head attention under a given mask, with rotary positions."""

    def __init__(self, dim: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.wqkv = nn.Linear(dim, 3 * heads * head_dim, bias=False)
        self.wo = nn.Linear(heads * head_dim, dim, bias=False)

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
    """Attention that rounds alike in a stream and in the whole: its sums run over the keys one by one, and of a key that is not
    seen, which adds zeros, nothing is left.

    A softmax adds up its rows in as many parts as a processor's registers have places, and to which of them a key belongs depends
    on the keys before it. The first query comes twice, since products of a single row are added up in another way.
    """
    bias = torch.where(mask, torch.zeros((), dtype=q.dtype), torch.full((), _HIDDEN, dtype=q.dtype))
    q, bias = (torch.cat([rows, rows[..., :1, :]], dim=-2) for rows in (q, bias))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2) + bias
    weights = torch.exp(scores - scores.amax(dim=-1, keepdim=True))
    ones = v * 0 + 1  # of floats alone: CoreML computes no sizes
    return ((weights @ v) / (weights @ ones))[..., :-1, :]


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) · w3 x)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.w2(F.silu(self.w1(x)) * self.w3(x)))


class TransformerLayer(nn.Module):
    """Pre-norm attention and feed-forward, each branch scaled by a learned gamma."""

    def __init__(self, dim: int, hidden: int, heads: int, head_dim: int, norm_eps: float) -> None:
        super().__init__()
        self.attention = SelfAttention(dim, heads, head_dim)
        self.feed_forward = FeedForward(dim, hidden)
        self.ffn_norm = nn.RMSNorm(dim, eps=norm_eps)
        self.attention_norm = nn.RMSNorm(dim, eps=norm_eps)
        self.attention_layer_scale = LayerScale(dim)
        self.ffn_layer_scale = LayerScale(dim)

    def forward(self, x: Tensor, view: View) -> Tensor:
        x = x + self.attention_layer_scale(self.attention(self.attention_norm(x), view))
        return x + cast(Tensor, self.ffn_layer_scale(self.feed_forward(self.ffn_norm(x))))


class WindowTransformer(Carrying):
    """Causal transformer in which position i sees positions i − window + 1 … i. [batch, dim, length] in and out.

    Carries the last window − 1 keys, already rotated to their absolute positions, and values of each layer.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        *,
        layers: int,
        dim: int,
        hidden: int,
        heads: int,
        head_dim: int,
        window: int,
        rope_base: float,
        norm_eps: float,
        max_length: int,
    ) -> None:
        super().__init__()
        self.window, self.past = window, window - 1
        self.layers = nn.ModuleList(TransformerLayer(dim, hidden, heads, head_dim, norm_eps) for _ in range(layers))
        self.norm = nn.RMSNorm(dim, eps=norm_eps)
        cos, sin = rope_table(max_length, head_dim, rope_base)
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
            # What the state holds for positions below 0 stands before the stream.
            mask = (distance >= 0) & (distance < self.window) & (keys >= 0)
            view = View(self.cos, self.sin, position_ids, mask.unsqueeze(1), self.past, carry)
        for layer in self.layers:
            x = layer(x, view)
        return cast(Tensor, self.norm(x)).transpose(1, 2)
