"""Text cleaning, for models that were taught cleaned text: symbols replaced, code points dropped, punctuation shortened.

What is done is data, `TextCleaning`. The rules were made for single lines: at a line break they join two words or end the
sentence, and letters that a model was not taught vanish. `unwrap` prevents the first, `lost_letters` finds the second.
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


def lost_letters(text: str, rules: TextCleaning) -> list[str]:
    """The letters and digits that cleaning would drop, each once."""
    composed = dict.fromkeys(unicodedata.normalize("NFC", text))
    return [char for char in composed if unicodedata.category(char)[0] in "LN" and not clean_text(char, rules)]


def _within(char: str, ranges: tuple[tuple[int, ...], ...]) -> bool:
    return any(first <= ord(char) <= last for first, last in ranges)
