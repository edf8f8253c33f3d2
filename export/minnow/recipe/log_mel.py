"""Log-mel spectra, for the input of the codec's teacher and for the losses."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

FLOOR = 3e-2
"""Added to a magnitude before the logarithm, so that digital silence does not dominate the loss."""


def mel_filters(sample_rate: int, n_fft: int, mels: int) -> Tensor:
    """Return triangles of height one, evenly spaced on the HTK mel scale: float32 [n_fft/2 + 1, mels]."""
    top = 2595.0 * np.log10(1.0 + sample_rate / 2 / 700.0)
    edges = 700.0 * (10.0 ** (np.linspace(0.0, top, mels + 2) / 2595.0) - 1.0)
    bins = np.linspace(0.0, sample_rate / 2, n_fft // 2 + 1)[:, None]
    # A triangle narrower than a bin could be empty, so every side is at least one bin wide.
    width = sample_rate / n_fft
    rising = (bins - edges[:-2]) / np.maximum(edges[1:-1] - edges[:-2], width)
    falling = (edges[2:] - bins) / np.maximum(edges[2:] - edges[1:-1], width)
    return torch.from_numpy(np.clip(np.minimum(rising, falling), 0.0, None).astype(np.float32))


class LogMel(nn.Module):
    """float32 [batch, samples] → [batch, frames, mels]; frame t covers samples [t·hop + offset, t·hop + offset + window)."""

    window: Tensor
    filters: Tensor

    def __init__(self, sample_rate: int, window: int, hop: int, mels: int) -> None:
        super().__init__()
        self.hop, self.length = hop, window
        hann = 0.5 - 0.5 * np.cos(2.0 * np.pi * np.arange(window) / window)
        self.register_buffer("window", torch.from_numpy(hann.astype(np.float32)))
        self.register_buffer("filters", mel_filters(sample_rate, window, mels))

    def forward(self, audio: Tensor, offset: int, frames: int) -> Tensor:
        need = offset + (frames - 1) * self.hop + self.length
        left = max(-offset, 0)
        padded = F.pad(audio, (left, max(need - audio.shape[-1], 0)))[..., offset + left : need + left]
        return self.log(self.magnitude(padded))

    def log(self, magnitude: Tensor) -> Tensor:
        """Return log-mels [batch, frames, mels] of magnitudes [batch, frames, bins]."""
        return torch.log(magnitude @ self.filters + FLOOR)

    def magnitude(self, audio: Tensor) -> Tensor:
        """Return Hann-windowed magnitude spectra [batch, frames, bins]. The peak of a full-scale sine is about `window`/4."""
        pieces = audio.unfold(-1, self.length, self.hop) * self.window
        return torch.view_as_real(torch.fft.rfft(pieces)).square().sum(-1).add(1e-9).sqrt()
