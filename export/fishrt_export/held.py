"""The weights that a written graph computes with, as the torch module is given them to be compared with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from .errors import ExportError
from .quantise import dequantise, relative_error, unpack
from .recipe import Storage
from .store import SCALES, stored_float

WORST = 0.5
"""A relative error of quantisation above this is no rounding: those are of other weights."""


class Held(Mapping[str, Tensor]):
    """Float32 weights in the module's layout, made when they are looked up.

    Integers are read from the file and compared with the checkpoint's weights. All others are the checkpoint's, rounded as they
    are stored, so that a fault in writing them shows.
    """

    def __init__(self, path: Path, weights: Mapping[str, Tensor], plan: Mapping[str, Storage]) -> None:
        self._path, self._weights, self._plan = path, weights, plan
        self._initializers = ir.load(path).graph.initializers
        self.errors: dict[str, float] = {}
        """Root mean square of what quantising changed, divided by that of the weight; of those that were looked up."""

    def __getitem__(self, name: str) -> Tensor:
        """Raises ExportError where the file holds something else than the checkpoint's weights."""
        source = self._weights[name]
        if name not in self._initializers:  # of a module of which the graph is a part
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
        """An initialiser, of integers or float32. Not mapped: its pages would count as memory as long as the graph is known."""
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
