"""The weights of a written graph, for the torch module that it is compared with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from ..errors import ExportError
from .quantise import dequantise, relative_error, unpack
from .recipe import Storage
from .store import SCALES, stored_float

WORST = 0.5
"""Largest relative error of rounding. A larger one means that the integers are of another weight."""


class Held(Mapping[str, Tensor]):
    """Float32 weights in the module's layout, made when they are looked up.

    Integers are read from the file and compared with the checkpoint's weights. All others are the checkpoint's, rounded to the
    stored type, so that verification finds a fault in the file.
    """

    def __init__(self, path: Path, weights: Mapping[str, Tensor], plan: Mapping[str, Storage]) -> None:
        self._path, self._weights, self._plan = path, weights, plan
        self._initializers = ir.load(path).graph.initializers
        self.errors: dict[str, float] = {}
        """Relative error of each quantised weight that was looked up; see quantise.relative_error."""

    def __getitem__(self, name: str) -> Tensor:
        """Return a weight. Raises ExportError if the file's integers are not those of the checkpoint's weight."""
        source = self._weights[name]
        if name not in self._initializers:  # the graph is only a part of the module
            return source.float()
        storage = self._plan.get(name, Storage("fp32"))
        if storage.block is None:
            return stored_float(source, storage.precision).float()
        value = dequantise(self._read(name), self._read(name + SCALES))
        error = self.errors[name] = relative_error(value, source)
        if not error <= WORST:  # also when the error is NaN
            raise ExportError(
                f"{self._path.name} does not hold {name}: its integers differ from the checkpoint by {error:.0%}",
                hint=f"keep it in more bits with --keep {name.removesuffix('.weight')}=fp32, and please report it",
            )
        return value

    def __contains__(self, name: object) -> bool:
        return name in self._weights

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def _read(self, name: str) -> Tensor:
        """Return an initialiser of integers or float32. It is not mapped: mapped pages count as this process's memory."""
        tensor = self._initializers[name].const_value
        assert tensor is not None
        shape = tuple(tensor.shape.numpy())
        if not isinstance(tensor, ir.ExternalTensor):
            array = tensor.numpy()
            return torch.from_numpy(array.astype(np.float32 if tensor.dtype == ir.DataType.FLOAT else np.int8))
        raw = np.fromfile(self._path.parent / tensor.location, np.uint8, tensor.length or 0, offset=tensor.offset or 0)
        stored = torch.from_numpy(raw)
        if tensor.dtype == ir.DataType.INT4:
            return unpack(stored, shape)
        return stored.view(torch.float32 if tensor.dtype == ir.DataType.FLOAT else torch.int8).view(shape)
