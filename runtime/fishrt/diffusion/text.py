"""Text → pieces → tokens: the original's normalisation, sentences with their speakers, and pieces that fit a window.

A generation has a window of half a minute, and the model hurries through a text that is longer. The time that a text takes is
therefore estimated, and a longer text is spoken in pieces of whole sentences. The original server's pieces may be longer than the
window, and it cuts off what its tokens do not take. Ours are shorter, so that a slow voice has time, and a sentence that is too
long is cut at clauses or words.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from math import inf, isfinite
from numbers import Real
from typing import Literal

import numpy as np

from ..arrays import Ints
from ..errors import PromptError, SamplingError
from ..text.split import byte_length, check_text, excerpt, split_sentences

Variant = Literal["official", "streaming"]
"""Behaviour of the original inference code, or of the original streaming server."""

FIRST, SECOND = (f"S{n}" for n in (1, 2))
"""Speakers, as tags in square brackets name them."""
_PREFIX = f"[{FIRST}] "
_REPLACED = str.maketrans({"\u2026": "...", "\u2019": "'", "\u201d": '"', "\n": " ", ":": ",", ";": ",", "\u2014": ", "})
_REPLACED_STREAMING = str.maketrans(
    {"\u2026": ",", "\u2014": ", ", "\u2013": ", ", "\n": " ", ":": ",", ";": ",", '"': "", "*": ""}
)
_SPEAKER = re.compile(r"(\[S\d+\])")
_BULLET = re.compile(r"(?:^|(?<=\n))(?:[-•*]|\d+\.) ")
_END = re.compile(r"[.!?]['\"]?(?=\s|$)")
_ABBREVIATIONS = frozenset(
    "mr. mrs. ms. dr. prof. rev. hon. st. etc. e.g. i.e. vs. approx. dept. jr. sr. u.s. u.k. a.m. p.m.".split()
)
_LOOK_BACK = 10
"""Characters before a full stop in which an abbreviation is looked for: none is longer."""
_SLOW_VOICE = 0.75
"""Part of a window that a piece may take at the estimated pace."""
_LEAST_CUT = 16
"""Bytes below which no sentence is cut to shorten the time it takes."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How long a text takes, and how long its pieces are, in seconds. None depends on the window of a generation.

    A piece ends before a sentence with which it would take more than `target_s`, if it takes `min_s` without, and always before
    one with which it would take more than `max_s`. A text takes the longer of the times by letters and by words.
    Raises SamplingError for a value outside its range.
    """

    target_s: float | None = None
    min_s: float | None = None
    max_s: float | None = None
    letters_per_s: float = 14.0
    """Characters of all kinds. 0 stands for 4."""
    words_per_s: float = 2.7
    """0 stands for 2.5."""

    def __post_init__(self) -> None:
        for name in ("target_s", "min_s", "max_s", "letters_per_s", "words_per_s"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, Real) or not isfinite(value) or value < 0):
                raise SamplingError(f"the pace has {name} {value!r}", hint="it must be a number of at least 0")

    def estimate(self, text: str) -> float:
        """Return the seconds that a text takes."""
        return max(len(text) / (self.letters_per_s or 4.0), max(1, len(text.split())) / (self.words_per_s or 2.5))

    def within(self, window_s: float, variant: Variant = "official") -> Pace:
        """Return the pace with all seconds set, for a window of so many seconds."""
        longest = _SLOW_VOICE * window_s
        target, least, most = (30.0, 20.0, 40.0) if variant == "streaming" else (0.8 * longest, 0.5 * longest, longest)
        return replace(
            self,
            target_s=target if self.target_s is None else self.target_s,
            min_s=least if self.min_s is None else self.min_s,
            max_s=most if self.max_s is None else self.max_s,
        )


def normalise(text: str, variant: Variant = "official") -> str:
    """Return a text as the model reads it, with the tag of the first speaker in front if it names none.

    The streaming variant drops all that is not ASCII, and gives nothing for a text without any.
    """
    if variant == "streaming":
        text = text.translate(_REPLACED_STREAMING)
        text = " ".join(text.encode("ascii", "ignore").decode().split())
        if not text:
            return ""
    else:
        text = text.translate(_REPLACED)
    named = text.startswith(("[", "(")) or FIRST in text or SECOND in text
    return text if named else _PREFIX + text


def tokens(text: str) -> Ints:
    """Return the tokens of a normalised text, int64 [1 + UTF-8 bytes]: 0, then its bytes."""
    return np.frombuffer(b"\0" + text.encode(), np.uint8).astype(np.int64)


def split(text: str, window_s: float, max_tokens: int, pace: Pace | None = None, variant: Variant = "official") -> list[str]:
    """Return the normalised pieces of a text, each within the tokens and, at the estimated pace, the window.

    A text that is short enough stays as it is. Every word is in one piece, in order. window_s: seconds of a generation.
    Raises PromptError for a text that has nothing to speak, is no Unicode, or has a `[tag]` longer than the tokens.
    """
    check_text(_SPEAKER.sub("", text))
    normalised = normalise(text, variant)
    if variant == "streaming":
        check_text(_SPEAKER.sub("", normalised))
    found = pieces(normalised, (pace or Pace()).within(window_s, variant), max_tokens, variant)
    if longer := [piece for piece in found if byte_length(piece) >= max_tokens]:
        raise PromptError(
            f"the text has brackets that cannot be split: {excerpt(longer[0])!r} are {byte_length(longer[0])} bytes; "
            f"the model takes {max_tokens - 1}",
            hint="shorten what is in the brackets",
        )
    return found


def pieces(text: str, pace: Pace, max_tokens: int | None, variant: Variant) -> list[str]:
    """Return the pieces of a normalised text. pace: with all seconds set. max_tokens: None has no limit."""
    assert pace.target_s is not None
    assert pace.min_s is not None
    assert pace.max_s is not None
    most_bytes = inf if max_tokens is None else max_tokens - 1
    if variant == "official" and byte_length(text) <= most_bytes and pace.estimate(text) <= pace.max_s:
        return [text]
    most_s = pace.max_s if variant == "official" else inf
    found: list[str] = []
    speaker, total = "", inf
    for tag, sentence in _spoken(text):
        for part in _cut(sentence, max(1, most_bytes - byte_length(tag) - 1), most_s, pace):
            seconds = pace.estimate(part)
            added = f" {part}" if tag == speaker else f" {tag} {part}"
            longer = total + seconds
            full = (longer > pace.target_s and total >= pace.min_s) or longer > pace.max_s
            if full or byte_length(found[-1] + added) > most_bytes:
                found.append(f"{tag} {part}")
                total = seconds
            else:
                found[-1] += added
                total = longer
            speaker = tag
    return found


def _spoken(text: str) -> Iterator[tuple[str, str]]:
    """Yield the sentences of a text, each with the tag of its speaker."""
    tag = _PREFIX.strip()
    for part in _SPEAKER.split(text):
        if _SPEAKER.fullmatch(part):
            tag = part
        else:
            yield from ((tag, sentence) for sentence in sentences(part))


def sentences(text: str) -> list[str]:
    """Return the sentences and the items of lists in a text, stripped. An item stays whole."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").strip()
    starts = [match.start() for match in _BULLET.finditer(text)]
    found, begun, end = list[str](), 0, starts[0] if starts else len(text)
    for match in _END.finditer(text, 0, end):
        if text[match.start()] != "." or _ends(text, match.start()):
            found.append(text[begun : match.end()])
            begun = match.end()
    found.append(text[begun:end])
    found += [text[a:b] for a, b in pairwise([*starts, len(text)])]
    return [stripped for sentence in found if (stripped := sentence.strip())]


def _ends(text: str, stop: int) -> bool:
    """Return whether a full stop before white space ends a sentence."""
    word = text[max(0, stop - _LOOK_BACK) : stop + 1].split()[-1]
    return not word.endswith("..") and word.lower() not in _ABBREVIATIONS


def _cut(sentence: str, most_bytes: float, most_s: float, pace: Pace) -> list[str]:
    """Return a sentence in parts that are short enough."""
    size = int(min(most_bytes, byte_length(sentence)))
    parts = split_sentences(sentence, size)
    while size > _LEAST_CUT and any(pace.estimate(part) > most_s for part in parts):
        size = size * 3 // 4
        parts = split_sentences(sentence, size)
    return parts
