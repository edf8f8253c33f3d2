"""The header of a GGUF file: what it states, and where each tensor lies. Every number is checked against the file's size.

Loads no torch, and needs no package: the one of the format's authors reads arrays byte by byte, and trusts all counts.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

from ...errors import ExportError
from ..content import DAMAGED, reading

KINDS: dict[int, tuple[str, int, int]] = {
    **{0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24)},
    **{8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176)},
    **{14: ("Q6_K", 256, 210), 24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8)},
    30: ("BF16", 1, 2),
}
"""Name, values and bytes of a block of each type of tensor that is read."""
_OTHER_KINDS = {
    **{9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S"},
    **{23: "IQ4_XS", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4"},
}
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_DIMENSIONS = 8


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor's place in the file."""

    kind: str
    """A name of KINDS, or another type's."""
    shape: tuple[int, ...]
    """In the order of torch: outputs first."""
    offset: int
    size: int
    """Bytes in the file; 0: of a type that is not read."""


@dataclass(frozen=True, slots=True)
class GgufArray:
    """The place of an array among the values, whose content is read when it is asked for."""

    path: Path
    kind: str
    """"s" for texts, else the format character of a number."""
    count: int
    offset: int
    size: int

    def numbers(self) -> tuple[Any, ...]:
        """Return the numbers."""
        return struct.unpack(f"<{self.count}{self.kind}", self.raw())

    def raw(self) -> bytes:
        """Return the bytes as they are in the file."""
        with reading(self.path), self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)

    def texts(self) -> list[bytes]:
        """Return the content of an array of texts."""
        raw, at, found = self.raw(), 0, []
        for _ in range(self.count):
            (length,) = struct.unpack_from("<Q", raw, at)
            found.append(raw[at + 8 : at + 8 + length])
            at += 8 + length
        return found


@dataclass(frozen=True, slots=True)
class Gguf:
    """The header of a file."""

    values: Mapping[str, Any]
    """Texts, numbers and arrays by key."""
    tensors: Mapping[str, GgufTensor]


def read_gguf(path: Path) -> Gguf:
    """Read the header. Raises ExportError for a damaged file and for a version that is not read."""
    with reading(path), path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            return _Reader(path, data).read()
        except (struct.error, ValueError, OverflowError) as error:
            reason = str(error) if isinstance(error, ValueError) and not isinstance(error, UnicodeError) else "it is cut off"
            raise ExportError(f"{path} is a damaged GGUF file: {reason}", hint=DAMAGED) from None


class _Reader:
    """Reads a file from its start to the end of its header."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path, self._data, self._at = path, data, 0

    def read(self) -> Gguf:
        """Return the header. Raises ValueError, UnicodeError or struct.error."""
        _magic, version, tensors, values = self._take("<4sIQQ")
        if version not in (2, 3):
            raise ValueError(f"version {version} is not read; 2 and 3 are")
        if max(tensors, values) > len(self._data) // 12:  # a name and a type take more
            raise ValueError(f"it claims {tensors:,} tensors and {values:,} values")
        found = {}
        for _ in range(values):
            name = self._text()
            found[name] = self._value(self._number("I"))
        infos: dict[str, tuple[int, tuple[int, ...], int]] = {}
        for _ in range(tensors):
            name = self._text()
            dimensions = self._number("I")
            if dimensions > _MOST_DIMENSIONS:
                raise ValueError(f"{name} claims {dimensions:,} dimensions")
            shape = self._take(f"<{dimensions}Q")[::-1]
            infos[name] = (self._number("I"), shape, self._number("Q"))
        alignment = found.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= 1 << 20:
            raise ValueError(f"its alignment is {alignment!r}")
        start = -(-self._at // alignment) * alignment
        placed = {name: self._tensor(name, *info, start) for name, info in infos.items()}
        known = sorted((t for t in placed.values() if t.size), key=lambda tensor: tensor.offset)
        if any(first.offset + first.size > second.offset for first, second in pairwise(known)):
            raise ValueError("its tensors overlap")
        return Gguf(found, placed)

    def _tensor(self, name: str, kind: int, shape: tuple[int, ...], offset: int, start: int) -> GgufTensor:
        if kind not in KINDS:
            return GgufTensor(_OTHER_KINDS.get(kind, f"type {kind}"), shape, start + offset, 0)
        label, values, size = KINDS[kind]
        if shape and shape[-1] % values:
            raise ValueError(f"{name} has rows of {shape[-1]:,} values, which blocks of {values} do not fill")
        count = prod(shape) // values * size
        if start + offset + count > len(self._data):
            raise ValueError(f"{name} lies beyond the end of the file")
        return GgufTensor(label, shape, start + offset, count)

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._text()
        if kind != _ARRAY:
            return self._number(_format(kind))
        inner, count = self._take("<IQ")
        begin = self._at
        if inner == _STRING:
            if count > len(self._data) // 8:
                raise ValueError(f"it claims {count:,} texts")
            for _ in range(count):
                self._skip(self._number("Q"))
        else:
            self._skip(count * struct.calcsize(_format(inner)))
        return GgufArray(self._path, "s" if inner == _STRING else _format(inner), count, begin, self._at - begin)

    def _text(self) -> str:
        begin = self._at + 8
        self._skip(self._number("Q"))
        return self._data[begin : self._at].decode()

    def _number(self, kind: str) -> Any:
        return self._take(f"<{kind}")[0]

    def _take(self, kind: str) -> tuple[Any, ...]:
        found = struct.unpack_from(kind, self._data, self._at)
        self._at += struct.calcsize(kind)
        return found

    def _skip(self, count: int) -> None:
        if count > len(self._data) - self._at:
            raise ValueError(f"a text or an array of it claims {count:,} bytes")
        self._at += count


def _format(kind: int) -> str:
    if kind not in _NUMBERS:
        raise ValueError(f"it has a value of the unknown type {kind}")
    return _NUMBERS[kind]
