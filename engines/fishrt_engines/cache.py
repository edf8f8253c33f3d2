"""Disk cache of graphs that ONNX Runtime has optimised and packed for this machine.

Packing the weights of a large graph takes seconds and holds them in memory twice. A cached graph is memory-mapped in a fraction
of a second and shared between processes. It fits one CPU model and one version only, so its key contains both:

    folders.cache_folder() / key / graph.onnx, graph.onnx.data, entry.json

An entry is written to a temporary folder and renamed when complete. A damaged one is made again. Without a folder to write to,
graphs are optimised at every start.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from .aside import new_folder
from .engine import ColumnInputs
from .rewrite.onnx_proto import message

log = logging.getLogger(__name__)

GRAPH, DATA, ENTRY = "graph.onnx", "graph.onnx.data", "entry.json"
_LAYOUT = 1
"""Version of the cache's layout; part of the key."""
_ALIGNMENT = 4096
"""Bytes. Packed weights are read with aligned loads, and locate their parts relative to an aligned start."""
_SAMPLE, _STRIDE = 4096, 1 << 20
"""At a start, _SAMPLE bytes of every _STRIDE bytes of the data are hashed: enough to notice damage, and quick."""
_BLOCK = 1 << 24


@dataclass(frozen=True, slots=True)
class CachedGraph:
    """A complete entry of the cache."""

    path: Path
    columns: ColumnInputs | None
    """The result of `specialise`."""


def cache_key(identity: str, *parts: str) -> str:
    """Return the name of an entry: hex of a hash over the graph's identity and all that its optimised form depends on."""
    return hashlib.sha256(json.dumps([_LAYOUT, identity, *parts]).encode()).hexdigest()[:32]


def find(folder: Path) -> CachedGraph | None:
    """Return the entry in this folder; None if there is none. A damaged one is removed, with a warning."""
    if not folder.is_dir():
        return None
    try:
        entry = json.loads((folder / ENTRY).read_text(encoding="utf-8"))
        if entry["graph"] == digest(folder / GRAPH) and entry["data"] == digest(folder / DATA):
            columns = entry["columns"]
            return CachedGraph(folder / GRAPH, None if columns is None else ColumnInputs(**columns))
        found = "was altered"
    except (OSError, ValueError, KeyError, TypeError) as error:
        found = f"cannot be read ({error})"
    discard(folder, found)
    return None


def discard(folder: Path, why: str) -> None:
    """Remove an entry that cannot be used."""
    log.warning("the cached graph %s %s; it is made again", folder, why)
    shutil.rmtree(folder, ignore_errors=True)


def keep(folder: Path, columns: ColumnInputs | None, save: Callable[[Path, str], None]) -> CachedGraph | None:
    """Write the entry in this folder and return it; None, with a warning, if it cannot be written or the disk is full.

    save: writes an optimised graph to a path, and its weights to a file of the given name in the same folder.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with new_folder(folder) as aside:
            save(aside / "saved.onnx", "saved.data")
            _align(aside / "saved.onnx", aside / "saved.data", aside)
            for name in ("saved.onnx", "saved.data"):
                (aside / name).unlink()
            entry = {"graph": digest(aside / GRAPH), "data": digest(aside / DATA), "columns": columns and asdict(columns)}
            (aside / ENTRY).write_text(json.dumps(entry), encoding="utf-8")
    except OSError as error:
        if not folder.is_dir():  # else another process was faster; its entry is the same
            why = error.strerror or error  # without the path: the same text for all graphs of a bundle is shown once
            log.warning("optimised graphs cannot be written to %s, and are made again at every start: %s", folder.parent, why)
    return find(folder)


def _align(graph: Path, data: Path, folder: Path) -> None:
    """Copy a graph that ONNX Runtime saved, with all weights at aligned offsets.

    ONNX Runtime 1.31 aligns only tensors of more than a megabyte, and reads packed ones at other offsets wrongly.
    """
    model = message("Model").FromString(graph.read_bytes())
    with data.open("rb") as source, (folder / DATA).open("wb") as target:
        for tensor in model.graph.initializer:
            entries = {entry.key: entry for entry in tensor.external_data}
            if not entries:
                continue
            entries["location"].value = DATA
            place = _copy(source, int(entries["offset"].value), int(entries["length"].value), target)
            entries["offset"].value = str(place)
            for key, entry in entries.items():
                if key.startswith("prepacked"):
                    _move_packed(entry, source, target)
    (folder / GRAPH).write_bytes(model.SerializeToString())


def _move_packed(entry: Any, source: BinaryIO, target: BinaryIO) -> None:
    """Copy the buffers of one packed weight and update its entry: "kernel+hash|offset;length;checksum|…"."""
    name, *buffers = entry.value.split("|")
    moved = []
    for buffer in buffers:
        offset, length, checksum = buffer.split(";")
        moved.append(f"{_copy(source, int(offset), int(length), target)};{length};{checksum}")
    entry.value = "|".join([name, *moved])


def _copy(source: BinaryIO, offset: int, length: int, target: BinaryIO) -> int:
    """Append bytes at the next aligned offset, and return the offset."""
    start = -(-target.tell() // _ALIGNMENT) * _ALIGNMENT
    target.write(bytes(start - target.tell()))
    source.seek(offset)
    while length > 0:
        block = source.read(min(length, _BLOCK))
        if not block:
            raise OSError("the saved graph is shorter than its description")
        target.write(block)
        length -= len(block)
    return start


def digest(path: Path) -> list[int | str]:
    """Return the size of a file and a hash of samples of it."""
    size = path.stat().st_size
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        for start in range(0, size, _STRIDE):
            file.seek(start)
            digest.update(file.read(_SAMPLE))
        file.seek(max(size - _SAMPLE, 0))
        digest.update(file.read(_SAMPLE))
    return [size, digest.hexdigest()]
