"""Names of the files of a checkpoint, and which of a published repository's files an export needs. Loads no torch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from ..errors import ExportError, listed
from .content import DAMAGED, read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLE = "model.pth"
CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
TIKTOKEN = "tokenizer.tiktoken"
SPECIAL_TOKENS = "special_tokens.json"
CODEC = "codec.pth"
FIREFLY = "firefly-gan-vq-fsq-*-generator.pth"
CODECS = (CODEC, "codec.safetensors", "firefly-gan-vq-fsq-*.pth", "firefly-gan-vq-fsq-*.safetensors")
"""Names of codecs: the official ones, and those of safetensors and of merged weight norm."""
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
    f"a codec ({CODEC} or {FIREFLY})": CODECS,
}
"""The parts of a checkpoint in words, and the names of which each needs one."""
_SMALL = (*TOKENIZERS, SPECIAL_TOKENS, CODEC_CONFIG, DEFAULTS)
_GGUF = ".gguf"
_TERMS = ("license", "licence", "notice", "readme")


def lacking(names: Collection[str], *parts: str) -> list[str]:
    """Return the parts of a checkpoint of which no file is among `names`.

    parts: one name of each part that is asked for; none: all.
    """
    wanted = {what: patterns for what, patterns in _PARTS.items() if not parts or set(patterns) & set(parts)}
    return [what for what, patterns in wanted.items() if not any(fnmatchcase(name, p) for name in names for p in patterns)]


def choose_checkpoint(
    names: Sequence[str], read: Callable[[str], Path], *, weights: str | None = None, given: Collection[str] = ()
) -> list[str]:
    """Return the files of a repository that an export needs, config.json last: a folder without it is no checkpoint yet.

    Of several sets of weights `weights` counts, or the first in this order: shards, one safetensors file, model.pth, a GGUF file.
    `read` fetches the index of the shards. given: TOKENIZER or CODEC, which come from elsewhere. Raises ExportError for a
    repository that lacks a part, or has several GGUF files of which none is chosen.
    """
    sets = [name for name in WEIGHTS if name in names] or [name for name in names if name.endswith(_GGUF)]
    chosen = weights if weights in names else next(iter(sets), None)
    inside = (CONFIG, PICKLE, TOKENIZER, CODEC) if chosen is not None and chosen.endswith(_GGUF) else ()
    if missing := lacking({*names, *given, *inside}):
        raise ExportError(
            f"the repository is not a checkpoint that can be exported: it lacks {', '.join(missing)}; "
            f"it has {listed(names) or 'no files'}",
            hint="fishrt export --help lists the official repositories; --codec and --tokenizer give what is elsewhere",
        )
    if chosen is None or (weights is not None and chosen != weights) or (inside and weights is None and len(sets) > 1):
        raise ExportError(f"the repository has {listed(sets)}", hint="choose one of these with --weights NAME")
    shards = sorted(set(read_places(read(INDEX)).values())) if chosen == INDEX else []
    codecs = [name for name in names if any(fnmatchcase(name, pattern) for pattern in CODECS) and CODEC not in given]
    rest = [name for name in names if name in _SMALL or name.startswith(f"{REFERENCES}/") or tells_terms(name)]
    return [*rest, chosen, *shards, *codecs, *(name for name in (CONFIG,) if name in names)]


def choose_codec(names: Sequence[str], _read: Callable[[str], Path]) -> list[str]:
    """Return the files of a repository that hold a language model's codec. Raises ExportError if it has none."""
    found = [name for name in names if any(fnmatchcase(name, pattern) for pattern in CODECS)]
    if not found:
        raise ExportError(
            f"the repository has no codec; it has {listed(names) or 'no files'}", hint="take that of the official repository"
        )
    return [*found, *(name for name in (CODEC_CONFIG,) if name in names)]


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
