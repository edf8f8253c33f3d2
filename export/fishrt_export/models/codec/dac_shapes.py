"""Sizes of the DAC codec from the shapes of its tensors, for files without a config."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from ...errors import ExportError
from .dac_config import ENCODER_WINDOW, HEAD, DacConfig
from .layers import TransformerConfig

WINDOW = 128
"""Attention window of the quantiser's transformers."""
SAMPLE_RATE = 44100


def infer_dac_config(
    tensors: Mapping[str, Tensor], head_dims: Mapping[str, int], *, window: int = WINDOW, encoder_window: int = ENCODER_WINDOW
) -> DacConfig:
    """Return the sizes of a codec with fused weight norm.

    head_dims: width of a head by the name of a transformer, such as `quantizer.pre_module`; else HEAD. window, encoder_window:
    no shape states them. Raises ExportError for a tensor that is not there and for sizes that contradict each other.
    """

    def shape(name: str) -> tuple[int, ...]:
        if name not in tensors:
            raise ExportError(f"the codec lacks {name}", hint="give the folder of the codec of this model, complete")
        return tuple(tensors[name].shape)

    encoder_rates = _rates("encoder.block.{}.block.4.conv.weight", tensors)
    decoder_rates = _rates("decoder.model.{}.block.1.conv.weight", tensors)
    if math.prod(encoder_rates) != math.prod(decoder_rates):
        raise ExportError(f"the codec's encoder has strides of {encoder_rates}, its decoder of {decoder_rates}")

    def transformer(stem: str, window: int) -> TransformerConfig:
        (rows, dim), head_dim = shape(f"{stem}.layers.0.attention.wqkv.weight"), head_dims.get(stem, HEAD)
        if rows % (3 * head_dim) or head_dim % 2:
            raise ExportError(f"{stem} has {rows} rows of queries, keys and values, which are no heads of {head_dim}")
        return TransformerConfig(
            layers=len(_numbered(stem + ".layers.{}.attention.wqkv.weight", tensors)),
            dim=dim,
            hidden=shape(f"{stem}.layers.0.feed_forward.w1.weight")[0],
            heads=rows // (3 * head_dim),
            head_dim=head_dim,
            window=window,
            rope_base=10000.0,
            norm_eps=1e-5,
        )

    def in_encoder(block: int) -> TransformerConfig | None:
        stem = f"encoder.block.{block}.block.5"
        return transformer(stem, encoder_window) if any(name.startswith(f"{stem}.") for name in tensors) else None

    semantic, codebook_dim = shape("quantizer.semantic_quantizer.quantizers.0.codebook.weight")
    books = "quantizer.quantizer.quantizers.{}.codebook.weight"
    return DacConfig(
        sample_rate=SAMPLE_RATE,
        encoder_dim=shape("encoder.block.0.conv.weight")[0],
        encoder_rates=encoder_rates,
        decoder_dim=shape("decoder.model.0.conv.weight")[0],
        decoder_rates=decoder_rates,
        latent_dim=shape("decoder.model.0.conv.weight")[1],
        encoder_transformers=tuple(in_encoder(block) for block in range(1, len(encoder_rates) + 1)),
        pre_module=transformer("quantizer.pre_module", window),
        post_module=transformer("quantizer.post_module", window),
        downsample=tuple(shape(name)[2] for name in _numbered("quantizer.downsample.{}.0.conv.weight", tensors)),
        semantic_codebook_size=semantic,
        codebook_size=shape(books.format(0))[0],
        codebook_dim=codebook_dim,
        residual_codebooks=len(_numbered(books, tensors)),
    )


def _numbered(pattern: str, tensors: Mapping[str, Tensor], first: int = 0) -> list[str]:
    """Return the names of a pattern with the numbers from `first` on, up to the first that is not there."""
    names: list[str] = []
    while (name := pattern.format(first + len(names))) in tensors:
        names.append(name)
    return names


def _rates(pattern: str, tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Return strides: half of the kernels of the convolutions that have them."""
    return tuple(tensors[name].shape[2] // 2 for name in _numbered(pattern, tensors, 1))
