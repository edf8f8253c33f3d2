"""The tensors of a file of weights by name, with type and shape, without reading any weight. Loads no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from pathlib import Path, PurePath
from typing import Any

from ...errors import ExportError, listed
from ..content import DAMAGED, is_gguf, is_safetensors, reading
from ..names import INDEX, read_places
from .gguf import read_gguf
from .pickles import read_pickle

_LARGEST_HEADER = 32 << 20
"""Bytes of a safetensors header. A model's has less than one million."""
_BITS = {"BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of a file."""

    dtype: str
    """In the spelling of safetensors, such as "BF16"; of a GGUF file also its own types, such as "Q8_0"."""
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Table:
    """The tensors of a file or of the shards of an index."""

    entries: Mapping[str, Entry]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """What the file states beside its tensors."""
    classes: frozenset[str] = frozenset()
    """The Python classes that a pickle names."""
    wrapper: Mapping[str, Any] = field(default_factory=dict)
    """The entries of a pickle around its `state_dict`."""
    is_gguf: bool = False


def read_table(path: Path) -> Table:
    """Return the tensors of a file or of an index of shards. Raises ExportError for a damaged or missing file."""
    if path.name == INDEX:
        tables = [_read_safetensors(shard) for shard in find_shards(path)]
        return Table({name: entry for table in tables for name, entry in table.entries.items()}, tables[0].metadata)
    if is_gguf(path):
        file = read_gguf(path)
        return Table({name: Entry(t.kind, t.shape) for name, t in file.tensors.items()}, file.values, is_gguf=True)
    if is_safetensors(path) or path.suffix == ".safetensors":
        return _read_safetensors(path)
    found = read_pickle(path)
    return Table({name: Entry(*entry) for name, entry in found.tensors.items()}, {}, found.classes, found.wrapper)


def find_shards(index: Path) -> list[Path]:
    """Return the shards that an index names. Raises ExportError for one that is missing or in another folder."""
    shards = sorted(set(read_places(index).values()))
    if outside := [name for name in shards if PurePath(name).name != name]:
        raise ExportError(f"{index} names shards outside its folder: {listed(outside)}")
    with reading(index.parent):
        missing = [name for name in shards if not (index.parent / name).is_file()]
    if missing:
        raise ExportError(f"{index.parent} lacks shards that {INDEX} names: {listed(missing)}", hint="download them too")
    return [index.parent / name for name in shards]


def read_header(path: Path) -> dict[str, Any]:
    """Return the header of a safetensors file: an object for each tensor, and `__metadata__`. Raises ExportError."""
    if not is_safetensors(path):
        raise ExportError(f"{path} cannot be read: it is damaged, or not a safetensors file", hint=DAMAGED)
    with reading(path), path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > min(_LARGEST_HEADER, file.seek(0, os.SEEK_END)):
            raise ExportError(f"{path} cannot be read: it is damaged: its header has {size:,} bytes", hint=DAMAGED)
        file.seek(8)
        header = file.read(size)
    try:
        found = json.loads(header)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not all(isinstance(value, dict) for name, value in found.items() if name != "__metadata__"):
        raise ExportError(f"{path} cannot be read: its header is damaged", hint=DAMAGED)
    return found


def _read_safetensors(path: Path) -> Table:
    header = read_header(path)
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
    metadata = header.pop("__metadata__", None) or {}
    entries, places = {}, []
    for name, value in header.items():
        dtype, shape, offsets = value.get("dtype"), value.get("shape"), value.get("data_offsets")
        if not isinstance(dtype, str) or not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
            raise ExportError(f"{path} cannot be read: its header is damaged at {name}", hint=DAMAGED)
        if offsets[1] - offsets[0] != -(-prod(shape) * _bits(dtype) // 8):
            raise ExportError(f"{path} cannot be read: {name} does not fit its place in the file", hint=DAMAGED)
        entries[name] = Entry(dtype, tuple(shape))
        places.append(offsets)
    places.sort()
    data = path.stat().st_size - 8 - size
    if any(first[1] > second[0] for first, second in pairwise(places)) or (places and places[-1][1] > data):
        raise ExportError(f"{path} cannot be read: its tensors overlap, or are larger than the file", hint=DAMAGED)
    return Table(entries, metadata)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _bits(dtype: str) -> int:
    digits = dtype.partition("_")[0].lstrip("ABCDEFIUGHLO")
    return _BITS.get(dtype) or (int(digits) if digits.isdecimal() else 8)


def count_types(entries: Iterable[Entry]) -> dict[str, int]:
    """Return the number of values of each type, the most frequent type first."""
    counts: dict[str, int] = {}
    for entry in entries:
        counts[entry.dtype] = counts.get(entry.dtype, 0) + prod(entry.shape)
    return dict(sorted(counts.items(), key=lambda pair: -pair[1]))
