"""What a folder of a language model's checkpoint has, and which of its files an export takes. Loads no torch.

Weights and codec are found by the official names first; where there are none, by their tensors.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

from ...errors import ExportError, listed
from ..config import flatten
from ..content import is_gguf, read_json, read_text, reading
from ..families import FAMILIES, Family
from ..names import CODEC_CONFIG, CODECS, CONFIG, INDEX, TOKENIZERS, WEIGHTS, lacking, read_places
from .embedded import codec_tensors, language_model_tensors, read_config, read_tokenizer
from .recognise import Form, recognise
from .table import Table, read_table

log = logging.getLogger(__name__)

_OTHER_ENDINGS = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")
_OTHER_ENGINES = {
    "text_model.safetensors": "mlx-forge, whose kernels have another order: take the original or a file of mlx-audio",
    "dual_ar.bin": "fish-audio-cpp: take the checkpoint that it was made from",
}
"""Files of other programs, and what to take instead."""


@dataclass(frozen=True, slots=True)
class LanguageModelFiles:
    """The dual-AR half of a checkpoint."""

    config: Mapping[str, Any]
    weights: Path
    """The index of the shards, the single file of safetensors or GGUF, or the pickle."""
    tokenizer: Path
    """tokenizer.json or tokenizer.tiktoken, or the GGUF file that has it."""
    tokenizer_text: str | None
    """The text of a tokenizer.json; None: a tokenizer.tiktoken."""
    form: Form


@dataclass(frozen=True, slots=True)
class CodecFiles:
    """The codec half of a checkpoint."""

    weights: Path
    config: Mapping[str, Any] | None
    """None: the codec has its family's official sizes."""


@dataclass(frozen=True)
class Checkpoint:
    """A folder, and the files that the user names in place of its own."""

    folder: Path
    chosen: Path | None = None
    """The weights; None: the first of the folder's."""
    tokenizer: Path | None = None
    codec: Path | None = None
    """The codec's file, or a folder that has one."""

    @classmethod
    def of(
        cls, path: Path, *, weights: Path | None = None, tokenizer: Path | None = None, codec: Path | None = None
    ) -> Checkpoint:
        """Return the checkpoint of a folder or of a file of weights. Raises ExportError for a path that is not there."""
        with reading(path):
            if not path.exists():
                hint = "give the folder of a checkpoint, a file of weights, or OWNER/NAME of the Hub"
                raise ExportError(f"{path} does not exist", hint=hint)
            if path.is_file():
                path, weights = path.parent, weights or path
            for given in (weights, tokenizer, codec):
                if given is not None and not given.exists() and not (path / given).exists():
                    raise ExportError(f"{given} does not exist", hint=f"give a path, or the name of a file in {path}")
        inside = [given if given is None or given.exists() else path / given for given in (weights, tokenizer, codec)]
        return cls(path, *inside)

    @cached_property
    def sets(self) -> list[Path]:
        """The sets of weights, of which the first is taken: the official names, then GGUF files, then other files of a model."""
        if self.chosen is not None:
            return [self.chosen]
        found = [self.folder / name for name in WEIGHTS if (self.folder / name).is_file()]
        if found and found[0].name == INDEX:  # a single file that the index names is a shard, not another set
            shards = set(read_places(found[0]).values())
            found = [path for path in found if path.name not in shards]
        found += [path for path in self._ggufs if not self._is_only_codec(path)]
        if not found:
            found = [path for path in self._files if path.suffix in _OTHER_ENDINGS and _is_language_model(path)]
        return found

    @property
    def weights(self) -> Path:
        """The weights that are taken."""
        return self.sets[0]

    @cached_property
    def table(self) -> Table:
        """The tensors of the weights."""
        return read_table(self.weights)

    @cached_property
    def form(self) -> Form:
        """The form of the weights."""
        path = self.folder / CONFIG
        return recognise(self.table, read_json(path) if path.is_file() and not is_gguf(self.weights) else None)

    def config(self) -> Mapping[str, Any]:
        """Return the config of the language model. Raises ExportError."""
        return read_config(self.weights) if is_gguf(self.weights) else read_json(self.folder / CONFIG)

    @cached_property
    def tokenizers(self) -> list[Path]:
        """The tokenizers: given, beside the weights, or inside them."""
        given = self.tokenizer
        if given is not None:
            return [path for name in TOKENIZERS if (path := given / name).is_file()] if given.is_dir() else [given]
        found = [self.folder / name for name in TOKENIZERS if (self.folder / name).is_file()]
        if not found and self.sets and is_gguf(self.weights) and read_tokenizer(self.weights) is not None:
            found = [self.weights]
        return found

    @cached_property
    def codecs(self) -> list[Path]:
        """The codecs: given, beside the weights, or inside a GGUF file."""
        folder = self.folder
        if self.codec is not None:
            if self.codec.is_file():
                return [self.codec]
            folder = self.codec
        found = [path for path in _list(folder) if any(fnmatchcase(path.name, pattern) for pattern in CODECS)]
        if found:
            return found
        ggufs = [path for path in _list(folder) if path.suffix == ".gguf" and codec_tensors(path)]
        return [self.weights] if self.sets and self.weights in ggufs else ggufs

    def check(self, *parts: str) -> None:
        """Check that all parts are there, and that the form is read. Raises one ExportError.

        parts: some of "weights", "tokenizer" and "codec"; none: all.
        """
        with reading(self.folder):
            if not self.folder.is_dir():
                raise ExportError(f"{self.folder} is not a folder")
            wanted = parts or ("weights", "tokenizer", "codec")
            if "weights" in wanted and self.sets and is_gguf(self.weights):
                self.form.check(self.weights)
            present = {path.name for path in self._files}
            if "weights" in wanted and not self.sets:
                for name, words in _OTHER_ENGINES.items():
                    if name in present:
                        raise ExportError(f"{self.folder} cannot be exported: it is of {words}")
            # The names that stand for what was found under other names.
            names = present | ({INDEX} if self.sets else set()) | ({CONFIG} if self.sets and is_gguf(self.weights) else set())
            names |= ({TOKENIZERS[0]} if self.tokenizers else set()) | ({CODECS[0]} if self.codecs else set())
        asked = {"weights": (CONFIG, INDEX), "tokenizer": TOKENIZERS[:1], "codec": CODECS[:1]}
        if missing := lacking(names, *(name for part in wanted for name in asked[part])):
            raise ExportError(
                f"{self.folder} is not a complete checkpoint: it lacks {', '.join(missing)}",
                hint=self._where(tokenizer=not self.tokenizers, codec=not self.codecs),
            )
        if "weights" in wanted:
            self.form.check(self.weights)

    def language_model(self) -> LanguageModelFiles:
        """Return the files of the language model. Raises ExportError. Logs a warning if other weights are left out."""
        self.check("weights", "tokenizer")
        if len(self.sets) > 1:
            others = listed([path.name for path in self.sets[1:]])
            log.warning("%s has %d sets of weights: %s is taken, and not %s; --weights FILE chooses another",
                        self.folder, len(self.sets), self.weights.name, others)  # fmt: skip
        path = _only(self.tokenizers, "tokenizers", "--tokenizer")
        return LanguageModelFiles(self.config(), self.weights, path, self.tokenizer_text(path), self.form)

    def tokenizer_text(self, path: Path) -> str | None:
        """Return the text of a tokenizer.json, or None for a tokenizer.tiktoken. Raises ExportError."""
        if is_gguf(path):
            return read_tokenizer(path)
        return None if path.suffix == ".tiktoken" else read_text(path)

    def codec_files(self) -> CodecFiles:
        """Return the files of the codec. Raises ExportError unless there is one codec."""
        self.check("codec")
        path = _only(self.codecs, "codecs", "--codec")
        beside = [place / CODEC_CONFIG for place in (path.parent, self.folder) if (place / CODEC_CONFIG).is_file()]
        return CodecFiles(path, read_json(beside[0]) if beside else None)

    @cached_property
    def _files(self) -> list[Path]:
        return _list(self.folder)

    @cached_property
    def _ggufs(self) -> list[Path]:
        return [path for path in self._files if path.suffix == ".gguf" and is_gguf(path)]

    def _is_only_codec(self, path: Path) -> bool:
        return bool(codec_tensors(path)) and not language_model_tensors(path)

    def _where(self, *, tokenizer: bool, codec: bool) -> str:
        """Return where the missing halves are."""
        options = [name for name, lost in (("--tokenizer PATH", tokenizer), ("--codec PATH", codec)) if lost]
        if not options or not self.sets:
            return "give the folder of a checkpoint with all its files, the codec too"
        family = self.probable()
        if family is None:
            return f"take them from the official checkpoint, and give them with {' and '.join(options)}"
        wanted = ("tokenizer", "special_tokens") * tokenizer + ("codec", "firefly") * codec
        files = [part.removeprefix("and ") for part in family.files.replace(" and the shards", "").split(", ")]
        taken = [file for file in files if file.startswith(wanted)]
        return f"take {' and '.join(taken)} of {family.repository}, and give {' and '.join(options)}"

    def probable(self) -> Family | None:
        """Return the family that the config alone tells, if it does."""
        try:
            config = flatten(self.config())
        except ExportError:
            return None
        later = {"norm_fastlayer_input": "s2", "attention_qk_norm": "s1", "scale_codebook_embeddings": "1.5"}
        return next((FAMILIES[name] for field, name in later.items() if config.get(field) is not None), None)


def _list(folder: Path) -> list[Path]:
    with reading(folder):
        return sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []


def _is_language_model(path: Path) -> bool:
    try:
        return any("codebook_embeddings" in name for name in read_table(path).entries)
    except ExportError:  # not weights, or damaged
        return False


def _only(found: Sequence[Path], what: str, option: str) -> Path:
    if not found:  # the folder itself may have one, but another was named
        raise ExportError(
            f"the folder of {option} has no {what.removesuffix('s')}", hint="give the file, or a folder that has it"
        )
    if len(found) > 1:
        raise ExportError(
            f"{found[0].parent} has {len(found)} {what}: {', '.join(path.name for path in found)}",
            hint=f"keep the one of this model, or choose with {option} PATH",
        )
    return found[0]
