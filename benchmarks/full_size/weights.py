"""Random weights by name, reproducible by seed, in pieces of bounded size, scaled so that activations keep their range.

A matrix has the deviation 1/√(inputs); those that write to the residual stream are further divided by √(2 · layers). Coordinate
0 of the residual stream is kept almost constant as a feature "audio", which makes the end token improbable: runs are long enough.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fishrt_export.checkpoint.config import ModelConfig
from fishrt_export.models.codec.dac import Dac
from fishrt_export.models.codec.dac_config import DacConfig
from fishrt_export.models.codec.firefly import Firefly
from fishrt_export.models.codec.load import CodecConfig
from fishrt_export.models.fast_ar import FastAR
from fishrt_export.models.slow_ar import SlowAR

PIECE = 1 << 24
"""Number of elements that are drawn at once."""
_CONSTANT = 4.0
"""Coordinate 0 of an audio token's embedding and head row; the end token has its negative."""
_AFTER_SILU = 1.7
"""Compensates the attenuation of a signal of deviation 1 by SiLU."""
_LOUDNESS = {"decoder.model.6.conv.weight": 0.15, "head.conv_post.conv.weight": 0.5, "head.conv_post.weight": 0.5}
"""Factor of a codec's last convolution: audio is loud, but no sample is clipped."""


def language_model_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor by its flat name."""
    with torch.device("meta"):
        slow = SlowAR(config, range(1), None if config.tied_head else config.vocab_size)
        fast = FastAR(config)
    found = {name: tuple(tensor.shape) for name, tensor in slow.state_dict().items()}
    return found | {f"fast_{name}": tuple(tensor.shape) for name, tensor in fast.state_dict().items()}


@dataclass(frozen=True, slots=True)
class LanguageModelWeights:
    """The tensors of a language model."""

    config: ModelConfig
    semantic: range
    end: int
    seed: int

    def pieces(self, name: str, shape: tuple[int, ...]) -> Iterator[Tensor]:
        """Yield bfloat16 rows of the tensor of this flat name, in order."""
        drawn = generator(self.seed, name)
        for start, stop in row_ranges(shape):
            yield self._filled(name, (stop - start, *shape[1:]), start, drawn).to(torch.bfloat16)

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return the tensor of this flat name, bfloat16."""
        return torch.cat(list(self.pieces(name, shape)))

    def _filled(self, name: str, shape: tuple[int, ...], start: int, generator: torch.Generator) -> Tensor:
        x = torch.randn(shape, generator=generator)
        if "norm." in name:
            return 1 + 0.05 * x
        x /= math.sqrt(shape[-1])
        if name.endswith((".wo.weight", ".w2.weight")):
            x /= math.sqrt(2 * (self.config.fast if name.startswith("fast_") else self.config.slow).layers)
            if start == 0:
                x[0] *= 0.01
        elif name in ("embeddings.weight", "output.weight"):
            x[:, 0] = 1.0 if name == "embeddings.weight" else 0.0
            first, last = (min(max(edge - start, 0), shape[0]) for edge in (self.semantic.start, self.semantic.stop))
            x[first:last, 0] = _CONSTANT
            if 0 <= self.end - start < shape[0]:
                x[self.end - start, 0] = -_CONSTANT
        return x


def empty_codec(config: CodecConfig) -> nn.Module:
    """Return the modules of a codec on the meta device."""
    with torch.device("meta"):
        return Dac(config) if isinstance(config, DacConfig) else Firefly(config)


def codec_tensors(config: CodecConfig, seed: int) -> dict[str, Tensor]:
    """Return float32 tensors by their official names, with weight norm in the official spelling."""
    codec = empty_codec(config)
    found: dict[str, Tensor] = {}
    modules = dict(codec.named_modules())
    for name, meta in codec.state_dict().items():
        owner_name, _, kind = name.rpartition(".")
        owner = modules[owner_name]
        x = _codec_tensor(name, kind, owner, meta.shape, generator(seed, name))
        found |= _weight_normed(name, x) if kind == "weight" and isinstance(owner, _CONVOLUTIONS) else {name: x}
    return found


_CONVOLUTIONS = (nn.Conv1d, nn.ConvTranspose1d)


def _codec_tensor(name: str, kind: str, owner: nn.Module, shape: torch.Size, generator: torch.Generator) -> Tensor:
    x = torch.randn(shape, generator=generator)
    if kind == "alpha":
        return 1 + 0.05 * x
    if kind == "gamma":
        return 0.1 + 0.01 * x
    if kind == "bias":
        return 0.01 * x
    if isinstance(owner, (nn.LayerNorm, nn.RMSNorm)):
        return 1 + 0.05 * x
    if isinstance(owner, nn.ConvTranspose1d):
        x /= math.sqrt(shape[0] * shape[2] / owner.stride[0])
    elif not isinstance(owner, nn.Embedding):
        x /= math.sqrt(math.prod(shape[1:]))
    if name.startswith("head.ups."):
        x *= _AFTER_SILU
    # The last convolution of a residual branch: without this, many successive branches would amplify the signal.
    if ".convs2." in name or ".block.3.conv." in name:
        x *= 0.3
    return _LOUDNESS.get(name, 1.0) * x


def _weight_normed(name: str, weight: Tensor) -> Mapping[str, Tensor]:
    """Return magnitude and direction of a weight: new names in encoder, decoder and head, old ones in the vector quantisers."""
    stem = name.removesuffix(".weight")
    magnitude = weight.square().sum(dim=tuple(range(1, weight.ndim)), keepdim=True).sqrt()
    if stem.endswith(("in_proj", "out_proj")):
        return {f"{stem}.weight_g": magnitude, f"{stem}.weight_v": weight}
    if name.startswith(("encoder.", "decoder.", "head.")):
        new = f"{stem}.parametrizations.weight.original"
        return {f"{new}0": magnitude, f"{new}1": weight}
    return {name: weight}


def generator(seed: int, name: str) -> torch.Generator:
    """Return the generator of one tensor."""
    # Only 32 bits of a seed count; the odd factor spreads small seeds over all of them.
    return torch.Generator().manual_seed(zlib.crc32(name.encode()) ^ (seed * 0x9E3779B1 & 0xFFFFFFFF))


def row_ranges(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Yield the first row and the one after the last of each piece of a tensor."""
    step = max(1, PIECE // math.prod(shape[1:]))
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])
