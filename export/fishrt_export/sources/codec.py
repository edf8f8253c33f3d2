"""The codec half of a checkpoint: its files, its checks and the jobs of its two graphs.

The margin of a code decides whether a code that differs is a rounding error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fishrt.bundle.features import Codec
from fishrt_engines.engine import GraphSpec, TensorSpec

from ..checkpoint.forms.folder import Checkpoint
from ..checkpoint.weights import expected_shapes, find_problems, fuse_weight_norm, load
from ..graph.job import GraphJob
from ..graph.verify import Margins
from ..models.codec.dac import Dac
from ..models.codec.decoding import decode_spec, decoding, encoding
from ..models.codec.firefly import Firefly, FireflyConfig, Quantizer
from ..models.codec.latent_dac import LatentDac
from ..models.codec.load import CodecConfig, fingerprint, read_codec_config, read_stored_codec
from .cases import codec_decode_cases, codec_encode_cases

AUDIO_TOLERANCE = 1e-4
LATENT_TOLERANCE = 1e-3
"""For a codec of latents. Random ones are far from speech: with them, float32 differs from float64 by 1e-4 in the state."""
COSINE_MARGIN = 1e-4
"""Rounding may choose a codebook row whose cosine is this close to the best."""
LEVEL_MARGIN = 1e-3
"""Rounding may choose either of two levels for a number this close to the middle between them."""


@dataclass(frozen=True, slots=True)
class CodecSource:
    """A codec of any kind, with weights by the names of its module."""

    config: CodecConfig
    weights: Mapping[str, Tensor]
    fingerprint: str
    channels: int | None = None
    """Channels of the latents of a LatentDac; None: the codec has codes."""

    @property
    def kind(self) -> str:
        """Return "dac", "firefly" or "centred firefly", recognised by the names of the tensors."""
        return self.config.kind

    def problems(self) -> list[str]:
        """Return all differences between weights and config."""
        return find_problems(expected_shapes(self._empty()), self.weights)

    def describe(self) -> Codec:
        """Return the manifest's entry."""
        config = self.config
        return Codec(
            sample_rate=config.sample_rate,
            hop=config.hop,
            codebook_sizes=() if self.channels else config.codebook_sizes,
            max_frames=config.max_frames,
            min_samples=config.min_samples,
            sample_multiple=config.sample_multiple,
            context=config.context,
            fingerprint=self.fingerprint,
            channels=self.channels,
        )

    def module(self) -> Dac | Firefly:
        """Return the module with its weights, in float32."""
        return load(self._empty(), self.weights)

    def jobs(self) -> list[GraphJob]:
        """Return the jobs of codec_encode and codec_decode. "samples" is hop · "frames" if the codec takes whole frames only."""
        config = self.config
        audio = TensorSpec("audio", "float32", ("batch", 1, "samples"))
        whole = config.sample_multiple == config.hop
        decode = decode_spec(self._empty())
        coded, tolerance = decode.inputs[0], LATENT_TOLERANCE if self.channels else AUDIO_TOLERANCE
        return [
            GraphJob(
                role="codec_encode",
                spec=GraphSpec(file="codec_encode.onnx", inputs=(audio,), outputs=(coded,)),
                build=lambda: encoding(self.module()),
                weights=self.weights,
                cases=codec_encode_cases(config, config.sight),
                tolerance=tolerance,
                dims={"samples": (config.hop, "frames") if whole else config.min_samples},
                margins=code_margins,
            ),
            GraphJob(
                role="codec_decode",
                spec=decode,
                build=lambda: decoding(self.module()),
                weights=self.weights,
                cases=codec_decode_cases(config, decode, config.sight),
                tolerance=tolerance,
            ),
        ]

    def _empty(self) -> Dac | Firefly:
        with torch.device("meta"):
            if isinstance(self.config, FireflyConfig):
                return Firefly(self.config)
            return LatentDac(self.config, self.channels) if self.channels else Dac(self.config)


def open_codec(checkpoint: Checkpoint | Path) -> CodecSource:
    """Read the codec. Raises ExportError for missing or unreadable files. `CodecSource.problems` returns the other faults."""
    files = (Checkpoint.of(checkpoint) if isinstance(checkpoint, Path) else checkpoint).codec_files()
    stored = read_stored_codec(files)
    config = read_codec_config(files, stored)
    weights = fuse_weight_norm(stored)
    return CodecSource(config, weights, fingerprint(weights, config))


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
