"""The DAC codec with latents in place of codes: principal components of the sum of the codebook rows.

encode: audio → Encoder → downsample → pre_module → sum of codebook rows → components
decode: components → sum of codebook rows → post_module → upsample → Decoder → audio
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from .carry import Carry
from .dac import Dac
from .dac_config import MAX_FRAMES, DacConfig

PCA = ("analysis.", "synthesis.")
"""Starts of the names of the projections between sums and components."""


class LatentDac(Dac):
    """The whole codec. `channels` is the number of components."""

    def __init__(self, config: DacConfig, channels: int, max_frames: int = MAX_FRAMES) -> None:
        super().__init__(config, max_frames)
        self.channels = channels
        self.analysis = nn.Linear(config.latent_dim, channels)
        self.synthesis = nn.Linear(channels, config.latent_dim)

    def encode(self, audio: Tensor) -> Tensor:
        """Return latents float32 [batch, frames, channels] of audio float32 [batch, 1, frames·hop], −1..1."""
        return cast(Tensor, self.analysis(self.quantizer.quantise(self.encoder(audio)).transpose(1, 2)))

    def decode(self, latents: Tensor, carry: Carry | None = None) -> Tensor:
        """Return audio float32 [batch, 1, frames·hop] of latents float32 [batch, frames, channels]."""
        return cast(Tensor, self.decoder(self.quantizer.spread(self.synthesis(latents).transpose(1, 2), carry), carry))


def pca_weights(components: Tensor, mean: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """Return the projections float32 by the names of LatentDac.

    latents = (sum − mean) componentsᵀ · scale, and back. components [channels, dim], mean [dim], scale [1].
    """
    rows, centre, factor = components.double(), mean.double(), scale.double()
    values = {
        "analysis.weight": rows * factor,
        "analysis.bias": -(rows @ centre) * factor,
        "synthesis.weight": (rows / factor).T.contiguous(),
        "synthesis.bias": centre,
    }
    return {name: value.to(torch.float32) for name, value in values.items()}
