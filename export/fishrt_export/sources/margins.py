"""Margins of a quantiser's codes, which decide whether a differing code is a rounding error."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..graph.verify import Margins
from ..models.codec.dac import Dac
from ..models.codec.firefly import Firefly, Quantizer

COSINE_MARGIN = 1e-4
"""Rounding may choose a codebook row whose cosine is this close to the best."""
LEVEL_MARGIN = 1e-3
"""Rounding may choose either of two levels for a number this close to the middle between them."""


def code_margins(codec: nn.Module) -> Margins:
    """Return the margins of the codes of a Dac or a Firefly."""
    if isinstance(codec, Firefly):
        return Margins(
            lambda audio: level_margins(codec.quantizer, codec.backbone(codec.mel(audio))), LEVEL_MARGIN, codec.config.residuals
        )
    dac = cast(Dac, codec)
    return Margins(lambda audio: cosine_margins(dac, audio), COSINE_MARGIN, len(dac.quantizer.codebooks))


def cosine_margins(dac: Dac, audio: Tensor) -> Tensor:
    """Return the gap between best and second-best cosine, [batch, codebooks, frames], of audio [batch, 1, samples]."""
    quantizer = dac.quantizer
    residual = quantizer.pre_module(quantizer.downsample(dac.encoder(audio)))
    gaps = []
    for codebook in quantizer.codebooks:
        place = F.normalize(codebook.project(residual), dim=1).transpose(1, 2)
        best = (place @ F.normalize(codebook.codebook.weight, dim=1).T).topk(2, dim=-1)
        gaps.append(best.values[..., 0] - best.values[..., 1])
        residual = residual - codebook.lookup(best.indices[..., 0])
    return torch.stack(gaps, dim=1)


def level_margins(quantizer: Quantizer, features: Tensor) -> Tensor:
    """Return the least distance of a code's numbers from the middle of two levels, [batch, codebooks, frames].

    features: [batch, dim, n].
    """
    levels = quantizer.residual_fsq.levels(quantizer.downsample(features))
    return (levels - levels.floor() - 0.5).abs().amin(dim=-1).flatten(1, 2)
