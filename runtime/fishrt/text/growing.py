"""A text that comes in fragments, as a language model writes it → sentences, as soon as they are whole."""

from __future__ import annotations

import re

from .split import SPEAKER, byte_length, sentence_ends

_OPEN = re.compile(r"(?:\[[^\[\]]*|<(?:\|[^|<>]*\|?)?)\Z")
"""Markup that may go on in the next fragment."""
_LONG = 1000
"""From so many characters on, sentences are looked for each time that the text has grown by a sixteenth, not at each fragment:
else the time for a text in many fragments would grow with the square of its length."""


class GrowingText:
    """A text whose end is not there yet. A sentence of a speaker's turn keeps the speaker's tag."""

    def __init__(self, least: int = 1) -> None:
        """Begin an empty text. least: UTF-8 bytes of sentences that come together, unless the text is flushed."""
        self._least, self._rest, self._speaker = least, "", ""
        self._looked = 0
        """Length of the rest when sentences were looked for."""

    def push(self, fragment: str) -> list[str]:
        """Take a fragment, and return what is whole now. A sentence is whole when white space or another one follows."""
        self._rest += fragment
        if len(self._rest) - self._looked < self._looked // 16 and self._looked >= _LONG:
            return []
        still_open = _OPEN.search(self._rest)
        found, start, previous, size = list[str](), 0, 0, 0
        for end in sentence_ends(self._rest[: still_open.start()] if still_open else self._rest):
            size, previous = size + byte_length(self._rest[previous:end]), end
            if size >= self._least and byte_length(self._rest[start:end].strip()) >= self._least:
                found.append(self._taken(self._rest[start:end]))
                start, size = end, 0
        self._rest = self._rest[start:]
        self._looked = len(self._rest)
        return found

    def flush(self) -> list[str]:
        """Return all that was pushed and not returned, as one text; nothing if that is white space."""
        rest, self._rest, self._looked = self._rest, "", 0
        return [self._taken(rest)] if rest.strip() else []

    def __len__(self) -> int:
        """Return the number of characters that were pushed and not returned."""
        return len(self._rest)

    def _taken(self, text: str) -> str:
        text = text.strip()
        if not SPEAKER.match(text):
            text = self._speaker + text
        self._speaker = next(reversed(SPEAKER.findall(text)), "")
        return text
