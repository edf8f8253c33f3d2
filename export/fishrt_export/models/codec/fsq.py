"""Grouped finite scalar quantisation: each group of channels becomes a few numbers, and each number one of a few levels.

The levels are the digits of a code, the first one the lowest. There is no learned codebook.
"""

from __future__ import annotations

import math
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Projection(nn.Module):
    """Projections of one group's channels to its numbers and back."""

    def __init__(self, channels: int, numbers: int) -> None:
        super().__init__()
        same = channels == numbers
        self.project_in = nn.Identity() if same else nn.Linear(channels, numbers)
        self.project_out = nn.Identity() if same else nn.Linear(numbers, channels)


class GroupedFSQ(nn.Module):
    """Features [batch, dim, frames] ↔ codes int64 [batch, groups · residuals, frames], with the residuals of a group adjacent.

    Each residual codes the rest of the ones before, on a finer scale.
    """

    spread: Tensor
    shift: Tensor
    offset: Tensor
    radius: Tensor
    basis: Tensor
    scales: Tensor
    entries: Tensor

    def __init__(self, dim: int, groups: int, residuals: int, levels: tuple[int, ...]) -> None:
        super().__init__()
        self.rvqs = nn.ModuleList(Projection(dim // groups, len(levels)) for _ in range(groups))
        self.residuals = residuals
        count = np.array(levels)
        spread = (count - 1) * (1 + 1e-3) / 2
        offset = np.where(count % 2 == 0, 0.5, 0.0)
        radius = count // 2
        basis = np.cumprod([1, *levels[:-1]])
        constants = {
            "spread": spread,
            "offset": offset,
            "shift": np.arctanh(offset / spread),
            "radius": radius,
            "basis": basis,
            "scales": (count - 1.0) ** -np.arange(residuals)[:, None],
            "entries": (np.arange(math.prod(levels))[:, None] // basis % count - radius) / radius,
        }
        for name, value in constants.items():
            self.register_buffer(name, torch.from_numpy(value.astype(np.float32)), persistent=False)

    def project(self, features: Tensor) -> Tensor:
        """Project features [batch, dim, frames] to [batch, groups, frames, numbers]."""
        chunks = features.transpose(1, 2).chunk(len(self.rvqs), dim=-1)
        return torch.stack([cast(Projection, rvq).project_in(chunk) for rvq, chunk in zip(self.rvqs, chunks, strict=True)], dim=1)

    def bound(self, z: Tensor) -> Tensor:
        """Map each number between its lowest and its highest level."""
        return torch.tanh(z + self.shift) * self.spread - self.offset

    def levels(self, features: Tensor) -> Tensor:
        """Return unrounded levels [batch, groups, residuals, frames, numbers]. The bound applies twice, as in training."""
        residual = self.bound(self.project(features))
        found = []
        for scale in self.scales:
            found.append(self.bound(residual / scale))
            residual = residual - found[-1].round() / self.radius * scale
        return torch.stack(found, dim=2)

    def encode(self, features: Tensor) -> Tensor:
        """Return codes int64 [batch, groups · residuals, frames] of features [batch, dim, frames]."""
        digits = self.levels(features).round() + self.radius
        return (digits * self.basis).sum(dim=-1).to(torch.int64).flatten(1, 2)

    def decode(self, codes: Tensor) -> Tensor:
        """Return features [batch, dim, frames] of codes. Codes past the end mean the last one, −1 means zeros."""
        found = F.embedding(codes.clamp(0, len(self.entries) - 1), self.entries) * (codes >= 0).unsqueeze(-1).to(torch.float32)
        batch, _, frames, count = found.shape
        grouped = found.reshape(batch, len(self.rvqs), self.residuals, frames, count)
        numbers = (grouped * self.scales.unsqueeze(1)).sum(dim=2)
        chunks = [cast(Projection, rvq).project_out(numbers[:, group]) for group, rvq in enumerate(self.rvqs)]
        return torch.cat(chunks, dim=-1).transpose(1, 2)
