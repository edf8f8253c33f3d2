"""Text cleaning, for models that were taught cleaned text: symbols replaced, code points dropped, punctuation shortened.

What is done is data, `TextCleaning`. The rules join two words where a line breaks or a symbol is dropped, and letters that a
model was not taught vanish. `unwrap` and `spaced` prevent the first, `lost_letters` finds the second.
"""

from __future__ import annotations

import re
import unicodedata

from .features import TextCleaning
from .text import with_end


def clean_text(text: str, rules: TextCleaning) -> str:
    """The text as a model was taught it; there may be nothing left."""
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
    """The text on one line; a paragraph that another follows ends as a sentence does."""
    *others, last = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text.strip()))
    return " ".join([*map(with_end, others), last])


def spaced(text: str, rules: TextCleaning) -> str:
    """The text with a space in place of what cleaning would drop from between two words."""
    symbols = [symbol for symbol in (*rules.replace, *sorted(set(text))) if symbol.strip() and not clean_text(symbol, rules)]
    if not symbols:
        return text
    return re.sub(rf"(?<=\w)(?:{'|'.join(map(re.escape, symbols))})+(?=\w)", " ", text)


def lost_letters(text: str, rules: TextCleaning) -> list[str]:
    """What is read aloud but would be dropped, each once: letters, digits, currency and mathematical signs. Not a symbol
    that the rules name for dropping.
    """
    spoken = (char for char in dict.fromkeys(text) if unicodedata.category(char) in ("Sc", "Sm") or char.isalnum())
    return [char for char in spoken if rules.replace.get(char) != "" and not clean_text(char, rules)]


def _within(char: str, ranges: tuple[tuple[int, ...], ...]) -> bool:
    return any(first <= ord(char) <= last for first, last in ranges)
