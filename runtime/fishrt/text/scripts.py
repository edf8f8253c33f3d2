"""Scripts of characters, by their Unicode names; the scripts of languages, and the full stops of scripts."""

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
    """Return the script of a character by its Unicode name, such as "LATIN"; "CJK" for Han ideographs."""
    plain = unicodedata.normalize("NFKC", char)[0]  # a wide A is Latin, too
    first = unicodedata.name(plain, "").replace("-", " ").partition(" ")[0]
    return "CJK" if first == "IDEOGRAPHIC" else first


def scripts_of(languages: Iterable[str]) -> frozenset[str] | None:
    """Return the scripts of languages, given by BCP 47 codes; None if a language is not in the table."""
    found = [_OF_LANGUAGES.get(code.partition("-")[0]) for code in languages]
    return None if None in found else frozenset(name for names in found if names for name in names)


def full_stop(text: str) -> str:
    """Return the full stop of the script of a text's last letter, or of its last digit if the script has its own digits."""
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
