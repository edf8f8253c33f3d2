"""Alignment of weights in a graph that ONNX Runtime has optimised, packed for this machine, and saved.

ONNX Runtime 1.31 aligns only tensors of more than a megabyte, and reads packed ones at other offsets wrongly.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

from ..rewrite.onnx_proto import message

_ALIGNMENT = 4096
"""Bytes. Packed weights are read with aligned loads, and locate their parts relative to an aligned start."""
_BLOCK = 1 << 24


def align(graph: Path, data: Path, target: Path) -> None:
    """Copy a saved graph, whose weights are in `data`, to `target`, with all weights at aligned offsets in `target`.data."""
    model = message("Model").FromString(graph.read_bytes())
    weights = target.with_name(f"{target.name}.data")
    with data.open("rb") as source, weights.open("wb") as aligned:
        for tensor in model.graph.initializer:
            entries = {entry.key: entry for entry in tensor.external_data}
            if not entries:
                continue
            entries["location"].value = weights.name
            place = _copy(source, int(entries["offset"].value), int(entries["length"].value), aligned)
            entries["offset"].value = str(place)
            for key, entry in entries.items():
                if key.startswith("prepacked"):
                    _move_packed(entry, source, aligned)
    target.write_bytes(model.SerializeToString())


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
