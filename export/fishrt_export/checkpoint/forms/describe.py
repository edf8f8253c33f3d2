"""A checkpoint in a few facts, without reading its weights: what it is, and what an export makes of it. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import ExportError, listed
from ..content import is_gguf
from ..families import Family
from ..identify import Evidence, identify
from ..names import INDEX, tells_terms
from ..tokenizer import read_vocabulary
from .folder import Checkpoint
from .recognise import WIDE
from .table import count_types, find_shards


@dataclass(frozen=True, slots=True)
class Description:
    """The facts of a checkpoint."""

    path: str
    form: str
    bits: int | None
    group: str
    maker: str
    quantised: int
    """Number of quantised matrices."""
    wide: tuple[str, ...]
    """Names of the matrices and tables of 16 bits and more."""
    types: str
    """Types of these."""
    weights: str
    """Name of the file of weights that an export takes."""
    bytes: int
    others: tuple[str, ...]
    """Names of other sets of weights."""
    family: str
    tokenizer: str
    """Name of its file; empty: there is none."""
    codec: str
    licence: str
    export: str
    """What an export without further options does."""

    def lines(self, size: str) -> list[str]:
        """Return at most ten lines. size: the bytes of the weights in words."""
        bits = f", {self.bits} bits" if self.bits else ""
        by = f"; made by {self.maker}" if self.maker else ""
        others = f"; not {', '.join(self.others)} (--weights FILE chooses)" if self.others else ""
        return [
            f"checkpoint    {self.path}",
            f"form          {self.form}{bits}{f', {self.group}' if self.group else ''}{by}",
            f"quantised     {self.quantised} matrices; {len(self.wide)} in {self.types or '16 bits'}"
            + (f": {listed(self.wide, 4)}" if self.quantised and self.wide else ""),
            f"weights       {self.weights}, {size}{others}",
            f"family        {self.family or 'unknown'}",
            f"tokenizer     {self.tokenizer or 'none: give --tokenizer PATH'}",
            f"codec         {self.codec or 'none: give --codec PATH'}",
            f"licence       {self.licence or 'unknown'}",
            f"export        {self.export}",
        ]


def is_checkpoint(path: Path) -> bool:
    """Return whether a path is a file, or a folder with weights of a language model."""
    return path.is_file() or (path.is_dir() and bool(Checkpoint.of(path).sets))


def describe(path: Path) -> Description:
    """Return the facts of a checkpoint. Raises ExportError for a file that is damaged or not weights."""
    found = Checkpoint.of(path)
    if not found.sets:
        found.check()
    form = found.form
    family = None if form.refused else _family(found)
    wide = {
        name.removesuffix(".weight"): entry
        for name, entry in found.table.entries.items()
        if name.endswith(".weight") and len(entry.shape) > 1 and entry.dtype in WIDE
    }
    terms = [file.name for file in sorted(found.folder.iterdir()) if tells_terms(file.name)]
    licence = family.licence if family else ""
    return Description(
        str(path),
        form.title,
        form.bits,
        form.group,
        form.maker,
        form.quantised,
        tuple(wide),
        ", ".join(WIDE[kind] for kind in count_types(wide.values())),
        found.weights.name,
        sum(file.stat().st_size for file in _files(found.weights)),
        tuple(file.name for file in found.sets[1:]),
        family.title if family else "",
        " and ".join(file.name for file in found.tokenizers),
        " and ".join(file.name for file in found.codecs),
        licence + (f" ({', '.join(terms)})" if terms else ""),
        _export(found),
    )


def _files(weights: Path) -> list[Path]:
    if weights.name != INDEX:
        return [weights]
    return find_shards(weights)


def _export(found: Checkpoint) -> str:
    """Return what an export does: it refuses, or what becomes of the weights."""
    form = found.form
    if form.refused:
        return f"refuses: {form.refused}; {form.instead}"
    made = form.exact if form.quantised else "the weights stay as they are"
    try:
        found.check()
    except ExportError as error:
        return f"is not complete: {error.hint}; then {made}"
    return made


def _family(found: Checkpoint) -> Family | None:
    """Return the family, if the files tell it."""
    try:
        config: Mapping[str, Any] = found.config()
        if not found.tokenizers:
            return found.probable()
        path = found.tokenizers[0]
        text = found.tokenizer_text(path)
        return identify(Evidence(config, None if text is None else read_vocabulary(text, path), None))
    except ExportError:
        return None if is_gguf(found.weights) else found.probable()
