"""Merging of a LoRA into a language model, from the files that upstream's training writes in every generation.

A file holds two small matrices for each trained module, `<module>.lora_A` and `<module>.lora_B`. The rank r is their inner size;
the factor alpha is in no file.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from torch import Tensor

from ..errors import ExportError
from ..options import Lora
from .files import read_weights
from .weights import Lazy, find_problems, makers, raise_if_any

_A, _B = ".lora_A", ".lora_B"
_EMBEDDINGS = ("embeddings", "codebook_embeddings", "fast_embeddings")
"""Modules whose LoRA matrices are those of the transposed table."""
_HINT = "give a LoRA that was trained on this very model, and its rank"


def merge(weights: Mapping[str, Tensor], lora: Lora) -> Mapping[str, Tensor]:
    """Return the weights by flat names with the LoRA merged. Those of the trained modules are float32, so that no change is lost.

    Raises one ExportError that lists everything in which the LoRA does not fit the model.
    """
    tensors = read_weights(lora.path)
    modules = list(dict.fromkeys(name.removesuffix(end) for name in tensors for end in (_A, _B) if name.endswith(end)))
    if not modules:
        raise ExportError(f"{lora.path} holds no LoRA: none of its {len(tensors)} tensors is a lora_A or lora_B", hint=_HINT)
    rank = lora.rank or max((t.shape[0] for name, t in tensors.items() if name.endswith(_A) and t.ndim), default=0)
    expected: dict[str, tuple[int, ...]] = {}
    problems = [] if rank else ["wrong rank: found 0"]
    for module in modules:
        weight = weights.get(f"{module}.weight")
        if weight is None or weight.ndim != 2:
            tied = ": its head is its token embedding" if module == "output" else ""
            problems.append(f"unknown module: the model has no matrix {module}.weight{tied}")
            continue
        rows, columns = reversed(weight.shape) if module in _EMBEDDINGS else weight.shape
        expected |= {module + _A: (rank, columns), module + _B: (rows, rank)}
    known = {name: tensor for name, tensor in tensors.items() if name in expected or not name.endswith((_A, _B))}
    raise_if_any([*problems, *find_problems(expected, known)], f"{lora.path} does not fit the model at rank {rank}", _HINT)
    changed = {f"{module}.weight": partial(_merged, weights, tensors, module, lora.alpha / rank) for module in modules}
    return Lazy(makers(weights) | changed)


def _merged(weights: Mapping[str, Tensor], pairs: Mapping[str, Tensor], module: str, factor: float) -> Tensor:
    change = pairs[module + _B].float() @ pairs[module + _A].float() * factor
    return weights[f"{module}.weight"].float() + (change.T if module in _EMBEDDINGS else change)
