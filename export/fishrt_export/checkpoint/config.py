"""Sizes and switches of a dual-AR model, read from its `config.json`: the flat form, or the nested one of S2-Pro.

`Fields` reads the fields of any config, the codec's too. Its errors name the file, the field and its value.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ExportError
from .families import Family
from .names import CONFIG

MOST = 2**24
"""Upper bound of every size: no model reaches it, and a larger size would fill the memory or fail later without its name."""


@dataclass(frozen=True, slots=True)
class Fields:
    """One object of a config. Every method that reads a field raises ExportError if it is absent or has a wrong value."""

    values: Mapping[str, Any]
    source: str
    """File name of the config."""
    prefix: str = ""
    """Names of the enclosing objects, each followed by a dot."""

    def raw(self, name: str) -> Any:
        """Return the value as it is."""
        if name not in self.values:
            raise ExportError(f"{self.source} lacks {self.prefix}{name}", hint="the config must be the one of this checkpoint")
        return self.values[name]

    def count(self, name: str) -> int:
        """Return a whole number, 1 to MOST."""
        value = self.raw(name)
        if not _is_whole(value) or not 1 <= value <= MOST:
            raise self.error(name, f"a positive whole number up to {MOST:,}")
        return int(value)

    def number(self, name: str) -> float:
        """Return a positive finite number."""
        value = self.raw(name)
        if not (_is_whole(value) or isinstance(value, float)) or not 0 < value <= sys.float_info.max:
            raise self.error(name, "a positive number")
        return float(value)

    def flag(self, name: str) -> bool:
        """Return true or false."""
        value = self.raw(name)
        if not isinstance(value, bool):
            raise self.error(name, "true or false")
        return value

    def counts(self, name: str, *, least: int = 1) -> tuple[int, ...]:
        """Return a list of one or more whole numbers, each at least `least`."""
        value = self.raw(name)
        if not isinstance(value, list | tuple) or not value or not all(_is_whole(item) and item >= least for item in value):
            raise self.error(name, f"a list of whole numbers of at least {least}")
        return tuple(value)

    def section(self, name: str) -> Fields:
        """Return the fields of an object within this one."""
        value = self.raw(name)
        if not isinstance(value, Mapping):
            raise self.error(name, "an object")
        return Fields(value, self.source, f"{self.prefix}{name}.")

    def only(self, known: Iterable[str]) -> None:
        """Check that there are no other fields. Raises ExportError."""
        if unknown := sorted(self.values.keys() - set(known)):
            names = ", ".join(f"{self.prefix}{name}" for name in unknown)
            raise ExportError(
                f"{self.source} has unknown fields: {names}",
                hint="remove them if they change nothing; options that they set are not supported",
            )

    def error(self, name: str, expected: str) -> ExportError:
        """Return the error for a field whose value is not the expected one."""
        return ExportError(f"{self.source}: {self.prefix}{name} is {self.values[name]!r}; expected {expected}")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


Raw = Mapping[str, Any]

NESTED = "fish_qwen3_omni"
FLAT = "dual_ar"
EITHER = "fish_speech"
"""mlx-audio writes this kind for both forms."""

# The value of each absent key.
_TEXT: dict[str, Any] = {
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
}
_AUDIO: dict[str, Any] = {
    "codebook_size": 160,
    "num_codebooks": 4,
    "n_fast_layer": 4,
    "scale_codebook_embeddings": False,
    "share_codebook_embeddings": True,
    "norm_fastlayer_input": False,
}
# Keys of the fast AR, behind "fast_", and the slow AR's values, which they have if they are absent or null.
_FAST = {
    "dim": "dim",
    "n_head": "heads",
    "n_local_heads": "kv_heads",
    "head_dim": "head_dim",
    "intermediate_size": "hidden",
    "attention_qkv_bias": "qkv_bias",
    "attention_o_bias": "o_bias",
    "attention_qk_norm": "qk_norm",
}
_FROM_DECODER = {
    "vocab_size": "codebook_size",
    "num_codebooks": "num_codebooks",
    "n_layer": "n_fast_layer",
    **{name: f"fast_{name}" for name in _FAST},
}
# The values of fields that a family does not honour.
_NOT_HONOURED: dict[str, Any] = {
    "head_dim": None,
    "scale_codebook_embeddings": False,
    "share_codebook_embeddings": True,
    "norm_fastlayer_input": False,
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
    text, decoder = (Fields(raw, CONFIG).section(name).values for name in ("text_config", "audio_decoder_config"))
    flat = {name: text[name] for name in _TEXT if name in text}
    flat |= {flat_name: decoder[name] for name, flat_name in _FROM_DECODER.items() if name in decoder}
    flat |= {"scale_codebook_embeddings": True, "norm_fastlayer_input": True}
    ids = {"semantic_start_token_id": "semantic_begin_id", "semantic_end_token_id": "semantic_end_id"}
    return flat | {flat_name: raw[name] for name, flat_name in ids.items() if name in raw}


def read_config(raw: Raw, family: Family) -> ModelConfig:
    """Read the sizes and switches, without the fields that the family does not honour upstream.

    Raises ExportError for a field of the wrong type or a contradiction between fields.
    """
    flat = flatten(raw) | {name: value for name, value in _NOT_HONOURED.items() if name not in family.honours}
    read = Fields({**_TEXT, **_AUDIO, **flat}, CONFIG)
    slow = _stack(read)
    given = {name: flat[f"fast_{name}"] for name in _FAST if flat.get(f"fast_{name}") is not None}
    fast = {name: getattr(slow, field) for name, field in _FAST.items()} | given | {"n_layer": read.values["n_fast_layer"]}
    fast |= {"rope_base": slow.rope_base, "norm_eps": slow.norm_eps}
    if "head_dim" not in family.honours:
        fast["head_dim"] = None
    return ModelConfig(
        slow=slow,
        fast=_stack(Fields(fast, CONFIG, "fast_")),
        vocab_size=read.count("vocab_size"),
        num_codebooks=read.count("num_codebooks"),
        codebook_width=read.count("codebook_size"),
        max_seq_len=read.count("max_seq_len"),
        tied_head=read.flag("tie_word_embeddings"),
        scale_codebook_embeddings=read.flag("scale_codebook_embeddings"),
        codebook_offsets=read.flag("share_codebook_embeddings"),
        norm_fast_input=read.flag("norm_fastlayer_input"),
    )


def _stack(read: Fields) -> StackConfig:
    prefix, dim, heads = read.prefix, read.count("dim"), read.count("n_head")
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
