"""Building blocks that encoders and denoiser share: norms of heads, rotary positions, gated attention."""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..transformer import FeedForward, attend
from .config import NORM_EPS, ROPE_BASE, EncoderSizes


class HeadNorm(nn.Module):
    """RMS norm of each head, with weights of its own: [batch, n, heads, head_dim] in and out."""

    ones: Tensor

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads, head_dim))
        self.register_buffer("ones", torch.from_numpy(np.ones(head_dim, np.float32)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.ones, NORM_EPS) * self.weight


class Rotary(nn.Module):
    """Rotary positions in float32: pair m of a head is turned by position · base^(−2m / head_dim)."""

    speeds: Tensor

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        self.register_buffer("speeds", torch.from_numpy(1 / np.float32(ROPE_BASE) ** exponents), persistent=False)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin, each float32 [batch, n, head_dim / 2], of positions int64 [batch, n]."""
        angles = positions.unsqueeze(-1).to(torch.float32) * self.speeds
        return torch.cos(angles), torch.sin(angles)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """Rotate the first `heads` heads of x [batch, heads, n, head_dim]; the others stay."""
    turned, others = x[:, :heads], x[:, heads:]
    if torch.onnx.is_in_onnx_export():
        turned = torch.onnx.ops.rotary_embedding(turned, cos, sin, interleaved=True)
    else:
        c, s, even, odd = cos.unsqueeze(1), sin.unsqueeze(1), turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack((even * c - odd * s, odd * c + even * s), dim=-1).flatten(-2)
    return turned if heads == x.shape[1] else torch.cat([turned, others], dim=1)


class GatedAttention(nn.Module):
    """The products around an attention whose output is gated by its input. x [batch, n, dim]."""

    def __init__(self, dim: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.wq, self.wk, self.wv, self.gate = (nn.Linear(dim, heads * head_dim, bias=False) for _ in range(4))
        self.wo = nn.Linear(heads * head_dim, dim, bias=False)
        self.q_norm, self.k_norm = HeadNorm(heads, head_dim), HeadNorm(heads, head_dim)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values [batch, heads, n, head_dim], not yet rotated."""
        q, k, v = (layer(x).unflatten(-1, (self.heads, self.head_dim)) for layer in (self.wq, self.wk, self.wv))
        return self.q_norm(q).transpose(1, 2), self.k_norm(k).transpose(1, 2), v.transpose(1, 2)

    def finish(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the output [batch, n, dim] of the attention's result y [batch, heads, n, head_dim]."""
        return cast(Tensor, self.wo(y.transpose(1, 2).flatten(2) * torch.sigmoid(self.gate(x))))


class SelfAttention(GatedAttention):
    """Attention of an encoder."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.project(x)
        q, k = (rotate(part, cos, sin, self.heads) for part in (q, k))
        return self.finish(x, attend(q, k, v, mask))


class EncoderBlock(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, sizes: EncoderSizes) -> None:
        super().__init__()
        self.attention = SelfAttention(sizes.dim, sizes.heads, sizes.head_dim)
        self.mlp = FeedForward(sizes.dim, sizes.hidden)
        self.attention_norm = nn.RMSNorm(sizes.dim, eps=NORM_EPS)
        self.mlp_norm = nn.RMSNorm(sizes.dim, eps=NORM_EPS)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin, mask)
        return x + cast(Tensor, self.mlp(self.mlp_norm(x)))
