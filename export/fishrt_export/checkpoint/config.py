"""Sizes and switches of a dual-AR model, read from its `config.json`: the flat form, or the nested one of S2-Pro."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ExportError
from .families import Family
from .fields import Fields
from .names import CONFIG

Raw = Mapping[str, Any]

NESTED = "fish_qwen3_omni"
FLAT = "dual_ar"
EITHER = "fish_speech"
"""mlx-audio writes this kind for both forms."""

# The value of each absent key. The fast AR's keys have no entry: absent or null, they take the slow AR's value.
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "n_layer": 32,
    "n_head": 32,
    "dim": 4096,
    "n_local_heads": -1,
    "intermediate_size": None,
    "head_dim": 64,
    "rope_base": 10000,
    "norm_eps": 1e-5,
    "max_seq_len": 2048,
    "tie_word_embeddings": True,
    "attention_qkv_bias": False,
    "attention_o_bias": False,
    "attention_qk_norm": False,
    "codebook_size": 160,
    "num_codebooks": 4,
    "n_fast_layer": 4,
    "scale_codebook_embeddings": False,
    "share_codebook_embeddings": True,
    "norm_fastlayer_input": False,
}
# The values of fields that a family does not honour.
_NOT_HONOURED: dict[str, Any] = {
    "head_dim": None,
    "scale_codebook_embeddings": False,
    "share_codebook_embeddings": True,
    "norm_fastlayer_input": False,
}
_FROM_TEXT = (
    "vocab_size",
    "n_layer",
    "n_head",
    "dim",
    "n_local_heads",
    "intermediate_size",
    "head_dim",
    "rope_base",
    "norm_eps",
    "max_seq_len",
    "tie_word_embeddings",
    "attention_qkv_bias",
    "attention_o_bias",
    "attention_qk_norm",
)
_FROM_DECODER = {
    "vocab_size": "codebook_size",
    "num_codebooks": "num_codebooks",
    "n_layer": "n_fast_layer",
    "dim": "fast_dim",
    "n_head": "fast_n_head",
    "n_local_heads": "fast_n_local_heads",
    "head_dim": "fast_head_dim",
    "intermediate_size": "fast_intermediate_size",
    "attention_qkv_bias": "fast_attention_qkv_bias",
    "attention_o_bias": "fast_attention_o_bias",
    "attention_qk_norm": "fast_attention_qk_norm",
}


@dataclass(frozen=True, slots=True)
class StackConfig:
    """One stack of transformer blocks: the slow AR's or the fast AR's."""

    layers: int
    dim: int
    hidden: int
    """Width of the feed-forward network."""
    heads: int
    kv_heads: int
    head_dim: int
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool
    rope_base: float
    norm_eps: float


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A dual-AR model."""

    slow: StackConfig
    fast: StackConfig
    vocab_size: int
    num_codebooks: int
    codebook_width: int
    """Entries of one codebook in the embedding tables and in the fast AR's head."""
    max_seq_len: int
    tied_head: bool
    """The slow AR's head is its token embedding."""
    scale_codebook_embeddings: bool
    """The embeddings of audio positions are divided by √(codebooks + 1)."""
    codebook_offsets: bool
    """Each codebook has its own rows of the embedding table; if not, all share the rows of the first."""
    norm_fast_input: bool
    """The fast AR takes the slow AR's output after the last norm, not before it."""

    @property
    def projects(self) -> bool:
        """Return whether the slow AR's output is projected to another width for the fast AR."""
        return self.slow.dim != self.fast.dim


def is_nested(raw: Raw) -> bool:
    """Return whether `config.json` has S2-Pro's nested form. Raises ExportError for a model of another kind."""
    kind = raw.get("model_type")
    if kind not in (NESTED, FLAT, EITHER):
        raise ExportError(
            f"config.json has model_type {kind!r}; known are {NESTED!r} and {FLAT!r}",
            hint="give the folder of a Fish Speech checkpoint",
        )
    return kind == NESTED or (kind == EITHER and "text_config" in raw)


def flatten(raw: Raw) -> dict[str, Any]:
    """Return the fields under their flat names, for either form. Of the nested form, fields without a flat name are dropped."""
    if not is_nested(raw):
        return dict(raw)
    text, decoder = (_section(raw, name) for name in ("text_config", "audio_decoder_config"))
    flat = {name: text[name] for name in _FROM_TEXT if name in text}
    flat |= {flat_name: decoder[name] for name, flat_name in _FROM_DECODER.items() if name in decoder}
    flat |= {"scale_codebook_embeddings": True, "norm_fastlayer_input": True}
    ids = {"semantic_start_token_id": "semantic_begin_id", "semantic_end_token_id": "semantic_end_id"}
    return flat | {flat_name: raw[name] for name, flat_name in ids.items() if name in raw}


def read_config(raw: Raw, family: Family) -> ModelConfig:
    """Read the sizes and switches, without the fields that the family does not honour upstream.

    Raises ExportError for a field of the wrong type or a contradiction between fields.
    """
    flat = flatten(raw) | {name: value for name, value in _NOT_HONOURED.items() if name not in family.honours}
    read = Fields({**_DEFAULTS, **flat}, CONFIG)
    slow = _stack(read, "")
    fast_values = _fast_values(flat, slow)
    if "head_dim" not in family.honours:
        fast_values["head_dim"] = None
    fast = _stack(Fields(fast_values, CONFIG), "fast_")
    return ModelConfig(
        slow=slow,
        fast=fast,
        vocab_size=read.count("vocab_size"),
        num_codebooks=read.count("num_codebooks"),
        codebook_width=read.count("codebook_size"),
        max_seq_len=read.count("max_seq_len"),
        tied_head=read.flag("tie_word_embeddings"),
        scale_codebook_embeddings=read.flag("scale_codebook_embeddings"),
        codebook_offsets=read.flag("share_codebook_embeddings"),
        norm_fast_input=read.flag("norm_fastlayer_input"),
    )


def _section(raw: Raw, name: str) -> Raw:
    section = raw.get(name)
    if not isinstance(section, Mapping):
        raise ExportError(f"config.json has no {name!r}", hint="the config is not the one of this model; download it again")
    return section


def _fast_values(flat: Raw, slow: StackConfig) -> dict[str, Any]:
    """Return the fast AR's fields under the slow AR's names. Absent and null fields take the slow AR's values."""
    values = {
        "dim": slow.dim,
        "n_head": slow.heads,
        "n_local_heads": slow.kv_heads,
        "head_dim": slow.head_dim,
        "intermediate_size": slow.hidden,
        "attention_qkv_bias": slow.qkv_bias,
        "attention_o_bias": slow.o_bias,
        "attention_qk_norm": slow.qk_norm,
    }
    values |= {name: flat[f"fast_{name}"] for name in values if flat.get(f"fast_{name}") is not None}
    layers = flat.get("n_fast_layer", _DEFAULTS["n_fast_layer"])
    return values | {"n_layer": layers, "rope_base": slow.rope_base, "norm_eps": slow.norm_eps}


def _stack(read: Fields, prefix: str) -> StackConfig:
    dim, heads = read.count("dim"), read.count("n_head")
    kv_heads = heads if read.values["n_local_heads"] in (-1, None) else read.count("n_local_heads")
    head_dim = dim // heads if read.values["head_dim"] is None else read.count("head_dim")
    if heads % kv_heads:
        raise ExportError(f"config.json: {prefix}n_head {heads} is not a multiple of {prefix}n_local_heads {kv_heads}")
    if head_dim % 2:
        raise ExportError(f"config.json: {prefix}head_dim {head_dim} is odd; rotary positions need pairs")
    hidden = -(-int(8 * dim / 3) // 256) * 256 if read.values["intermediate_size"] is None else read.count("intermediate_size")
    return StackConfig(
        layers=read.count("n_layer"),
        dim=dim,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        qkv_bias=read.flag("attention_qkv_bias"),
        o_bias=read.flag("attention_o_bias"),
        qk_norm=read.flag("attention_qk_norm"),
        rope_base=read.number("rope_base"),
        norm_eps=read.number("norm_eps"),
    )
