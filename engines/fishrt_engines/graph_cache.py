"""Graphs as ONNX Runtime has optimised and packed them for this machine, kept on disk.

Packing the weights of a large graph takes seconds and holds them in memory twice. A kept graph is mapped into memory as it is, in
a fraction of a second, and shared between processes. It fits one machine and one version only, so all of that is in its key:

    folders.cache_folder() / key / graph.onnx, graph.onnx.data, entry.json

An entry is written aside and renamed when complete. One that is damaged is made again. Nothing here is needed: without a folder
to write to, graphs are optimised at every start.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from .folders import written_aside
from .onnx_proto import message
from .specialise import ColumnInputs

log = logging.getLogger(__name__)

GRAPH, DATA, ENTRY = "graph.onnx", "graph.onnx.data", "entry.json"
_LAYOUT = 1
"""Number of this form of the cache; part of the key."""
_ALIGNMENT = 4096
"""Packed weights are read with wide loads, and find their parts relative to an aligned start: they must lie as in memory."""
_SAMPLE, _STRIDE = 4096, 1 << 20
"""Of the data, so many bytes in every so many are hashed at a start: enough to notice damage, and little to read."""
_BLOCK = 1 << 24


@dataclass(frozen=True, slots=True)
class CachedGraph:
    """A complete entry."""

    path: Path
    columns: ColumnInputs | None
    """As `specialise` gave them."""


def cache_key(identity: str, *parts: str) -> str:
    """Name of an entry: hex of a hash over what the graph is and all that its optimised form depends on."""
    return hashlib.sha256(json.dumps([_LAYOUT, identity, *parts]).encode()).hexdigest()[:32]


def find(folder: Path) -> CachedGraph | None:
    """Return the entry that is this folder; None if there is none. A damaged one is removed, with a warning."""
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
    log.warning("the kept graph %s %s; it is made again", folder, why)
    shutil.rmtree(folder, ignore_errors=True)


def keep(folder: Path, columns: ColumnInputs | None, save: Callable[[Path, str], None]) -> CachedGraph | None:
    """Make the entry that is this folder; None, with a warning, without the right to write or room on the disk.

    save: writes an optimised graph to a path, with its weights in a file of the given name beside it.
    """
    try:
        with written_aside(folder) as aside:
            save(aside / "saved.onnx", "saved.data")
            _align(aside / "saved.onnx", aside / "saved.data", aside)
            for name in ("saved.onnx", "saved.data"):
                (aside / name).unlink()
            entry = {"graph": digest(aside / GRAPH), "data": digest(aside / DATA), "columns": columns and asdict(columns)}
            (aside / ENTRY).write_text(json.dumps(entry), encoding="utf-8")
            with suppress(OSError):  # another process was faster: its entry is as good
                aside.rename(folder)
    except OSError as error:
        why = error.strerror or error  # the same for all graphs of a bundle, so that it is told once
        log.warning("optimised graphs cannot be kept in %s, and are made again at every start: %s", folder.parent, why)
    return find(folder)


def _align(graph: Path, data: Path, folder: Path) -> None:
    """Copies a graph that ONNX Runtime saved, with everything at an aligned place.

    ONNX Runtime 1.31 aligns tensors of more than a megabyte only, and reads packed ones from other places wrongly.
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
    """Moves the buffers of one packed weight: "kernel+hash|offset;length;checksum|…"."""
    name, *buffers = entry.value.split("|")
    moved = []
    for buffer in buffers:
        offset, length, checksum = buffer.split(";")
        moved.append(f"{_copy(source, int(offset), int(length), target)};{length};{checksum}")
    entry.value = "|".join([name, *moved])


def _copy(source: BinaryIO, offset: int, length: int, target: BinaryIO) -> int:
    """Appends bytes at the next aligned place, which it returns."""
    start = -(-target.tell() // _ALIGNMENT) * _ALIGNMENT
    target.write(bytes(start - target.tell()))
    source.seek(offset)
    while length > 0:
        block = source.read(min(length, _BLOCK))
        if not block:
            raise OSError("the saved graph is shorter than it says")
        target.write(block)
        length -= len(block)
    return start


def digest(path: Path) -> list[int | str]:
    """Size of a file and a hash of samples of it."""
    size = path.stat().st_size
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        for start in range(0, size, _STRIDE):
            file.seek(start)
            digest.update(file.read(_SAMPLE))
        file.seek(max(size - _SAMPLE, 0))
        digest.update(file.read(_SAMPLE))
    return [size, digest.hexdigest()]
