"""Scripts of characters, by their Unicode names, and what follows from a script: whose letters it has, and its full stop."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

_OF_LANGUAGES = {
    **dict.fromkeys("de en es fr it nl pl pt".split(), ("LATIN",)),
    "ar": ("ARABIC", "LATIN"),
    "ja": ("CJK", "HIRAGANA", "KATAKANA", "LATIN"),
    "ko": ("HANGUL", "CJK", "LATIN"),
    "ru": ("CYRILLIC", "LATIN"),
    "zh": ("CJK", "BOPOMOFO", "LATIN"),
}
_STOPS = {
    **dict.fromkeys(("BENGALI", "DEVANAGARI", "GURMUKHI", "ORIYA"), "।"),
    **dict.fromkeys(("BOPOMOFO", "CJK", "HIRAGANA", "KATAKANA", "YI"), "。"),
    "ARMENIAN": "։",
    "ETHIOPIC": "።",
    "KHMER": "។",
    "MYANMAR": "။",
    "TIBETAN": "།",
}


def script(char: str) -> str:
    """Return the script of a character as its Unicode name has it, such as "LATIN"; of Han ideographs "CJK"."""
    plain = unicodedata.normalize("NFKC", char)[0]  # a wide A is Latin, too
    first = unicodedata.name(plain, "").replace("-", " ").partition(" ")[0]
    return "CJK" if first == "IDEOGRAPHIC" else first


def scripts_of(languages: Iterable[str]) -> frozenset[str] | None:
    """Return the scripts of languages, given by BCP 47 codes; None where that of one is not known here."""
    found = [_OF_LANGUAGES.get(code.partition("-")[0]) for code in languages]
    return None if None in found else frozenset(name for names in found if names for name in names)


def full_stop(text: str) -> str:
    """Return the full stop of the script of a text's last letter, or of its digits, if they are the script's own."""
    for char in reversed(text):
        kind = unicodedata.category(char)[0]
        if kind in "LN":
            name = script(char)
            if name in _STOPS:
                return _STOPS[name]
            if unicodedata.east_asian_width(char) in "WFH" and name != "HANGUL":  # H: the narrow forms of wide ones
                return "。"
            if kind == "L":
                break
    return "."
