"""Finds the files of a checkpoint and reads their tensors, under the names that the originals gave them.

Nothing is interpreted here but containers: safetensors shards and their index, pickles with their wrappings, JSON.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import ExportError
from .files import CODEC, CODEC_CONFIG, CONFIG, FIREFLY, INDEX, PICKLE, SINGLE, TIKTOKEN, TOKENIZER
from .lazy import Lazy, Maker

DAMAGED = "the file may be incomplete; copy or download it again"


@dataclass(frozen=True, slots=True)
class LanguageModelFiles:
    """The dual-AR half of a checkpoint."""

    config: dict[str, Any]
    weights: Path
    """The index of the shards, the single safetensors file, or the pickle."""
    tokenizer: Path
    """tokenizer.json or tokenizer.tiktoken."""


@dataclass(frozen=True, slots=True)
class CodecFiles:
    """The codec half of a checkpoint."""

    weights: Path
    config: dict[str, Any] | None
    """None: the codec has its family's official sizes."""


def find_language_model(folder: Path) -> LanguageModelFiles:
    """Raises ExportError that names every file the folder lacks, and for two tokenizers."""
    _require_folder(folder)
    weights = [folder / name for name in (INDEX, SINGLE, PICKLE) if (folder / name).is_file()]
    tokenizers = [folder / name for name in (TOKENIZER, TIKTOKEN) if (folder / name).is_file()]
    missing = [] if (folder / CONFIG).is_file() else [CONFIG]
    if not tokenizers:
        missing.append(f"tokenizer ({TOKENIZER} or {TIKTOKEN})")
    if not weights:
        missing.append(f"weights ({INDEX}, {SINGLE} or {PICKLE})")
    if missing:
        raise ExportError(
            f"{folder} is not a complete checkpoint: it lacks {', '.join(missing)}",
            hint="give the folder of an official checkpoint with all its files",
        )
    if len(tokenizers) > 1:
        raise ExportError(f"{folder} has two tokenizers, {TOKENIZER} and {TIKTOKEN}", hint="keep the one of this model")
    return LanguageModelFiles(read_json(folder / CONFIG), weights[0], tokenizers[0])


def find_codec(folder: Path) -> CodecFiles:
    """By the names under which codecs are published. Raises ExportError if the folder has none, or more than one."""
    _require_folder(folder)
    found = [path for path in (folder / CODEC, *sorted(folder.glob(FIREFLY))) if path.is_file()]
    if not found:
        raise ExportError(
            f"{folder} is not a complete checkpoint: it lacks a codec ({CODEC} or {FIREFLY})",
            hint="put the codec beside the model's weights",
        )
    if len(found) > 1:
        raise ExportError(
            f"{folder} has more than one codec: {', '.join(path.name for path in found)}", hint="keep the one of this model"
        )
    config = folder / CODEC_CONFIG
    return CodecFiles(found[0], read_json(config) if config.is_file() else None)


def read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file. Raises ExportError."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ExportError(f"{path} cannot be read: {error}", hint=DAMAGED) from None
    if not isinstance(data, dict):
        raise ExportError(f"{path} holds no JSON object", hint=DAMAGED)
    return data


def read_weights(path: Path) -> Mapping[str, Tensor]:
    """Every tensor of the language model, by its name on disk; those of safetensors files are read when they are looked up.

    Raises ExportError for a damaged, missing or foreign file.
    """
    if path.name == PICKLE:
        return read_model_pickle(path)
    return Lazy(_find_in_shards(path) if path.name == INDEX else _find_tensors(path))


def read_pickle(path: Path) -> Mapping[str, Any]:
    """The mapping in a torch file, whose wrapper key `state_dict` is taken off. Loads weights only, never code."""
    try:
        # Memory-mapped where the format allows it, so that tensors nobody asks for are not read.
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch.load raises whatever its unpickler meets in a damaged file
        raise ExportError(f"{path} cannot be read: {_first_line(error)}", hint=DAMAGED) from None
    if isinstance(data, Mapping) and isinstance(data.get("state_dict"), Mapping):
        data = data["state_dict"]
    if not isinstance(data, Mapping) or not data:
        raise ExportError(f"{path} holds {type(data).__name__}, not named tensors", hint="is this the right file?")
    for name in data:
        if not isinstance(name, str):
            raise ExportError(f"{path} holds an entry named {name!r}, which is not text", hint="is this the right file?")
    return data


def read_model_pickle(path: Path) -> dict[str, Tensor]:
    """As upstream reads a language model or its LoRA: without the `model.` of training frameworks, and without the unreleased
    audio input, both by name. Raises ExportError.
    """
    data = read_pickle(path)
    if next(iter(data)).startswith("model."):
        data = {name.replace("model.", ""): value for name, value in data.items()}
    return only_tensors({name: value for name, value in data.items() if "audio_" not in name}, path.name)


def only_tensors(data: Mapping[str, Any], source: str) -> dict[str, Tensor]:
    """Raises ExportError that lists the entries which are not tensors, or sparse ones."""
    if others := [str(name) for name, value in data.items() if not isinstance(value, Tensor) or value.layout != torch.strided]:
        raise ExportError(f"{source} holds entries that are not tensors: {', '.join(others)}", hint="is this the right file?")
    return dict(data)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Says of an OSError that `path` cannot be read. Raises ExportError."""
    try:
        yield
    except OSError as error:
        raise ExportError(f"{path} cannot be read: {error}", hint="does it still exist, and may you read it?") from None


def _require_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise ExportError(f"{folder} is not a folder", hint="give the folder of an official checkpoint")


def _find_in_shards(index: Path) -> dict[str, Maker]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise ExportError(f"{index} has no usable weight_map", hint=DAMAGED)
    shards = sorted(set(places.values()))
    if outside := [name for name in shards if PurePath(name).name != name]:
        raise ExportError(f"{index} names shards outside its folder: {', '.join(outside)}")
    if missing := [name for name in shards if not (index.parent / name).is_file()]:
        raise ExportError(f"{index.parent} lacks shards that {INDEX} names: {', '.join(missing)}", hint="download them too")
    tensors: dict[str, Maker] = {}
    for shard in shards:
        found = _find_tensors(index.parent / shard)
        if lacking := sorted(name for name, place in places.items() if place == shard and name not in found):
            raise ExportError(f"{shard} lacks tensors that {INDEX} places in it: {', '.join(lacking)}", hint=DAMAGED)
        if twice := sorted(found.keys() & tensors.keys()):
            raise ExportError(f"{shard} repeats tensors of another shard: {', '.join(twice)}", hint=DAMAGED)
        tensors |= found
    return tensors


def _find_tensors(path: Path) -> dict[str, Maker]:
    """How each tensor of a safetensors file is read. Opening it checks its table against its size."""
    with _opened(path) as file:
        return {name: _reading(path, name) for name in file.keys()}  # noqa: SIM118 (not a dict: it has no iterator)


def _reading(path: Path, name: str) -> Maker:
    # Opened anew for each tensor: the pages that were read count as this process's memory until the file is closed.
    def read() -> Tensor:
        with _opened(path) as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    return read


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ExportError(f"{path} cannot be read: {_first_line(error)}", hint=DAMAGED) from None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
