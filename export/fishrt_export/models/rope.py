"""Rotary position embedding of every Fish Speech model: interleaved pairs, tables rounded to bfloat16."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


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
