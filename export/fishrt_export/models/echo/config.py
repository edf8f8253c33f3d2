"""Sizes of the diffusion model, which only the shapes of its tensors state."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from ...errors import ExportError

NORM_EPS = 1e-5
ROPE_BASE = 10000.0
BLOCKWISE = ("latent_encoder.", "latent_norm.")
"""Starts of the names of tensors that only generation in blocks needs."""
_BLOCKWISE_PARTS = (".wk_latent.", ".wv_latent.")


@dataclass(frozen=True, slots=True)
class EncoderSizes:
    """One encoder: of text, or of latents."""

    layers: int
    dim: int
    heads: int
    head_dim: int
    hidden: int


@dataclass(frozen=True, slots=True)
class EchoConfig:
    """A diffusion model."""

    channels: int
    width: int
    layers: int
    heads: int
    head_dim: int
    hidden: int
    embedding: int
    """Width of the embedding of a time."""
    rank: int
    """Rank of the modulation of a block."""
    vocabulary: int
    patch: int
    text: EncoderSizes
    speaker: EncoderSizes
    latent: EncoderSizes | None
    """None: the model does not generate in blocks."""


def is_blockwise(name: str) -> bool:
    """Return whether only generation in blocks needs a tensor."""
    return name.startswith(BLOCKWISE) or any(part in name for part in _BLOCKWISE_PARTS)


def infer_config(tensors: Mapping[str, Tensor]) -> EchoConfig:
    """Return the sizes that the shapes of a checkpoint's tensors state. Raises ExportError for a tensor that is not there."""
    shapes: dict[str, tuple[int, ...]] = {}

    def shape(name: str, rank: int = 2) -> tuple[int, ...]:
        if name not in shapes:
            if name not in tensors:
                raise ExportError(
                    f"the checkpoint lacks {name}, which states a size of the model",
                    hint="the checkpoint must be complete: download it again",
                )
            shapes[name] = tuple(tensors[name].shape)
        if len(shapes[name]) != rank:
            raise ExportError(f"{name} is {list(shapes[name])}; expected {rank} dimensions", hint="the file is of another model")
        return shapes[name]

    width, channels = shape("in_proj.weight")
    heads, head_dim = shape("blocks.0.attention.q_norm.weight")
    joined = shape("speaker_encoder.in_proj.weight")[1]
    if joined % channels or head_dim % 2:
        raise ExportError(
            f"speaker_encoder.in_proj takes {joined} numbers and in_proj {channels}; a head has {head_dim}",
            hint="a patch must be whole frames, and a head must be of pairs: the file is of another model",
        )
    return EchoConfig(
        channels=channels,
        width=width,
        layers=_count("blocks", tensors),
        heads=heads,
        head_dim=head_dim,
        hidden=shape("blocks.0.mlp.w1.weight")[0],
        embedding=shape("cond_module.0.weight")[1],
        rank=shape("blocks.0.attention_adaln.shift_down.weight")[0],
        vocabulary=shape("text_encoder.text_embedding.weight")[0],
        patch=joined // channels,
        text=_encoder("text", tensors, shape),
        speaker=_encoder("speaker", tensors, shape),
        latent=_encoder("latent", tensors, shape) if any(is_blockwise(name) for name in tensors) else None,
    )


def _encoder(of: str, tensors: Mapping[str, Tensor], shape: Callable[..., tuple[int, ...]]) -> EncoderSizes:
    stem = f"{of}_encoder.blocks"
    heads, head_dim = shape(f"{stem}.0.attention.q_norm.weight")
    if head_dim % 2:
        raise ExportError(f"a head of {of}_encoder has {head_dim} numbers", hint="rotary positions need pairs")
    hidden, dim = shape(f"{stem}.0.mlp.w1.weight")
    return EncoderSizes(_count(stem, tensors), dim, heads, head_dim, hidden)


def _count(stem: str, tensors: Mapping[str, Tensor]) -> int:
    """Return the number of blocks, by the largest index in the names."""
    found = (re.match(rf"{re.escape(stem)}\.(\d+)\.", name) for name in tensors)
    return 1 + max(int(match[1]) for match in found if match)
