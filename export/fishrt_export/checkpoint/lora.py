"""Merging of a LoRA into a language model, from the files that upstream's training writes in every generation.

A file holds two small matrices for each trained module, `<module>.lora_A` and `<module>.lora_B`. The rank r is their inner size;
the factor alpha is in no file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..errors import ExportError
from .files import read_model
from .lazy import Lazy, Maker, makers
from .weights import FLOATS, is_finite, listing

_EMBEDDINGS = ("embeddings", "codebook_embeddings", "fast_embeddings")
"""Modules whose LoRA matrices are those of the transposed table."""


@dataclass(frozen=True, slots=True)
class Lora:
    """A LoRA and the numbers of its training."""

    path: Path
    """The file that the training wrote. Its tensor names may have a prefix, such as `model.`."""
    alpha: float
    """The lora_alpha of the training: the product of both matrices is multiplied by alpha / r."""
    rank: int | None = None
    """The expected r. None: the r of the file."""

    def __post_init__(self) -> None:
        """Check the numbers and the file before anything large is read. Raises ExportError."""
        if not math.isfinite(self.alpha) or self.alpha <= 0:
            raise ExportError(f"the LoRA's alpha is {self.alpha}", hint="give the lora_alpha of its training, such as 16")
        if self.rank is not None and self.rank < 1:
            raise ExportError(f"the LoRA's rank is {self.rank}", hint="it must be at least 1")
        if not self.path.is_file():
            raise ExportError(f"{self.path} is not a file", hint="give the file that the training wrote")


def merge(weights: Mapping[str, Tensor], lora: Lora) -> Mapping[str, Tensor]:
    """Return the weights by flat names with the LoRA merged. Those of the trained modules are float32, so that no change is lost.

    Raises one ExportError that lists everything in which the LoRA does not fit the model.
    """
    tensors = read_model(lora.path)
    pairs: dict[str, dict[str, Tensor]] = {}
    problems = []
    for name, tensor in tensors.items():
        if match := re.fullmatch(r"(.+)\.lora_([AB])", name):
            pairs.setdefault(match[1], {})[match[2]] = tensor
        else:
            problems.append(f"unexpected: {name}")
    if not pairs:
        raise ExportError(f"{lora.path} holds no LoRA: none of its {len(tensors)} tensors is a lora_A or lora_B", hint=_HINT)
    for module, pair in pairs.items():
        problems += _problems(module, pair, weights)
    ranks = {tensor.shape[half == "B"] for pair in pairs.values() for half, tensor in pair.items() if tensor.ndim == 2}
    if len(ranks) != 1 or 0 in ranks or lora.rank not in (None, *ranks):
        asked = "one" if lora.rank is None else lora.rank
        problems.append(f"wrong rank: found {', '.join(map(str, sorted(ranks)))}, expected {asked}")
    if problems:
        raise ExportError(f"{lora.path} does not fit the model ({len(problems)} problems):\n{listing(problems)}", hint=_HINT)
    merged, (rank,) = makers(weights), ranks
    for module, pair in pairs.items():
        merged[f"{module}.weight"] = _merging(weights, module, pair, lora.alpha / rank)
    return Lazy(merged)


def _merging(weights: Mapping[str, Tensor], module: str, pair: Mapping[str, Tensor], factor: float) -> Maker:
    def merged() -> Tensor:
        change = pair["B"].float() @ pair["A"].float() * factor
        return weights[f"{module}.weight"].float() + (change.T if module in _EMBEDDINGS else change)

    return merged


_HINT = "give a LoRA that was trained on this very model, and its rank"


def _problems(module: str, pair: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Iterator[str]:
    weight = weights.get(f"{module}.weight")
    if weight is None or weight.ndim != 2:
        tied = ": its head is its token embedding" if module == "output" else ""
        yield f"unknown module: the model has no matrix {module}.weight{tied}"
        return
    rows, columns = reversed(weight.shape) if module in _EMBEDDINGS else weight.shape
    expected = {"A": ("r", columns), "B": (rows, "r")}
    for half, shape in expected.items():
        tensor, name = pair.get(half), f"{module}.lora_{half}"
        if tensor is None:
            yield f"missing: {name} [{shape[0]}, {shape[1]}]"
        elif tensor.ndim != 2 or tensor.shape[half == "A"] != shape[half == "A"]:
            yield f"wrong shape: {name} is {list(tensor.shape)}, expected [{shape[0]}, {shape[1]}]"
        elif tensor.dtype not in FLOATS or not is_finite(tensor):
            yield f"not finite numbers: {name}"
