"""Writing of a checkpoint folder, tensor by tensor if the format allows it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from fishrt_export.checkpoint.config import read_config
from fishrt_export.checkpoint.families import FAMILIES as KNOWN
from fishrt_export.checkpoint.families import Family
from fishrt_export.checkpoint.names import CODEC_CONFIG, CONFIG, INDEX, PICKLE
from fishrt_export.models.codec.dac_config import DacConfig
from fishrt_export.models.codec.firefly import FireflyConfig
from fishrt_export.models.codec.load import OFFICIAL, CodecConfig, official_firefly

from . import tokenizer
from .echo import ECHO, write_echo
from .safetensors_file import BYTES, write_bfloat16
from .sizes import FAMILIES, Release, overlaid
from .weights import LanguageModelWeights, codec_tensors, empty_codec, language_model_shapes

SHARD_BYTES = 5_000_000_000
_TINY_TEXT_TOKENS = 1000
_SPARE = 16

Progress = Callable[[str], None]
"""Called with the name of each part at its start."""


def write_checkpoint(
    family: str,
    out: str | Path,
    *,
    seed: int = 0,
    tiny: bool = False,
    layers: int | None = None,
    progress: Progress = lambda _: None,
) -> Path:
    """Write a checkpoint of `family` (a key of FAMILIES, or ECHO) into the new or existing folder `out`, and return the folder.

    The same seed gives the same files. tiny: the same layout with small widths, few layers and few text tokens, of a few MB.
    layers: of S2-Pro's slow AR in place of 36, with official widths and vocabulary; the codec is small.
    The sharded family needs little memory, the others twice the size of their largest file.
    Raises ValueError for an unknown family.
    """
    if family == ECHO:
        return write_echo(Path(out), seed=seed, tiny=tiny, progress=progress)
    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}; choose one of: {', '.join((*FAMILIES, ECHO))}")
    release, known, out = FAMILIES[family], KNOWN[family], Path(out)
    out.mkdir(parents=True, exist_ok=True)
    progress("tokenizer")
    text_tokens = _TINY_TEXT_TOKENS if tiny else release.text_tokens
    semantic, end, ids = _write_tokenizer(out, release, known, text_tokens)
    raw = overlaid(release.config, release.tiny) if tiny else overlaid(release.config, {})
    if tiny:
        _fit_vocabulary(raw, ids + _SPARE, semantic)
    if layers is not None:
        raw["text_config"]["n_layer"] = layers
    (out / CONFIG).write_text(json.dumps(raw, indent=1))
    config = read_config(raw, known)
    weights = LanguageModelWeights(config, semantic, end, seed)
    shapes = language_model_shapes(config)
    if "text_config" in raw:
        _write_shards(out, weights, shapes, progress)
    else:
        progress(PICKLE)
        torch.save({name: weights.tensor(name, shape) for name, shape in shapes.items()}, out / PICKLE)
    progress(release.codec)
    _write_codec(out, release, known, seed, tiny=tiny or layers is not None)
    return out


def count_parameters(family: str) -> tuple[int, int]:
    """Return the numbers of weights of the language model and of the codec, in the official sizes."""
    known = KNOWN[family]
    shapes = language_model_shapes(read_config(overlaid(FAMILIES[family].config, {}), known))
    codec = empty_codec(_codec_config(_codec_values(known), known))
    return sum(map(math.prod, shapes.values())), sum(p.numel() for p in codec.parameters())


def _write_tokenizer(out: Path, release: Release, family: Family, text_tokens: int) -> tuple[range, int, int]:
    """Write the tokenizer. Return the ids of the semantic tokens, the id of the end token, and the number of ids."""
    path = out / release.tokenizer_file
    if family.control_tokens:
        tokenizer.write_tiktoken(path, text_tokens)
        names = family.control_tokens
        tokenizer.write_special_tokens(path.with_name("special_tokens.json"), names, text_tokens)
        first = text_tokens + names.index("<|semantic:0|>")
        ids = text_tokens + len(names)
        return range(first, ids), text_tokens + names.index("<|im_end|>"), ids
    if family.one_semantic:
        tokenizer.write_1_2(path, text_tokens)
        return range(5, 6), 4, text_tokens
    ids = tokenizer.write_s2(path, text_tokens)
    return range(ids - 4096, ids), text_tokens + 2, ids


def _fit_vocabulary(raw: dict[str, Any], size: int, semantic: range) -> None:
    """Put the vocabulary of a small tokenizer into the config."""
    if "text_config" in raw:
        raw["text_config"]["vocab_size"] = size
        raw["eos_token_id"] = semantic.start - 33
        raw |= {"semantic_start_token_id": semantic.start, "semantic_end_token_id": semantic.stop - 1}
    else:
        raw["vocab_size"] = size


def _write_shards(out: Path, weights: LanguageModelWeights, shapes: Mapping[str, tuple[int, ...]], progress: Progress) -> None:
    """Write the weights in files of at most SHARD_BYTES, and their index."""
    sizes = {name: BYTES * math.prod(shape) for name, shape in shapes.items()}
    shards: list[list[str]] = [[]]
    for name in shapes:
        if shards[-1] and sum(sizes[n] for n in shards[-1]) + sizes[name] > SHARD_BYTES:
            shards.append([])
        shards[-1].append(name)
    places = {}
    for number, names in enumerate(shards, 1):
        path = out / f"model-{number:05}-of-{len(shards):05}.safetensors"
        progress(path.name)
        flat = {nested_name(name): name for name in names}
        places |= dict.fromkeys(flat, path.name)
        own = {nested: shapes[name] for nested, name in flat.items()}
        write_bfloat16(path, own, lambda nested, flat=flat: weights.pieces(flat[nested], shapes[flat[nested]]))
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
    (out / INDEX).write_text(json.dumps(index, indent=1))


def nested_name(name: str) -> str:
    """Return the name of a tensor in S2's files."""
    if name.startswith("fast_"):
        return "audio_decoder." + name.removeprefix("fast_")
    return ("audio_decoder." if name.startswith("codebook") else "text_model.model.") + name


def _write_codec(out: Path, release: Release, family: Family, seed: int, *, tiny: bool) -> None:
    raw = _codec_values(family)
    if tiny:
        raw = overlaid(raw, release.tiny_codec)
        (out / CODEC_CONFIG).write_text(json.dumps(raw, indent=1))
    torch.save(codec_tensors(_codec_config(raw, family), seed), out / release.codec)


def _codec_values(family: Family) -> dict[str, Any]:
    return OFFICIAL if family.codec == "dac" else official_firefly(causal=family.codec == "firefly")


def _codec_config(raw: dict[str, Any], family: Family) -> CodecConfig:
    return DacConfig.from_json(raw) if family.codec == "dac" else FireflyConfig.from_json(raw, causal=family.codec == "firefly")
