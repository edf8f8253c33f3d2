"""How clear each choice of the quantiser was: what a differing code must be judged by."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .graphs import CodecEncode


def code_margins(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """For a CodecEncode: audio [batch, 1, samples] → gap of best and second-best cosine, [batch, codebooks, frames]."""
    encoder = cast(CodecEncode, module)

    def margins(audio: Tensor) -> Tensor:
        quantizer = encoder.quantizer
        residual = quantizer.pre_module(quantizer.downsample(encoder.encoder(audio)))
        gaps = []
        for codebook in quantizer.codebooks:
            place = F.normalize(codebook.project(residual), dim=1).transpose(1, 2)
            best = (place @ F.normalize(codebook.codebook.weight, dim=1).T).topk(2, dim=-1)
            gaps.append(best.values[..., 0] - best.values[..., 1])
            residual = residual - codebook.lookup(best.indices[..., 0])
        return torch.stack(gaps, dim=1)

    return margins
