"""Warnings about a request: text that the model does not read well, voices without speaker tags, pieces that ended early."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..bundle.features import LanguageModel
from ..bundle.manifest import Manifest
from ..language_model.prompt import DIALECTS
from ..speech import PieceInfo
from ..text.reading import unread
from ..text.split import excerpt, speaker_turns


def text_warnings(text: str, voices: int, manifest: Manifest) -> Iterator[str]:
    """Yield warnings of text that the model does not read well, and of several voices without speaker tags in the text.

    voices: the number of voices.
    """
    model = manifest.model
    if model.reads is not None and (found := unread(text, model.reads)):
        yield f"{manifest.name} does not read well: {'; '.join(found)}"
    turns = isinstance(model, LanguageModel) and DIALECTS[model.prompt_dialect].turns
    if voices > 1 and turns and not speaker_turns(text):
        yield f"there are {voices} voices, but the text has no speaker tags: begin each turn with <|speaker:0|>, <|speaker:1|>, …"


def piece_warnings(pieces: Sequence[PieceInfo], of: int) -> list[str]:
    """Return a warning for each way in which pieces ended early, with the number of these pieces and the first of them.

    of: number of all pieces of text.
    """
    ways = {
        "cut off by the limit of its length": [p.frames > 0 and p.stop_reason == "max_frames" for p in pieces],
        "cut off at the end of the model's context (max_seq_len)": [
            p.frames > 0 and p.stop_reason == "max_seq_len" for p in pieces
        ],
        "cut off at a pause, after which there is more": [p.stop_reason == "pause" for p in pieces],
        "not spoken: the model ended at once": [p.frames == 0 and p.stop_reason == "end" for p in pieces],
        "not spoken: the limit leaves no frame": [p.frames == 0 and p.stop_reason != "end" for p in pieces],
    }
    warnings = []
    for way, concerned in ways.items():
        if count := sum(concerned):
            first = concerned.index(True)
            who = f"{count:,} of {of:,} pieces" if count > 1 else f"piece {first + 1:,} of {of:,}" if of > 1 else ""
            if way.startswith("cut off"):
                who = f"the speech of {who} was" if who else "the speech was"
            else:
                who = f"{who or 'the text'} {'were' if count > 1 else 'was'}"
            which = f"; the first is piece {first + 1:,}" if count > 1 else ""
            warnings.append(f'{who} {way}{which}: "{excerpt(pieces[first].text)}"')
    return warnings
