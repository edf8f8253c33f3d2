"""The family of a checkpoint, and the token ids of its speech.

A family is recognised by its tokenizer, its codec and the form of its config, never by the name of a folder. All three are
compared with every family, so that a mixture of releases in one folder is found first.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ExportError
from .config import flatten, is_nested
from .families import FAMILIES, Family
from .names import TIKTOKEN, TOKENIZER

log = logging.getLogger(__name__)

END = "<|im_end|>"
SEMANTIC = "<|semantic|>"
SPARE_TOKENS = 64
"""Embeddings without a token that any model may have, or a tenth of a large one: no published checkpoint has more."""
MAX_SEMANTIC = 4096
"""Upstream looks for `<|semantic:i|>` only below this."""

# Fields that config.json can have from a release on. Upstream's earlier code refuses them.
_NEW_FIELDS = {
    "1.2": (),
    "1.4": (
        *("fast_dim", "fast_n_head", "fast_n_local_heads", "fast_head_dim", "fast_intermediate_size"),
        *("fast_attention_qkv_bias", "share_codebook_embeddings", "is_reward_model"),
    ),
    "1.5": ("scale_codebook_embeddings",),
    "s1": ("attention_o_bias", "attention_qk_norm", "fast_attention_o_bias", "fast_attention_qk_norm"),
    "s2": ("norm_fastlayer_input", "semantic_begin_id", "semantic_end_id"),
}
_RELEASES = list(_NEW_FIELDS)
_OF_THIS = "take the tokenizer of this checkpoint"
_HINT = "take all files from one checkpoint; --family NAME settles it where only config.json or the tokenizer's format is unusual"


@dataclass(frozen=True, slots=True)
class Evidence:
    """Evidence of the family of a checkpoint folder."""

    config: Mapping[str, Any]
    """The content of config.json."""
    vocabulary: Mapping[str, int] | None
    """Token → id of a tokenizer.json; None for a tokenizer.tiktoken, which has no control tokens of its own."""
    codec: str | None
    """See CodecSource.kind. None: unknown."""


@dataclass(frozen=True, slots=True)
class AudioIds:
    """Token ids by role."""

    semantic: range
    """The token of semantic code i is semantic[i]. A family with one semantic token has a range of one."""
    end: int


def identify(evidence: Evidence, name: str | None = None) -> Family:
    """Return the one family that fits, or the family `name` if its codec and its semantic tokens fit.

    Raises ExportError unless exactly one family fits.
    """
    if name is not None:
        if wrong := list(_contradictions(FAMILIES[name], evidence)):
            raise ExportError(f"the checkpoint cannot be of the family {name}, which has {'; '.join(wrong)}", hint=_HINT)
        return FAMILIES[name]
    misfits = {family.name: [*_contradictions(family, evidence), *_oddities(family, evidence)] for family in FAMILIES.values()}
    fitting = [name for name, wrong in misfits.items() if not wrong]
    if not fitting:
        listing = "\n".join(f"  {name}: {'; '.join(wrong)}" for name, wrong in misfits.items())
        raise ExportError(f"the files are not those of one family. Each family has instead:\n{listing}", hint=_HINT)
    if len(fitting) > 1:
        raise ExportError(f"the checkpoint may be of several families: {', '.join(fitting)}", hint="choose one with --family")
    return FAMILIES[fitting[0]]


def _contradictions(family: Family, evidence: Evidence) -> Iterator[str]:
    """Yield each feature that every checkpoint of the family has and this one lacks."""
    if evidence.codec not in (None, family.codec):
        yield f"a codec of the kind {family.codec!r}, not {evidence.codec!r}"
    if (vocabulary := evidence.vocabulary) is None:
        return
    one, many = SEMANTIC in vocabulary, "<|semantic:0|>" in vocabulary
    if family.one_semantic and not one:
        yield f"a tokenizer with {SEMANTIC}"
    if not family.one_semantic and not many and (one or not flatten(evidence.config).get("semantic_begin_id")):
        yield "a tokenizer with <|semantic:0|>"


def _oddities(family: Family, evidence: Evidence) -> Iterator[str]:
    """Yield the other features of the family's published checkpoints that this one lacks."""
    if evidence.vocabulary is None:
        if not family.control_tokens:
            yield f"a {TOKENIZER}"
    elif lacking := [t for t in family.control_tokens if t not in evidence.vocabulary and not t.startswith("<|semantic:")]:
        yield f"a {TIKTOKEN}, or a tokenizer with {', '.join(lacking[:3])}"
    nested = is_nested(evidence.config)
    # A null says nothing: later code writes it where it saves an earlier model again.
    fields = {name for name, value in flatten(evidence.config).items() if value is not None}
    later = [name for release in _RELEASES[_RELEASES.index(family.name) + 1 :] for name in _NEW_FIELDS[release]]
    if family.name != "s2" and nested:
        yield "a flat config.json"
    elif strange := [name for name in later if name in fields]:
        yield f"a config.json without {', '.join(strange[:3])}{' …' if len(strange) > 3 else ''}"
    if family.name == "s1" and "share_codebook_embeddings" in fields:
        yield "a config.json without share_codebook_embeddings"
    if family.name == "s2" and not nested and "norm_fastlayer_input" not in evidence.config:
        yield "a config.json that is nested, or has norm_fastlayer_input"


def find_ids(config: Mapping[str, Any], vocabulary: Mapping[str, int], vocab_size: int, family: Family) -> AudioIds:
    """Return the ids that the tokenizer has, or those of the config if the tokenizer has no semantic token.

    Logs a warning if many token embeddings have no token: they are padding, or the tokenizer is another model's. Raises
    ExportError for a tokenizer without the ids, or with an id that has no embedding.
    """
    for token in (SEMANTIC, END) if family.one_semantic else (END,):
        if token not in vocabulary:
            raise ExportError(f"the tokenizer has no {token}", hint=_OF_THIS)
    one = vocabulary.get(SEMANTIC, 0)
    semantic = range(one, one + 1) if family.one_semantic else _many_ids(config, vocabulary)
    largest = max(*vocabulary.values(), semantic[-1])
    if largest >= vocab_size:
        raise ExportError(
            f"the tokenizer has {len(vocabulary)} tokens and ids up to {largest}, but config.json a vocab_size of {vocab_size}",
            hint=_OF_THIS,
        )
    if vocab_size - len(vocabulary) > max(SPARE_TOKENS, vocab_size // 10):
        log.warning(
            "the tokenizer has %d tokens for a vocab_size of %d in config.json; if the speech is noise, it is the tokenizer of "
            "another checkpoint",
            len(vocabulary),
            vocab_size,
        )
    return AudioIds(semantic, vocabulary[END])


def _many_ids(config: Mapping[str, Any], vocabulary: Mapping[str, int]) -> range:
    found = {i: vocabulary[name] for i in range(MAX_SEMANTIC) if (name := f"<|semantic:{i}|>") in vocabulary}
    if found:
        semantic = range(min(found.values()), max(found.values()) + 1)
        if any(token != semantic.start + i for i, token in found.items()) or len(found) != len(semantic):
            raise ExportError("the ids of <|semantic:0|>, <|semantic:1|>, … are not consecutive in the tokenizer")
        return semantic
    flat = flatten(config)
    begin, end = flat.get("semantic_begin_id"), flat.get("semantic_end_id")
    if not isinstance(begin, int) or not isinstance(end, int) or not 0 < begin <= end:
        raise ExportError("neither the tokenizer nor config.json has the ids of the semantic tokens")
    return range(begin, end + 1)
