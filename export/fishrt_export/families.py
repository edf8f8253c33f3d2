"""What differs between releases and is in no file of theirs: how they are prompted and sampled. One entry for each family."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from fishrt.bundle import RepetitionAware, SamplingDefaults, parse_dataclass
from fishrt.errors import BundleError, SamplingError
from fishrt.sampling import Sampling

from .config import flatten, is_nested
from .errors import ExportError

END = "<|im_end|>"
DEFAULTS = "fishrt.json"
"""A file of ours that a checkpoint folder may hold: defaults of this checkpoint in place of its family's."""
MAX_SEMANTIC = 4096
"""Upstream looks for `<|semantic:i|>` only below this."""


@dataclass(frozen=True, slots=True)
class Family:
    """Releases that share prompts and sampling. The values go into the manifest as they are."""

    name: str
    prompt_dialect: str
    chunk_bytes: int
    sampling: SamplingDefaults


S2 = Family(
    name="s2",
    prompt_dialect="conversation",
    chunk_bytes=300,
    sampling=SamplingDefaults(
        temperature=1.0,
        top_p=0.9,
        top_k=30,
        repetition_aware=RepetitionAware(window=10, temperature=1.0, top_p=0.9),
    ),
)


@dataclass(frozen=True, slots=True)
class Defaults:
    """What `fishrt.json` says; see the manifest's entries of these names."""

    chunk_bytes: int
    sampling: SamplingDefaults


@dataclass(frozen=True, slots=True)
class AudioIds:
    """Token ids by role."""

    semantic: range
    """The token of semantic code i is semantic[i]."""
    end: int


def read_vocabulary(path: Path) -> dict[str, int]:
    """Token → id of a `tokenizer.json`. Raises ExportError."""
    try:
        return Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
    except Exception as error:  # the library raises bare Exception
        raise ExportError(f"{path} cannot be read: {error}", hint="the file may be incomplete; copy it again") from None


def identify(config: Mapping[str, Any], vocabulary: Mapping[str, int]) -> Family:
    """The family of a checkpoint, by its features. Raises ExportError for one that is not supported."""
    if is_nested(config) or "<|semantic:0|>" in vocabulary:
        return S2
    raise ExportError(
        "this checkpoint is of a family that this version does not export: its tokenizer has no <|semantic:0|>",
        hint="Fish Audio S2-Pro is supported",
    )


def with_defaults(family: Family, checkpoint: Path) -> Family:
    """The family with the checkpoint's own defaults, if it has a `fishrt.json`. Raises ExportError for one that is not valid."""
    path = checkpoint / DEFAULTS
    if not path.exists():
        return family
    try:
        own = parse_dataclass(Defaults, json.loads(path.read_text(encoding="utf-8")), DEFAULTS)
        _check_defaults(own)
    except (OSError, ValueError, BundleError, SamplingError) as error:
        raise ExportError(f"{path} is not valid: {error}", hint="mend it, or take it away to use the family's defaults") from None
    return replace(family, chunk_bytes=own.chunk_bytes, sampling=own.sampling)


def _check_defaults(own: Defaults) -> None:
    """Raises ValueError or SamplingError for a number outside its range."""
    Sampling(own.sampling.temperature, own.sampling.top_p, own.sampling.top_k)
    if own.chunk_bytes < 1:
        raise ValueError(f"chunk_bytes is {own.chunk_bytes}; expected at least 1")
    if again := own.sampling.repetition_aware:
        Sampling(again.temperature, again.top_p, None)
        if again.window < 1:
            raise ValueError(f"repetition_aware.window is {again.window}; expected at least 1")


def find_ids(config: Mapping[str, Any], vocabulary: Mapping[str, int], vocab_size: int) -> AudioIds:
    """Ids from the tokenizer; those of the config serve only where the tokenizer names no semantic token."""
    found = {i: vocabulary[name] for i in range(MAX_SEMANTIC) if (name := f"<|semantic:{i}|>") in vocabulary}
    if found:
        semantic = range(min(found.values()), max(found.values()) + 1)
        if any(token != semantic.start + i for i, token in found.items()) or len(found) != len(semantic):
            raise ExportError("the ids of <|semantic:0|>, <|semantic:1|>, … are not consecutive in tokenizer.json")
    else:
        flat = flatten(config)
        begin, end = flat.get("semantic_begin_id"), flat.get("semantic_end_id")
        if not isinstance(begin, int) or not isinstance(end, int) or not 0 < begin <= end:
            raise ExportError("neither tokenizer.json nor config.json tells the ids of the semantic tokens")
        semantic = range(begin, end + 1)
    if END not in vocabulary:
        raise ExportError(f"tokenizer.json has no {END}", hint="is it the tokenizer of this checkpoint?")
    ids = AudioIds(semantic, vocabulary[END])
    if (largest := max(ids.end, ids.semantic[-1])) >= vocab_size:
        raise ExportError(f"tokenizer.json uses id {largest}, but config.json has a vocab_size of {vocab_size}")
    return ids
