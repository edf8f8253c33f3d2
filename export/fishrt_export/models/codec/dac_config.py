"""Sizes of the modified DAC codec, read from the originals' field names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ...checkpoint.config import Fields
from ...checkpoint.names import CODEC_CONFIG
from ...errors import ExportError
from .layers import TransformerConfig

ENCODER_WINDOW = 512
"""Attention window of the encoder's transformer; the originals ignore their config here."""
MAX_FRAMES = 4096
"""Longest sequence of a codec graph in frames (190 s at 21.5 Hz): the size of its rotary tables."""
HEAD = 64
"""Channels for each head of the encoder's transformer."""

# The last fields of each list have no effect here: they are for training, for unused modules, or limits that MAX_FRAMES replaces.
_FIELDS = (
    *("sample_rate", "encoder_dim", "encoder_rates", "decoder_dim", "decoder_rates", "latent_dim", "quantizer"),
    *("encoder_transformer_layers", "transformer_general_config", "decoder_transformer_layers"),
)
_QUANTIZER_FIELDS = (
    *("input_dim", "n_codebooks", "codebook_size", "codebook_dim", "semantic_codebook_size", "downsample_factor"),
    *("pre_module", "post_module", "quantizer_dropout"),
)
_TRANSFORMER_FIELDS = (
    *("n_layer", "n_head", "n_local_heads", "dim", "intermediate_size", "head_dim", "rope_base", "norm_eps", "channels_first"),
    *("block_size", "dropout_rate", "attn_dropout_rate"),
)


@dataclass(frozen=True, slots=True)
class DacConfig:
    """Sizes of a codec. Rates are strides; their product times the product of `downsample` is the hop in samples."""

    sample_rate: int
    encoder_dim: int
    encoder_rates: tuple[int, ...]
    decoder_dim: int
    """Channels before the first of `decoder_rates`; each halves them, rounding down."""
    decoder_rates: tuple[int, ...]
    latent_dim: int
    encoder_transformers: tuple[TransformerConfig | None, ...]
    pre_module: TransformerConfig
    post_module: TransformerConfig
    downsample: tuple[int, ...]
    semantic_codebook_size: int
    codebook_size: int
    codebook_dim: int
    residual_codebooks: int

    kind: ClassVar[str] = "dac"
    """See CodecSource.kind."""
    max_frames: ClassVar[int] = MAX_FRAMES
    min_samples: ClassVar[int] = 1
    """Any audio can be padded to a frame."""
    context: ClassVar[None] = None
    """Through layers of attention and absolute positions, a frame depends on all earlier ones."""

    @property
    def hop(self) -> int:
        """Return the samples of a frame."""
        return math.prod(self.encoder_rates) * math.prod(self.downsample)

    @property
    def sample_multiple(self) -> int:
        """Return the hop: only whole frames can be encoded."""
        return self.hop

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Return the number of entries of each codebook, the semantic one first."""
        return (self.semantic_codebook_size, *[self.codebook_size] * self.residual_codebooks)

    @property
    def sight(self) -> int:
        """Return the frames of the longest attention window, rounded up."""
        windows, rate = [self.pre_module.window, self.post_module.window], self.hop  # rate: positions per frame
        for stride, transformer in zip(self.encoder_rates, self.encoder_transformers, strict=True):
            rate //= stride
            if transformer:
                windows.append(-(-transformer.window // rate))
        return max(windows)

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> DacConfig:
        """Read the originals' field names. Raises ExportError for a missing, mistyped, contradictory or unknown field."""
        read = Fields(config, CODEC_CONFIG)
        quantizer, general = read.section("quantizer"), read.section("transformer_general_config")
        read.only(_FIELDS)
        quantizer.only(_QUANTIZER_FIELDS)
        _check_common(general)
        rates, depths = read.counts("encoder_rates"), read.counts("encoder_transformer_layers", least=0)
        if len(depths) != len(rates):
            raise read.error("encoder_transformer_layers", f"one number for each of the {len(rates)} encoder_rates")
        width = read.count("encoder_dim")
        self = cls(
            sample_rate=read.count("sample_rate"),
            encoder_dim=width,
            encoder_rates=rates,
            decoder_dim=read.count("decoder_dim"),
            decoder_rates=read.counts("decoder_rates"),
            latent_dim=width * 2 ** len(rates) if config.get("latent_dim") is None else read.count("latent_dim"),
            encoder_transformers=tuple(_in_encoder(general, n, width * 2**block) for block, n in enumerate(depths, start=1)),
            pre_module=_transformer(quantizer.section("pre_module")),
            post_module=_transformer(quantizer.section("post_module")),
            downsample=quantizer.counts("downsample_factor"),
            semantic_codebook_size=quantizer.count("semantic_codebook_size"),
            codebook_size=quantizer.count("codebook_size"),
            codebook_dim=quantizer.count("codebook_dim"),
            residual_codebooks=quantizer.count("n_codebooks"),
        )
        if math.prod(self.decoder_rates) != math.prod(rates):
            raise read.error("decoder_rates", f"numbers with the product of encoder_rates, {math.prod(rates)}")
        if not self.decoder_dim >> len(self.decoder_rates):
            raise read.error(
                "decoder_dim", "enough channels that one is left after they are halved once for each of decoder_rates"
            )
        for part in (quantizer, quantizer.section("pre_module"), quantizer.section("post_module")):
            if part.count("input_dim") != self.latent_dim:
                raise part.error("input_dim", f"the encoder's width, {self.latent_dim}")
        return self


def _in_encoder(general: Fields, layers: int, dim: int) -> TransformerConfig | None:
    """Return the transformer of one block of the encoder, or None for no layers. The number of heads ignores `head_dim`."""
    if not layers:
        return None
    if dim < HEAD:
        raise ExportError(f"{general.source}: encoder_transformer_layers has one of width {dim}; expected at least {HEAD}")
    return TransformerConfig(
        layers=layers,
        dim=dim,
        hidden=3 * dim,
        heads=dim // HEAD,
        head_dim=_head_dim(general) if "head_dim" in general.values else HEAD,
        window=ENCODER_WINDOW,
        rope_base=general.number("rope_base"),
        norm_eps=general.number("norm_eps"),
    )


def _transformer(module: Fields) -> TransformerConfig:
    module.only(("input_dim", "window_size", "config", "causal"))
    if module.values.get("causal", True) is not True:
        raise module.error("causal", "true")
    config = module.section("config")
    _check_common(config)
    if config.count("dim") != module.count("input_dim"):
        raise config.error("dim", f"the input_dim around it, {module.count('input_dim')}")
    return TransformerConfig(
        layers=config.count("n_layer"),
        dim=config.count("dim"),
        hidden=config.count("intermediate_size"),
        heads=config.count("n_head"),
        head_dim=_head_dim(config),
        window=module.count("window_size"),
        rope_base=config.number("rope_base"),
        norm_eps=config.number("norm_eps"),
    )


def _check_common(config: Fields) -> None:
    """Check the fields that every transformer's config has."""
    config.only(_TRANSFORMER_FIELDS)
    if config.values.get("n_local_heads", -1) not in (-1, config.values.get("n_head", -1)):
        raise config.error("n_local_heads", "-1, as many as n_head")
    if config.values.get("channels_first", True) is not True:
        raise config.error("channels_first", "true")


def _head_dim(config: Fields) -> int:
    size = config.count("head_dim")
    if size % 2:
        raise config.error("head_dim", "an even number: rotary positions need pairs")
    return size
