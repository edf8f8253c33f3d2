"""Splitting of long text after punctuation, as the original does for some models: at sentence ends, clauses, spaces, anywhere.

Neighbours are joined again as long as they fit. Abbreviations and markup may be cut, but a decimal number stays whole.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterator

from ..bundle.features import PunctuationSplit
from .split import byte_length


def split_punctuation(text: str, rules: PunctuationSplit, max_bytes: int) -> list[str]:
    """Return the pieces of a text, stripped, of at most `max_bytes` (UTF-8), or one character more within a longer word.

    Pieces of ASCII punctuation only are left out, so there may be none.
    """
    pieces = [text]
    for ends in filter(None, (rules.sentence_ends, rules.clause_ends, " ")):
        pieces = [part for piece in pieces for part in (_cut(piece, ends) if byte_length(piece) > max_bytes else [piece])]
    pieces = [
        part for piece in pieces for part in (_cut_characters(piece, max_bytes) if byte_length(piece) > max_bytes else [piece])
    ]
    joined = [""]
    for piece in pieces:
        if byte_length(joined[-1]) + byte_length(piece) > max_bytes:
            joined.append("")
        joined[-1] += piece
    return [piece.strip() for piece in joined if not all(c.isspace() or c in string.punctuation for c in piece)]


def _cut(text: str, ends: str) -> Iterator[str]:
    """Yield the parts of a text, cut after each of the characters `ends`, but not within a decimal number."""
    start = 0
    for match in re.finditer(rf"(?<!\d)\d+\.\d+|([{re.escape(ends)}])", text):
        if match[1]:
            yield text[start : match.end()]
            start = match.end()
    yield text[start:]


def _cut_characters(text: str, max_bytes: int) -> Iterator[str]:
    part = ""
    for char in text:
        part += char
        if byte_length(part) >= max_bytes:
            yield part
            part = ""
    yield part
