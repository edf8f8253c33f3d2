"""Text cleaning, for models that were trained on cleaned text: symbols replaced, code points dropped, punctuation shortened.

The rules are data, `TextCleaning`. They join two words where a line breaks or a symbol is dropped, and they drop letters that the
model was not trained on. `unwrap` and `spaced` prevent the joining; `lost_letters` finds the dropped letters.
"""

from __future__ import annotations

import re
import unicodedata

from ..bundle.features import TextCleaning
from .split import with_end


def clean_text(text: str, rules: TextCleaning) -> str:
    """Return the text as the model was trained on it; it may be empty."""
    text = text.strip()
    if rules.replace:
        symbols = "|".join(map(re.escape, rules.replace))
        text = re.sub(symbols, lambda match: rules.replace[match.group()], text)
    text = "".join(c for c in text if (rules.keep is None or _within(c, rules.keep)) and not _within(c, rules.drop))
    if rules.collapse:
        runs = f"[{re.escape(rules.collapse)}]"
        text = re.sub(f"({runs}){runs}+", r"\1", text)
    return text


def unwrap(text: str) -> str:
    """Return the text on one line, with a full stop between paragraphs."""
    *others, last = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text.strip()))
    return " ".join([*map(with_end, others), last])


def spaced(text: str, rules: TextCleaning) -> str:
    """Return the text with a space for each symbol between two words that cleaning would drop."""
    symbols = [symbol for symbol in (*rules.replace, *sorted(set(text))) if symbol.strip() and not clean_text(symbol, rules)]
    if not symbols:
        return text
    return re.sub(rf"(?<=\w)(?:{'|'.join(map(re.escape, symbols))})+(?=\w)", " ", text)


def lost_letters(text: str, rules: TextCleaning) -> list[str]:
    """Return the characters that are read aloud but that cleaning would drop, each once.

    These are letters, digits, currency and mathematical signs, except those that the rules replace by nothing.
    """
    spoken = (char for char in dict.fromkeys(text) if unicodedata.category(char) in ("Sc", "Sm") or char.isalnum())
    return [char for char in spoken if rules.replace.get(char) != "" and not clean_text(char, rules)]


def _within(char: str, ranges: tuple[tuple[int, ...], ...]) -> bool:
    return any(first <= ord(char) <= last for first, last in ranges)
