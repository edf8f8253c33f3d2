"""Storage of a bundle's weights: one precision, and exceptions by name.

    fp32        the checkpoint's own types
    fp16        matrices, kernels and tables rounded to float16, except those with numbers beyond its range
    int8        linear layers of the model in 8 bits, its embeddings in float16 or bfloat16, the codec as with fp32
    int8-rows   as int8, in integers that a CPU multiplies by activations rounded by rows
    int4        as int8, except the blocks of the slow AR or the denoiser, which have 4 bits
    none        as fp32, and the checkpoint's integers and codes where it is quantised

Norms, biases and rotary tables are small and stay as they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from ..checkpoint.quantised.integers import Packed
from ..checkpoint.quantised.levels import Levels
from ..errors import ExportError
from .kept.blocks import blocks_of, packed, stored_bits
from .kept.tables import table_parts
from .quantise import BITS, BLOCKS, block_size

_TABLES = "embedding tables, of which only single rows are read"
_LARGE = ("slow_ar", "denoise")
"""Roles whose blocks are most of the work of speaking."""


@dataclass(frozen=True, slots=True)
class Storage:
    """Storage of one weight."""

    precision: str
    """One of manifest.PRECISIONS or of quantisation.LEVELS."""
    block: int | None = None
    """Inputs of a stored scale; None for floats."""
    kept: bool = False
    """Whether the integers or codes are the checkpoint's own; see kept/."""
    reason: str = field(default="", compare=False)
    """Why the recipe's integers are not used."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """The options of an export for precision."""

    precision: str | None = "fp32"
    """None: as the checkpoint, the integers of quantised layers too."""
    keep: Mapping[str, str] = field(default_factory=dict)
    """Precisions by patterns for the model's matrices, such as `slow_ar.layers.0.*` or `denoise.out_proj`. The last
    pattern that matches counts. Embeddings take fp32 and fp16 only."""

    def plan(
        self, modules: Mapping[str, nn.Module], weights: Mapping[str, Mapping[str, Tensor]]
    ) -> dict[str, dict[str, Storage]]:
        """Return the storage of each matrix of the model, by role and name.

        A layer whose inputs no block divides is not quantised. Raises one ExportError that lists all patterns without a match.
        """
        plans: dict[str, dict[str, Storage]] = {}
        matched = set()
        for role, module in modules.items():
            plan = plans[role] = {}
            for path, part in module.named_modules():
                if not isinstance(part, nn.Linear | nn.Embedding):
                    continue
                linear, name = isinstance(part, nn.Linear), f"{path}.weight"
                precision, reason = self._usual(role, path), ""
                if precision in BITS and not linear:
                    reason = _TABLES
                    precision = "fp16" if weights[role][name].dtype == torch.float32 else "fp32"
                layer = f"{role}.{path}"
                asked = [(pattern, kept) for pattern, kept in self.keep.items() if _applies(pattern, kept, layer, linear)]
                for pattern, kept in asked:
                    matched.add(pattern)
                    precision, reason = kept, "" if kept in BITS else "by --keep"
                if not asked and self.precision is None and (found := packed(weights[role], name)) is not None:
                    tied = path == "embeddings" and getattr(module, "output", None) is None
                    if not tied and (stored := kept_storage(found, table=not linear)):
                        plan[name] = stored
                        continue
                    reason = "which is also the head" if tied else "whose integers fit no blocks"
                block = block_size(part.in_features) if isinstance(part, nn.Linear) and precision in BITS else None
                if precision in BITS and block is None:
                    precision, reason = "fp32", f"whose width is no multiple of {BLOCKS[-1]}"
                plan[name] = Storage(precision, block, reason=reason)
        if lost := [pattern for pattern in self.keep if pattern not in matched]:
            raise ExportError(
                f"no layer that can be stored so matches: {', '.join(f'{name}={self.keep[name]}' for name in lost)}",
                hint=f"the model has {', '.join(modules)}, with names such as {_some(modules)}; embeddings take fp32 or fp16",
            )
        return plans

    def codec_plan(self, weights: Mapping[str, Tensor]) -> dict[str, Storage]:
        """Return the storage of a codec's weights: fp16 applies to kernels and matrices, but not to vectors of any shape."""
        if self.precision != "fp16":
            return {}
        return {name: Storage("fp16") for name, tensor in weights.items() if sum(size > 1 for size in tensor.shape) > 1}

    def _usual(self, role: str, path: str) -> str:
        if self.precision not in BITS:
            return self.precision or "fp32"
        small = self.precision == "int4" and not (role in _LARGE and path.startswith("layers."))
        return "int8" if small else self.precision


def _applies(pattern: str, precision: str, layer: str, linear: bool) -> bool:
    """Return whether an option of --keep is for a layer. linear: it is no table, which fishrt rounds to no integers."""
    return fnmatchcase(layer, pattern.removesuffix(".weight")) and (linear or precision not in BITS)


def kept_storage(found: Packed, *, table: bool) -> Storage | None:
    """Return the storage of a checkpoint's own integers or codes; None if they cannot be stored so. table: of embeddings."""
    integers = found.read()
    if isinstance(integers, Levels):
        return None if table or integers.kind is None else Storage(integers.kind, integers.block, kept=True)
    if table:
        group = integers.values.shape[1] // integers.scales.shape[1]
        return None if table_parts(integers) is None else Storage("int8", group, kept=True)
    blocks = blocks_of(integers)
    return None if blocks is None else Storage(f"int{stored_bits(integers)}", blocks.block, kept=True)


def _some(modules: Mapping[str, nn.Module]) -> str:
    """Return the names of some linear layers: of the first role's first ones."""
    role, module = next(iter(modules.items()))
    return ", ".join([f"{role}.{path}" for path, part in module.named_modules() if isinstance(part, nn.Linear)][:2])


def main_precision(plan: Mapping[str, Storage], sizes: Mapping[str, int]) -> str:
    """Return the precision of most of a graph's weights. sizes: the number of elements by name."""
    counts = Counter[str]()
    for name, storage in plan.items():
        counts[storage.precision] += sizes[name]
    return counts.most_common(1)[0][0] if counts else "fp32"
