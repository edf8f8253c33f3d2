"""Names of the files of a checkpoint, and which of a published repository's files an export needs. Loads no torch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from ..errors import ExportError, listed
from .content import DAMAGED, read_json, reading

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLE = "model.pth"
CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
TIKTOKEN = "tokenizer.tiktoken"
SPECIAL_TOKENS = "special_tokens.json"
CODEC = "codec.pth"
FIREFLY = "firefly-gan-vq-fsq-*-generator.pth"
CODEC_CONFIG = "codec_config.json"
REFERENCES = "references"
DEFAULTS = "fishrt.json"
"""fishrt's own file, optional in a checkpoint folder: defaults of this checkpoint that replace its family's."""

WEIGHTS = (INDEX, SINGLE, PICKLE)
TOKENIZERS = (TOKENIZER, TIKTOKEN)
_PARTS = {
    CONFIG: (CONFIG,),
    f"weights ({INDEX}, {SINGLE} or {PICKLE})": WEIGHTS,
    f"a tokenizer ({TOKENIZER} or {TIKTOKEN})": TOKENIZERS,
    f"a codec ({CODEC} or {FIREFLY})": (CODEC, FIREFLY),
}
"""The parts of a checkpoint in words, and the names of which each needs one."""
_SMALL = (*TOKENIZERS, SPECIAL_TOKENS, CODEC_CONFIG, DEFAULTS)
_TERMS = ("license", "licence", "notice", "readme")


def lacking(names: Collection[str], *parts: str) -> list[str]:
    """Return the parts of a checkpoint of which no file is among `names`.

    parts: one name of each part that is asked for; none: all.
    """
    wanted = {what: patterns for what, patterns in _PARTS.items() if not parts or set(patterns) & set(parts)}
    return [what for what, patterns in wanted.items() if not any(fnmatchcase(name, p) for name in names for p in patterns)]


def check_parts(folder: Path, *parts: str) -> None:
    """Check that the folder has a file of all parts, or of these; see `lacking`. Raises ExportError."""
    with reading(folder):
        if not folder.is_dir():
            fault = "is a file, not a folder" if folder.exists() else "does not exist"
            raise ExportError(f"{folder} {fault}", hint="give the folder of an official checkpoint, or OWNER/NAME of the Hub")
        names = [path.name for path in folder.iterdir() if path.is_file()]
    if missing := lacking(names, *parts):
        raise ExportError(
            f"{folder} is not a complete checkpoint: it lacks {', '.join(missing)}",
            hint="give the folder of a checkpoint with all its files, the codec too",
        )


def choose_checkpoint(names: Sequence[str], read: Callable[[str], Path]) -> list[str]:
    """Return the files of a repository that an export needs, config.json last: a folder without it is no checkpoint yet.

    Of several sets of weights the first counts, in this order: shards, one safetensors file, model.pth. `read` fetches the
    index of the shards. Raises ExportError for a repository that lacks a part.
    """
    if missing := lacking(names):
        raise ExportError(
            f"the repository is not a checkpoint that can be exported: it lacks {', '.join(missing)}; "
            f"it has {listed(names) or 'no files'}",
            hint="fishrt export --help lists the official repositories; put a fine-tuned model into one folder with the codec",
        )
    weights = next(name for name in WEIGHTS if name in names)
    shards = sorted(set(read_places(read(INDEX)).values())) if weights == INDEX else []
    codecs = [name for name in names if name == CODEC or fnmatchcase(name, FIREFLY)]
    rest = [name for name in names if name in _SMALL or name.startswith(f"{REFERENCES}/") or tells_terms(name)]
    return [*rest, weights, *shards, *codecs, CONFIG]


def left_out(names: Sequence[str]) -> list[str]:
    """Return the sets of weights that `choose_checkpoint` leaves out."""
    return [name for name in WEIGHTS if name in names][1:]


def tells_terms(name: str) -> bool:
    """Return whether a file at the top of a checkpoint may state the licence of its weights."""
    return name.lower().startswith(_TERMS) and "/" not in name


def checkpoint_name(folder: Path) -> str:
    """Return the name of a checkpoint folder, or of its repository if the folder is in the cache of the Hugging Face Hub."""
    folder = folder.absolute()
    storage = folder.parent.parent.name if folder.parent.name == "snapshots" else ""
    return storage.split("--")[-1] if storage.startswith("models--") else folder.resolve().name


def read_places(index: Path) -> dict[str, str]:
    """Return the file name of each tensor's shard, from an index of shards. Raises ExportError."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise ExportError(f"{index} has no usable weight_map", hint=DAMAGED)
    return places
