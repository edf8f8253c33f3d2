"""Parts of a text that a model does not read well: letters of other languages, digits, signs, and unknown tags."""

from __future__ import annotations

import re
import unicodedata

from ..bundle.features import Reads
from .scripts import script, scripts_of

_CONTROL = re.compile(r"<\|[^|<>]*\|>")
_TAGS = {
    "[]": re.compile(r"\[[^\[\]]*[^\W\d_][^\[\]]*\]"),
    "()": re.compile(
        r"\((?:angry|sad|excited|surprised|delighted|scared|worried|upset|nervous|frustrated|embarrassed|proud|relaxed|curious"
        r"|confused|joyful|whispering|shouting|screaming|laughing|chuckling|sobbing|crying|sighing|panting|groaning"
        r"|[a-z ]+ tone)\)",
        re.IGNORECASE,
    ),
    "<>": re.compile(r"</?[A-Za-z][^<>]*>"),
}
"""Forms of tags. Round brackets often hold plain text, so only known markers count as tags there."""
_SPOKEN = "%&@#"
"""Characters that are read aloud, though their category is punctuation."""
_MOST = 10
"""Most members of a kind that are named."""


def unread(text: str, reads: Reads) -> list[str]:
    """Return the parts that the model does not read well, each kind with its members: "digits 3, 5"."""
    text = unicodedata.normalize("NFC", _CONTROL.sub(" ", text))
    found: dict[str, list[str]] = {"letters": [], "digits": [], "signs": [], "tags": []}
    for form, pattern in _TAGS.items():
        if form not in reads.tags:
            found["tags"] += pattern.findall(text)
        text = pattern.sub(" ", text)
    scripts = scripts_of(reads.languages) if reads.languages and reads.characters is None else None
    for char in dict.fromkeys(text):
        kind = _kind(char)
        if kind is None:
            continue
        if reads.characters is not None:
            known = char.lower() in reads.characters
        else:
            known = kind != "letters" or scripts is None or script(char) in scripts
        if not known:
            found[kind].append(char)
    return [f"{kind} {_listed(members)}" for kind, members in found.items() if members]


def _kind(char: str) -> str | None:
    """Return "letters", "digits" or "signs"; None for a character that is not read aloud or belongs to the one before it."""
    if char in _SPOKEN:
        return "signs"
    return {"L": "letters", "N": "digits", "S": "signs"}.get(unicodedata.category(char)[0])


def _listed(members: list[str]) -> str:
    different = list(dict.fromkeys(members))
    return ", ".join(different[:_MOST]) + (", …" if different[_MOST:] else "")
