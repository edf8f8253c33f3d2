"""Checkpoints of diffusion models of any sizes, with random weights."""

from __future__ import annotations

import torch
from torch import Tensor

from fishrt_export.models.echo.config import EchoConfig, EncoderSizes
from fishrt_export.sources.echo import EchoSource

ODD = EchoConfig(
    channels=6,
    width=20,
    layers=5,
    heads=3,
    head_dim=8,
    hidden=28,
    embedding=10,
    rank=5,
    vocabulary=260,
    patch=2,
    text=EncoderSizes(layers=1, dim=18, heads=2, head_dim=4, hidden=14),
    speaker=EncoderSizes(layers=3, dim=16, heads=1, head_dim=10, hidden=12),
    latent=EncoderSizes(layers=2, dim=22, heads=5, head_dim=6, hidden=8),
)
"""No size fits another: heads are not the width, their number is odd, and no encoder is like another."""

EVEN = EchoConfig(
    channels=80,
    width=64,
    layers=2,
    heads=4,
    head_dim=16,
    hidden=96,
    embedding=32,
    rank=16,
    vocabulary=256,
    patch=4,
    text=EncoderSizes(layers=1, dim=32, heads=2, head_dim=16, hidden=48),
    speaker=EncoderSizes(layers=1, dim=48, heads=3, head_dim=16, hidden=64),
    latent=EncoderSizes(layers=1, dim=48, heads=3, head_dim=16, hidden=64),
)
"""Widths are multiples of 16: every layer can be stored in integers. The channels are those of the golden PCA."""


def random_weights(config: EchoConfig, seed: int = 0) -> dict[str, Tensor]:
    """Return bfloat16 tensors by the names of an official checkpoint."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, shape in EchoSource(config, {}).shapes().items():
        scale = 1.0 if "norm" in name else 0.5 * shape[-1] ** -0.5
        noise = torch.randn(shape, generator=generator) * scale
        made[name] = (noise.abs() + 0.5 if "norm" in name else noise).to(torch.bfloat16)
    return made
