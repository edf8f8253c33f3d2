"""Text → pieces that are spoken one after the other. It knows speaker tags and `[tags]`, but no token and no model.

There are three ways to pieces. Speaker turns (`speaker_turns`, `pack_turns`) and, for some models, `split_punctuation` are those
of the original. `split_sentences` is ours: it cuts text that is too long at sentence ends, else at commas, else at spaces, and
makes the pieces as equal as it can, since a leftover of one word is spoken badly. Its cuts are never inside a `[tag]`, a `<|…|>`,
or a character of several code points.

Lengths are UTF-8 bytes, as the original counts them.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Iterator, Sequence

from ..bundle.features import PunctuationSplit
from ..errors import PromptError
from .scripts import full_stop

SPEAKER = re.compile(r"<\|speaker:\d+\|>")
MAX_TURNS = 5
"""Most turns in one piece, as in the original."""

_MARKUP = re.compile(r"<\|[^|<>]*\|>|\[[^\[\]]*\]")
_CLOSING = "\"'”’»)\\]」』）】》〉"
_SENTENCE_END = re.compile(
    rf"(?:(?<![.!?…‽])[.!?…‽]+[{_CLOSING}]*(?=\s|$)"  # only before white space, so that 3.14 and fish.audio stay whole
    rf"|[。！？｡．।॥؟۔]+[{_CLOSING}]*"  # scripts that put no space after a sentence
    r"|(?<=\S)[^\S\n]*\n[^\S\n]*\n)\s*"  # an empty line
)
_CLAUSE_END = re.compile(rf"(?:[,;:][{_CLOSING}]*(?=\s|$)|[，、；：،؛]+[{_CLOSING}]*|\s[—–-]+(?=\s)|—|\n)\s*")
_SPACE = re.compile(r"\s+")
_ABBREVIATION = re.compile(r"(?:\b(?:Mr|Mrs|Ms|Dr|Prof|St|Sr|Jr|Mt|vs|Nr|z\.B|e\.g|i\.e)|\b[A-Z])\.\s*\Z")
_TAG_AT_END = re.compile(rf"(?:{_MARKUP.pattern})\s*\Z")
_WRAPPING = _CLOSING.replace("\\", "") + "*_~`|"
"""Closing characters around words that are quoted or marked up."""
_SPOKEN = "%‰&@#/"
"""Characters that are read aloud, though their category is punctuation."""
_UNHEARD = ("Mn", "Mc", "Me", "Cc", "Cf", "Co", "Cn", "Zs", "Zl", "Zp", "So", "Sk", "Pe", "Pf", "Pi")
"""Categories: marks, controls and invisible characters, spaces, emoji, closing brackets and quotes."""
_JOINERS = "\u200d\ufe0e\ufe0f"


def speakable(text: str) -> bool:
    """Return whether there is a letter or digit outside speaker tags. A `[tag]` counts: `[laughing]` is heard."""
    return any(unicodedata.category(char)[0] in "LN" for char in SPEAKER.sub("", text))


def check_text(text: str) -> None:
    """Check that a text has something to speak and is Unicode. Raises PromptError otherwise."""
    check_unicode(text, "the text")
    if not speakable(text):
        why = "it has neither a letter nor a digit" if text.strip() else "it is empty"
        raise PromptError(f"there is nothing to speak in the text: {why}", hint="give some words")


def check_unicode(text: str, what: str) -> None:
    """Check that a text has no lone surrogates, which stand for bytes that are not UTF-8. Raises PromptError otherwise."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PromptError(
            f"{what} is not valid UTF-8: {error.reason} (character {error.start})", hint="give UTF-8 text"
        ) from None


def with_end(text: str) -> str:
    """Return the text with the full stop of its script, unless it ends in punctuation or a tag.

    Without one, models babble after the last word. Accents, vowel signs, invisible characters, emoji, quotes and closing brackets
    do not count: the character before them decides.
    """
    if _TAG_AT_END.search(text):
        return text
    last = next((char for char in reversed(text) if not _unheard(char)), None)
    if last is None or (unicodedata.category(last)[0] == "P" and last not in _SPOKEN):
        return text
    return text + full_stop(text)


def _unheard(char: str) -> bool:
    """Return whether a character at the end of a text does not count as its end."""
    return char in _WRAPPING or unicodedata.category(char) in _UNHEARD


def excerpt(text: str, length: int = 60) -> str:
    """Return the text on one line for a message: its first `length` characters, cut after a word if possible."""
    line = " ".join(text.split())
    if len(line) <= length:
        return line
    cut = line[: length - 1]
    return f"{cut[: cut.rfind(' ')] if ' ' in cut[length // 2 :] else cut} …"


def speaker_turns(text: str) -> list[str]:
    """Return each speaker tag with the text after it, stripped. Text before the first tag is left out."""
    starts = [match.start() for match in SPEAKER.finditer(text)]
    return [text[start:end].strip() for start, end in zip(starts, [*starts, len(text)][1:], strict=True)]


def check_speakers(text: str, transcripts: Sequence[str]) -> None:
    """Check that each speaker tag has a voice: voice i has `<|speaker:i|>` and the tags in its transcript.

    Raises PromptError otherwise.
    """
    known = {f"<|speaker:{n}|>" for n in range(len(transcripts))}.union(*map(SPEAKER.findall, transcripts))
    if unknown := [tag for tag in SPEAKER.findall(text) if tag not in known]:
        count = len(transcripts)
        raise PromptError(
            f"the text has {unknown[0]}, but there {'is 1 voice' if count == 1 else f'are {count} voices'}",
            hint="give a voice for each speaker; the first is <|speaker:0|>",
        )


def before_first_turn(text: str) -> str:
    """Return the text before the first speaker tag, stripped; all of it if there is none."""
    match = SPEAKER.search(text)
    return text[: match.start() if match else None].strip()


def pack_turns(turns: list[str], max_turns: int, max_bytes: int) -> list[str]:
    """Join turns by newlines, which are not counted, into pieces of at most `max_turns` and `max_bytes`, or one longer turn."""
    pieces: list[list[str]] = []
    size = 0
    for turn in turns:
        length = byte_length(turn)
        if not pieces or len(pieces[-1]) >= max_turns or size + length > max_bytes:
            pieces.append([])
            size = 0
        pieces[-1].append(turn)
        size += length
    return ["\n".join(piece) for piece in pieces]


def split_turn(turn: str, max_bytes: int) -> list[str]:
    """Split a turn that is too long into several, each with the turn's speaker tag."""
    match = SPEAKER.match(turn)
    tag = match.group() if match else ""
    return [tag + piece for piece in split_sentences(turn[len(tag) :], max(1, max_bytes - byte_length(tag)))]


def split_sentences(text: str, max_bytes: int) -> list[str]:
    """Split a text into pieces of at most `max_bytes`, stripped. Only longer markup exceeds it. Text that fits stays whole."""
    text = text.strip()
    if byte_length(text) <= max_bytes:
        return [text] if text else []
    fixed = [match.span() for match in _MARKUP.finditer(text)]
    units = _merge(text, _units(text, fixed, max_bytes, level=0), max_bytes)
    return [text[start:end].strip() for start, end in units]


def sentence_ends(text: str) -> list[int]:
    """Return the positions behind each whole sentence of a text that goes on. White space after a sentence belongs to it."""
    fixed = [match.span() for match in _MARKUP.finditer(text)]
    return list(_cuts(_SENTENCE_END, text + "a", fixed, 0, len(text) + 1))


Span = tuple[int, int]


def _units(text: str, fixed: list[Span], max_bytes: int, *, level: int, span: Span | None = None) -> list[Span]:
    """Return adjacent spans that fit, cut at sentence ends (level 0), else at clauses, spaces and characters (levels 1 to 3)."""
    start, end = span or (0, len(text))
    inside = [f for f in fixed if start <= f[0] and f[1] <= end]
    if level == 3:
        return list(_cut_characters(text, inside, max_bytes, start, end))
    pattern = (_SENTENCE_END, _CLAUSE_END, _SPACE)[level]
    units: list[Span] = []
    previous = start
    for cut in [*_cuts(pattern, text, inside, start, end), end]:
        unit = (previous, cut)
        previous = cut
        if byte_length(text[unit[0] : unit[1]].strip()) <= max_bytes:
            units.append(unit)
            continue
        smaller = _units(text, fixed, max_bytes, level=level + 1, span=unit)
        units += smaller if level == 2 else _merge(text, smaller, max_bytes)
    return units


def _cuts(pattern: re.Pattern[str], text: str, fixed: list[Span], start: int, end: int) -> Iterator[int]:
    """Yield the positions where a span can be cut: after each match of the pattern, except in markup and after abbreviations."""
    nth = 0
    for match in pattern.finditer(text, start, end):
        while nth < len(fixed) and fixed[nth][1] <= match.start():
            nth += 1
        in_markup = nth < len(fixed) and fixed[nth][0] < match.end() and match.start() < fixed[nth][1]
        if match.end() >= end or in_markup:
            continue
        if pattern is _SENTENCE_END and _ABBREVIATION.search(text, max(start, match.start() - 8), match.end()):
            continue
        yield match.end()


def _cut_characters(text: str, fixed: list[Span], max_bytes: int, start: int, end: int) -> Iterator[Span]:
    """Yield equal parts of a word that is too long, or of text without spaces; markup counts as one character."""
    markup = dict(fixed)
    pieces = -(-byte_length(text[start:end]) // max_bytes)
    wanted = -(-byte_length(text[start:end]) // pieces)
    size, position, begun = 0, start, start
    stop = start + len(text[start:end].rstrip())  # white space at the end belongs to the last part
    while position < stop:
        following = markup.get(position, position + 1)
        while following < stop and (_continues(text[following]) or text[following - 1] == "\u200d"):
            following += 1
        length = byte_length(text[position:following])
        if position > begun and (size + length > max_bytes or size >= wanted):
            yield begun, position
            begun, size = position, 0
        size += length
        position = following
    yield begun, end


def _continues(char: str) -> bool:
    """Return whether a character belongs to the one before it: accents, vowel signs, emoji modifiers."""
    return char in _JOINERS or unicodedata.category(char) in ("Mn", "Me", "Mc") or "\U0001f3fb" <= char <= "\U0001f3ff"


def _merge(text: str, units: list[Span], max_bytes: int) -> list[Span]:
    """Join neighbours into as few spans as fit, of lengths as equal as possible."""
    at = [0]
    for start, end in units:
        at.append(at[-1] + byte_length(text[start:end]))
    trailing = [byte_length(text[start:end]) - byte_length(text[start:end].rstrip()) for start, end in units]
    best: list[tuple[int, int, int]] = [(0, 0, 0)]  # spans used, sum of squared lengths, where the last of them begins
    for last in range(len(units)):
        options = []
        for first in range(last, -1, -1):
            size = at[last + 1] - at[first] - trailing[last]
            if size > max_bytes and first < last:
                break
            options.append((best[first][0] + 1, best[first][1] + size * size, first))
        best.append(min(options))
    merged: list[Span] = []
    last = len(units)
    while last:
        first = best[last][2]
        merged.append((units[first][0], units[last - 1][1]))
        last = first
    return merged[::-1]


def split_punctuation(text: str, rules: PunctuationSplit, max_bytes: int) -> list[str]:
    """Split a text after punctuation into pieces, stripped, of at most `max_bytes`, or one character more within a longer word.

    Neighbours are joined again as long as they fit. Abbreviations and markup may be cut, but a decimal number stays whole. Pieces
    of ASCII punctuation only are left out, so there may be none.
    """
    pieces = [text]
    for ends in filter(None, (rules.sentence_ends, rules.clause_ends, " ")):
        pieces = [part for piece in pieces for part in (_cut_after(piece, ends) if byte_length(piece) > max_bytes else [piece])]
    pieces = [part for piece in pieces for part in (_cut_bytes(piece, max_bytes) if byte_length(piece) > max_bytes else [piece])]
    joined = [""]
    for piece in pieces:
        if byte_length(joined[-1]) + byte_length(piece) > max_bytes:
            joined.append("")
        joined[-1] += piece
    return [piece.strip() for piece in joined if not all(c.isspace() or c in string.punctuation for c in piece)]


def _cut_after(text: str, ends: str) -> Iterator[str]:
    """Yield the parts of a text, cut after each of the characters `ends`, but not within a decimal number."""
    start = 0
    for match in re.finditer(rf"(?<!\d)\d+\.\d+|([{re.escape(ends)}])", text):
        if match[1]:
            yield text[start : match.end()]
            start = match.end()
    yield text[start:]


def _cut_bytes(text: str, max_bytes: int) -> Iterator[str]:
    part = ""
    for char in text:
        part += char
        if byte_length(part) >= max_bytes:
            yield part
            part = ""
    yield part


def byte_length(text: str) -> int:
    """Return the length of a text in UTF-8 bytes."""
    return len(text.encode("utf-8"))
