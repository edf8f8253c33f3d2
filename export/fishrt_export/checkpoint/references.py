"""What a checkpoint has beside its model: recordings, which become voices of the bundle, and the licence of its weights.

A recording lies in `references/<name>/`. It is encoded with the exported codec.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fishrt import TTS
from fishrt.arrays import Pcm, Sound
from fishrt.bundle.folder import Bundle
from fishrt.bundle.graphs import BundleGraphs
from fishrt.bundle.manifest import Licence, Voices
from fishrt.language_model.prompt import PromptBuilder
from fishrt.text.tokenizer import Tokenizer
from fishrt.voices.loudness import Loudness
from fishrt.voices.store import VoiceStore

from ..errors import ExportError
from .content import read_text, reading
from .families import Release
from .names import REFERENCES, tells_terms

DEFAULT = "default.txt"
FOLDER = "voices"
NOTE = "WEIGHTS-LICENCE.txt"


@dataclass(frozen=True, slots=True)
class References:
    """The recordings of a checkpoint by name, and the default voice."""

    store: VoiceStore
    names: tuple[str, ...]
    default: str


def check_references(checkpoint: Path, bundle: Bundle, tokenizer: Tokenizer | None) -> References | None:
    """Check all recordings before the export begins, and return them; None if there are none. Uses only the bundle's manifest.

    tokenizer: None for a diffusion model, whose recordings need no transcript.
    Raises ExportError for a folder that is not a voice and for an unknown default, AudioError or VoiceError for a recording that
    cannot be read, is too short or too long, or has no transcript, PromptError for a transcript that cannot be spoken.
    """
    folder = checkpoint / REFERENCES
    if not folder.is_dir():
        return None
    store, words = VoiceStore(folder), tokenizer is not None
    names = tuple(store.list(transcripts=words))
    if others := store.left_out(transcripts=words):
        needs = "a recording and its words in a .lab file of the same name" if words else "a recording"
        raise ExportError(f"{folder} holds folders that are not voices: {'; '.join(others.values())}", hint=f"each needs {needs}")
    if not names:
        return None
    named = folder / DEFAULT
    default = read_text(named).strip() if named.is_file() else names[0]
    if default not in names:
        raise ExportError(f"{named} names {default!r}; the voices are: {', '.join(names)}")
    for name in names:
        store.load(name, _Listener(bundle, tokenizer))
    return References(store, names, default)


def encode_references(references: References | None, bundle: Bundle) -> Voices | None:
    """Encode the voices into a bundle that has its codec graphs. Raises VoiceError for a voice that does not fit the bundle."""
    if references is None:
        return None
    target = VoiceStore(bundle.path / FOLDER)
    tts = TTS(bundle, BundleGraphs(bundle, "cpu", None), target)
    for name in references.names:
        target.add(replace(references.store.load(name, tts), recording=None))
    return Voices(references.default, references.names)


def copy_licence(checkpoint: Path, bundle: Path, release: Release) -> Licence:
    """Copy the checkpoint's licence files (its README, if it has none) and write a note.

    The licence is the one that they name, else that of the published weights.
    """
    with reading(checkpoint):
        files = {p.name: p.read_bytes() for p in sorted(checkpoint.iterdir()) if tells_terms(p.name) and p.is_file()}
    readmes = [name for name in files if name.lower().startswith("readme")]
    found = [name for name in files if name not in readmes]
    copied = found or readmes
    for name in copied:
        (bundle / name).write_bytes(files[name])
    names = [stated for name in (*readmes, *found) if (stated := _licence_name(files[name], whole_file=name in found))]
    file = copied[0] if copied else None
    named = names[0] if names else f"{release.licence} (of the published {release.title}; the checkpoint names none)"
    (bundle / NOTE).write_text(
        "The weights in this folder were converted from a published checkpoint. They keep the terms of their publisher,\n"
        f"which the licence of fishrt does not change.\n\nLicence: {named}\n"
        + (f"The checkpoint's own words: {file}\n" if file else f"The terms: https://huggingface.co/{release.repository}\n"),
        encoding="utf-8",
    )
    return Licence(named, file)


def _licence_name(content: bytes, *, whole_file: bool) -> str | None:
    """Return the licence in the front matter of a README (`license_name:`, else `license:`), or a licence file's first line."""
    text = content.decode("utf-8-sig", errors="replace")
    for key in ("license_name", "license"):
        if match := re.search(rf"^{key}:[ \t]*(\S.*?)[ \t]*$", text, re.MULTILINE):
            return match[1].strip("\"'")
    lines = (line.strip("# \t") for line in text.splitlines())
    return next((line for line in lines if line), None) if whole_file else None


class _Listener:
    """Stand-in for a TTS during the check of recordings: checks transcripts, and takes every recording."""

    def __init__(self, bundle: Bundle, tokenizer: Tokenizer | None) -> None:
        self.bundle = bundle
        self._prompts = None if tokenizer is None else PromptBuilder(tokenizer, bundle.manifest.language_model)

    def encode(self, _pcm: Pcm, _rate: int) -> Sound:
        """Return one frame of zeros."""
        codec = self.bundle.manifest.codec
        if codec.channels is not None:
            return np.zeros((1, codec.channels), np.float32)
        return np.zeros((len(codec.codebook_sizes), 1), np.int64)

    def loudness(self, _sound: Sound) -> Loudness | None:
        """Return None: nothing can be decoded yet."""
        return None

    def check_transcript(self, text: str, what: str) -> None:
        """Check that the model can read a transcript. Raises PromptError."""
        if self._prompts is not None:
            self._prompts.check_transcript(text, what)
