"""The tensors of a file of torch.save by name, with type and shape. Nothing is built and no code is run.

A pickle is a program for a small machine. This one knows the instructions that torch.save writes, and makes plain dictionaries,
lists and tuples; whatever else the program would make is a `_Made`, which only names it.
"""

from __future__ import annotations

import pickletools
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from ...errors import ExportError
from ..content import DAMAGED, reading

_STORAGES = {
    **{"Float": "F32", "Half": "F16", "BFloat16": "BF16", "Double": "F64", "Char": "I8", "Byte": "U8"},
    **{"Int": "I32", "Short": "I16", "Long": "I64", "Bool": "BOOL"},
}
_DTYPES = {
    **{"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64", "int8": "I8", "uint8": "U8", "bool": "BOOL"},
    **{"int16": "I16", "int32": "I32", "int64": "I64", "uint16": "U16", "uint32": "U32", "uint64": "U64"},
    **{"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0"},
}
_MAGIC = 0x1950A86A20F9469CFC6C
"""The first of the pickles in a file of torch before 1.6."""
_LARGEST_PROGRAM = 64 << 20
"""Bytes of the program beside the tensors; a model's has less than one million."""


@dataclass(frozen=True, slots=True)
class Pickled:
    """What a file of torch.save holds."""

    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    """Type and shape of each entry that is a tensor, of those in `state_dict` if there is one."""
    classes: frozenset[str]
    """All that the program names, as module and name."""
    wrapper: Mapping[str, Any]
    """The entries around `state_dict`."""


@dataclass(slots=True)
class _Made:
    """Something that a program makes of a class or function."""

    name: str
    arguments: Any = ()


@dataclass(slots=True)
class _Machine:
    """The state of a program."""

    stack: list[Any] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)
    classes: set[str] = field(default_factory=set)

    def run(self, file: BinaryIO) -> Any:
        """Return what the program makes. Raises ValueError, IndexError, KeyError or TypeError for a program that is wrong."""
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name == "STOP":
                return self.stack.pop()
            self._step(opcode.name, argument)
        raise ValueError

    def _step(self, name: str, argument: Any) -> None:
        stack, memo = self.stack, self.memo
        match name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                stack.append(_MARK)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
            case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE" | "EMPTY_SET":
                stack.append({"EMPTY_DICT": {}, "EMPTY_LIST": [], "EMPTY_TUPLE": (), "EMPTY_SET": []}[name])
            case "TUPLE" | "LIST" | "DICT" | "FROZENSET":
                items = self._marked()
                stack.append(dict(_pairs(items)) if name == "DICT" else items if name == "LIST" else tuple(items))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "APPEND" | "APPENDS" | "ADDITEMS":
                items = [stack.pop()] if name == "APPEND" else self._marked()
                if isinstance(stack[-1], list):
                    stack[-1].extend(items)
            case "SETITEM" | "SETITEMS":
                items = [*reversed([stack.pop(), stack.pop()])] if name == "SETITEM" else self._marked()
                if isinstance(stack[-1], dict):
                    stack[-1].update(_pairs(items))
            case "BINPUT" | "LONG_BINPUT" | "PUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET" | "GET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(self._named(argument))
            case "STACK_GLOBAL":
                stack[-2:] = [self._named(f"{stack[-2]} {stack[-1]}")]
            case "BINPERSID":
                stack[-1] = _Made("storage", stack[-1])
            case "REDUCE" | "NEWOBJ":
                stack[-2:] = [_reduced(stack[-2], stack[-1])]
            case "BUILD":
                stack.pop()
            case "POP":
                stack.pop()
            case _ if argument is not None:
                stack.append(argument)
            case _:
                raise ValueError

    def _marked(self) -> list[Any]:
        """Take the items behind the last mark off the stack."""
        at = max(i for i, item in enumerate(self.stack) if item is _MARK) if self.stack else -1
        items = self.stack[at + 1 :]
        del self.stack[at:]
        return items

    def _named(self, name: str) -> _Made:
        self.classes.add(name.replace(" ", "."))
        return _Made(name.replace(" ", "."))


_MARK = object()


def read_pickle(path: Path) -> Pickled:
    """Return what a file of torch.save holds. Raises ExportError for one that is damaged or of another program."""
    machine = _Machine()
    try:
        with reading(path), path.open("rb") as file:
            data: Any = None
            for program in _programs(path, file):
                machine.stack, machine.memo = [], {}
                data = machine.run(program)
    except (ValueError, IndexError, KeyError, TypeError, zipfile.BadZipFile, NotImplementedError, EOFError, MemoryError):
        raise ExportError(f"{path} cannot be read: it is damaged, or not a file of torch.save", hint=DAMAGED) from None
    wrapper: Mapping[str, Any] = {}
    if isinstance(data, dict) and isinstance(data.get("state_dict"), dict):
        wrapper, data = {name: value for name, value in data.items() if name != "state_dict"}, data["state_dict"]
    entries = data if isinstance(data, dict) else {}
    tensors = {name: found for name, value in entries.items() if isinstance(name, str) and (found := _tensor(value))}
    return Pickled(tensors, frozenset(machine.classes), wrapper)


def _programs(path: Path, file: BinaryIO) -> Iterator[BinaryIO]:
    """Yield the program; of a file of an old torch, those before it too. Raises ValueError for a file of none."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            (info,) = [info for info in archive.infolist() if info.filename.rpartition("/")[2] == "data.pkl"]
            if info.file_size > min(_LARGEST_PROGRAM, path.stat().st_size):
                raise ValueError
            yield BytesIO(archive.read(info))
        return
    first = _Machine().run(file)
    if first != _MAGIC:
        file.seek(0)
        yield file
        return
    for _ in range(3):  # the protocol, the system, and the tensors
        yield file


def _pairs(items: list[Any]) -> Iterator[tuple[Any, Any]]:
    """Yield the pairs whose key is text or a number."""
    for key, value in zip(items[::2], items[1::2], strict=True):
        if isinstance(key, str | int):
            yield key, value


def _reduced(made: Any, arguments: Any) -> Any:
    """Return what a function makes of its arguments: a dictionary, a parameter's tensor, or something that is only named."""
    name = made.name if isinstance(made, _Made) else ""
    if name == "collections.OrderedDict":
        return {}
    if name.startswith("torch._utils._rebuild_parameter"):
        return arguments[0]
    return _Made(name, arguments)


def _tensor(value: Any) -> tuple[str, tuple[int, ...]] | None:
    """Return type and shape of a tensor, or None for anything else."""
    if not isinstance(value, _Made) or not value.name.startswith("torch._utils._rebuild_tensor"):
        return None
    match value.arguments:
        case (_Made("storage", ("storage", _Made() as storage, *_)), int(), tuple() as shape, *rest) if _is_shape(shape):
            dtype = next((item.name for item in rest if isinstance(item, _Made) and item.name in _TORCH_DTYPES), None)
            if dtype is not None:
                return _TORCH_DTYPES[dtype], shape
            kind = storage.name.removeprefix("torch.").removesuffix("Storage")
            return _STORAGES.get(kind, kind), shape
    return None


_TORCH_DTYPES = {f"torch.{name}": dtype for name, dtype in _DTYPES.items()}


def _is_shape(shape: tuple[Any, ...]) -> bool:
    return all(type(size) is int and size >= 0 for size in shape)
