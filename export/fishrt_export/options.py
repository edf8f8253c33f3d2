"""The options of an export. They are checked without torch, so that a mistake is found at once."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fishrt.bundle.features import HEADS
from fishrt.bundle.manifest import PRECISIONS, TARGETS

from .checkpoint.families import FAMILIES
from .errors import ExportError, check_known


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


@dataclass(frozen=True, slots=True)
class Options:
    """What an export makes of a checkpoint. Raises ExportError for a name that is unknown."""

    head: str = "audio"
    """"audio" keeps the logits of the tokens that can be spoken, "full" those of the whole vocabulary."""
    family: str | None = None
    """A key of families.FAMILIES; None identifies it."""
    lora: Lora | None = None
    """Merged into the language model."""
    precision: str | None = None
    """See graph/recipe.py. None: as the checkpoint, with its integers if it is quantised."""
    keep: Mapping[str, str] = field(default_factory=dict)
    """Precisions by patterns for the model's matrices; see graph/recipe.py."""
    targets: Collection[str] = ()
    """Providers for which forms of the graphs are made; those for "cpu" are always made."""
    codec_int8: bool = False
    """Whether to add the codec's decoder with convolutions in 8 bits; see targets/codec/int8.py."""
    codec: Path | None = None
    """The codec's file, or a folder that has it; None: in the checkpoint, or beside that of a diffusion model."""
    tokenizer: Path | None = None
    """The tokenizer's file, or a folder that has it; None: in the checkpoint."""
    weights: Path | None = None
    """The file of weights; None: the first set in the checkpoint."""

    def __post_init__(self) -> None:
        check_known("head", [self.head], HEADS)
        check_known("family", [] if self.family is None else [self.family], FAMILIES)
        check_known("precision", [*filter(None, [self.precision]), *self.keep.values()], PRECISIONS)
        check_known("target", self.targets, TARGETS)

    @property
    def words(self) -> str:
        """The options in words, the precision first."""
        parts = [self.precision or "fp32", *(f"{name}={precision}" for name, precision in self.keep.items())]
        parts += ["codec in 8 bits"] if self.codec_int8 else []
        parts += ["full head"] if self.head == "full" else []
        parts += [f"LoRA {self.lora.path.name}, alpha {self.lora.alpha:g}"] if self.lora else []
        return with_targets(", ".join(parts), self.targets)


def with_targets(words: str, targets: Collection[str]) -> str:
    """Return the words of options with further targets."""
    begin, parts = "graphs for ", words.split(", ")
    before = [part for part in parts if part.removeprefix(begin) in TARGETS]
    named = dict.fromkeys(target for target in (*(part.removeprefix(begin) for part in before), *targets) if target != "cpu")
    rest = [part for part in parts if part and part not in before]
    return ", ".join(rest + ([begin + ", ".join(named)] if named else []))
