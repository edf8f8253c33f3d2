"""The tensors in the files of a checkpoint, under the names that the originals gave them.

Only containers are interpreted here: safetensors shards and their index, GGUF files, and pickles. Wrappers are removed: an outer
`state_dict`, and the prefixes that training frameworks put before all names.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import ExportError, listed
from .content import DAMAGED, is_gguf, is_safetensors
from .forms.embedded import codec_tensors, language_model_tensors
from .forms.table import find_shards
from .names import INDEX, read_places
from .quantised.blocks import maker
from .weights import LANGUAGE_MODEL_PARTS, Lazy, Maker, makers

_COMPILED = "_orig_mod."
_SAFETENSORS = ".safetensors"
_MAPPED = 256 << 20
"""Bytes that are read of a mapped pickle before it is opened again."""
_OTHER_FILE = "take the publisher's file instead"


def read_weights(path: Path) -> Mapping[str, Tensor]:
    """Return every tensor of a language model or its LoRA by its name in the original; safetensors are read when looked up.

    path: a file, or the index of shards. As upstream does, `model.` is removed if the first name of a pickle has it. Raises
    ExportError for a damaged, missing or foreign file.
    """
    if is_gguf(path):
        return Lazy({name: maker(path, tensor) for name, tensor in language_model_tensors(path).items()})
    tensors = unwrap(Lazy(_find_in_shards(path)) if path.name == INDEX else read_tensors(path), LANGUAGE_MODEL_PARTS, path)
    if isinstance(tensors, Lazy):
        return tensors
    if next(iter(tensors)).startswith("model."):
        tensors = _renamed(tensors, {name: name.removeprefix("model.") for name in tensors}, path)
    tensors = only_tensors(tensors, path.name)
    if not zipfile.is_zipfile(path):
        return tensors
    mapped = _Mapped(path, tensors)
    return Lazy({name: partial(mapped.tensor, name) for name in tensors})


def read_tensors(path: Path) -> Mapping[str, Any]:
    """Return the entries of a file of weights by name, those of its key `state_dict` if it has one; of a GGUF file the codec's.

    A file is recognised by its content. Tensors of safetensors and GGUF are a `Lazy`, which reads them at lookup. A pickle is
    loaded without running code. Raises ExportError.
    """
    if is_gguf(path):
        return Lazy({name: maker(path, tensor) for name, tensor in codec_tensors(path).items()})
    if is_safetensors(path) or path.suffix == _SAFETENSORS:
        return Lazy(_find_tensors(path))
    try:
        with warnings.catch_warnings(action="ignore"):  # of other formats, which are errors here
            # Memory-mapped if the format allows it, so that unused tensors are not read.
            data = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged file can make torch.load raise any exception
        raise _unreadable_pickle(path, str(error)) from None
    if isinstance(data, Mapping) and isinstance(data.get("state_dict"), Mapping):
        data = data["state_dict"]
    if not isinstance(data, Mapping) or not data:
        raise ExportError(f"{path} holds {type(data).__name__}, not named tensors", hint=_OTHER_FILE)
    for name in data:
        if not isinstance(name, str):
            raise ExportError(f"{path} holds an entry named {name!r}, which is not text", hint=_OTHER_FILE)
    return data


class _Mapped:
    """The tensors of a mapped pickle, which is opened again now and then: the pages that were read count as this process's memory
    until the map is closed."""

    def __init__(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        """tensors: those of the file, in its order, under any names."""
        self._path, self._tensors, self._read = path, tensors, 0

    def tensor(self, name: str) -> Tensor:
        """Return a tensor."""
        if self._read > _MAPPED:
            again = read_tensors(self._path).values()
            self._tensors, self._read = dict(zip(self._tensors, again, strict=True)), 0
        found = self._tensors[name]
        self._read += found.nbytes
        return _narrow(found)


def _unreadable_pickle(path: Path, reason: str) -> ExportError:
    """Return the error for a pickle that torch does not load. Torch's own message is dropped: it advises an unsafe load."""
    if match := re.search(r"\b(?:GLOBAL|class) (torchao\.\S+)", reason):
        return ExportError(
            f"{path} cannot be read: it holds tensors of torchao's own classes ({match[1]}), and loading them can run any code",
            hint="export the bfloat16 checkpoint that it was made from",
        )
    if match := re.search(r"\bGLOBAL (\S+)", reason):
        return ExportError(
            f"{path} cannot be read: it holds Python objects ({match[1]}), not only tensors, and loading them can run any code",
            hint="save the state_dict of the model instead, or take the publisher's file",
        )
    if "TorchScript" in reason:
        return ExportError(f"{path} cannot be read: it is a TorchScript program, not named tensors", hint=_OTHER_FILE)
    return ExportError(f"{path} cannot be read: it is damaged, or not a file of torch.save", hint=DAMAGED)


def unwrap(tensors: Mapping[str, Any], parts: Collection[str], path: Path) -> Mapping[str, Any]:
    """Return the tensors without the prefix that all names share before the name of a part of the model.

    `torch.compile`, data parallelism and training frameworks put `_orig_mod.`, `module.` or `model.` before names. `_orig_mod.`
    is also inside a name if a part was compiled. A prefix is removed only if one of `parts` follows it. Raises ExportError if
    two names become one.
    """
    names = {name: name.replace(_COMPILED, "") for name in tensors}
    split = [name.split(".") for name in names.values()]
    for depth, shared in enumerate(zip(*split, strict=False)):
        if not set(parts).isdisjoint(shared):
            names = {name: ".".join(short.split(".")[depth:]) for name, short in names.items()}
            break
        if len(set(shared)) > 1:
            break
    return _renamed(tensors, names, path)


def _renamed(tensors: Mapping[str, Any], names: Mapping[str, str], path: Path) -> Mapping[str, Any]:
    """Return the tensors under their new names, without reading any. Raises ExportError if two names become one."""
    if all(name == new for name, new in names.items()):
        return tensors
    if len(set(names.values())) < len(names):
        twice = sorted({new for new in names.values() if list(names.values()).count(new) > 1})
        raise ExportError(f"{path} holds several tensors for one name: {listed(twice)}", hint="keep one of them")
    if isinstance(tensors, Lazy):
        found = makers(tensors)
        return Lazy({new: found[name] for name, new in names.items()})
    return {new: tensors[name] for name, new in names.items()}


def only_tensors(data: Mapping[str, Any], source: str) -> dict[str, Tensor]:
    """Return the entries, float64 as float32. Raises ExportError that lists all that are not dense tensors."""
    if others := [str(name) for name, value in data.items() if not isinstance(value, Tensor) or value.layout != torch.strided]:
        raise ExportError(f"{source} holds entries that are not tensors: {listed(others)}", hint=_OTHER_FILE)
    if larger := [name for name, value in data.items() if value.nbytes > value.untyped_storage().nbytes()]:
        raise ExportError(f"{source} holds tensors that are larger than their data: {listed(larger)}", hint=DAMAGED)
    return {name: _narrow(value) for name, value in data.items()}


def _narrow(tensor: Tensor) -> Tensor:
    """Return a float64 tensor as float32, the type of all computation, and any other as it is."""
    return tensor.float() if tensor.dtype == torch.float64 else tensor


def _find_in_shards(index: Path) -> dict[str, Maker]:
    places = read_places(index)
    shards = [path.name for path in find_shards(index)]
    found = {shard: _find_tensors(index.parent / shard) for shard in shards}
    for shard, tensors in found.items():
        if absent := [name for name, place in places.items() if place == shard and name not in tensors]:
            raise ExportError(f"{shard} lacks tensors that {INDEX} places in it: {listed(absent)}", hint=DAMAGED)
    return {name: found[shard][name] for name, shard in places.items()}


def _find_tensors(path: Path) -> dict[str, Maker]:
    """Return a function for each tensor of a safetensors file that reads it. Opening the file checks its table and its size."""
    if not is_safetensors(path):
        raise ExportError(f"{path} cannot be read: it is damaged, or not a safetensors file", hint=DAMAGED)
    with _opened(path) as file:
        return {name: partial(_read, path, name) for name in file.keys()}  # noqa: SIM118 (not a dict: it has no iterator)


def _read(path: Path, name: str) -> Tensor:
    # The file is opened for each tensor: its pages count as this process's memory until it is closed.
    with _opened(path) as file:
        return _narrow(file.get_tensor(name))


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError):
        raise ExportError(f"{path} cannot be read: it is damaged or incomplete", hint=DAMAGED) from None
