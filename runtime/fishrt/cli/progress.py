"""Progress of long work on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from .streams import say

_SURE = 0.02
"""The part of the work from which on the time left is estimated."""


class Reporter:
    """One line of progress: rewritten in place on a terminal, else a new line every few seconds."""

    INTERVAL_S = 5.0

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._terminal = sys.stderr is not None and sys.stderr.isatty()
        self._begun = self._shown_at = time.monotonic()
        self._open = False

    def show(self, text: str, part: float | None = None) -> None:
        """Show the present state. part: of the whole work, 0 to 1; the line then has a bar, per cent and the time left."""
        now = time.monotonic()
        if self._quiet or (now - self._shown_at < (0.1 if self._terminal else self.INTERVAL_S)):
            return
        self._shown_at = now
        if part is not None:
            left = (now - self._begun) * (1 - part) / part if part > _SURE else None
            text = f"{bar(part)} {text}" + (f", {duration(left)} left" if left is not None else "")
        self._open = self._terminal
        say(f"\r\x1b[K{text}" if self._terminal else text, nl=not self._terminal)

    def clear(self) -> None:
        """Take the line of progress off the terminal."""
        if self._open:
            say("\r\x1b[K", nl=False)
        self._open = False

    def done(self, text: str) -> None:
        """Show a result, in place of the line of progress."""
        if not self._quiet:
            say(text)
        self._open = False


def share_of_pieces() -> Callable[[int, int, int], float | None]:
    """Return a function (piece, pieces, frames of all pieces so far) → the part of the speech that is done.

    It estimates within a piece by the mean length of those before, and so knows nothing (None) in the first.
    """
    ended = current = latest = 0

    def share(piece: int, pieces: int, frames: int) -> float | None:
        nonlocal ended, current, latest
        if piece != current:
            ended, current = latest, piece
        latest = frames
        if not ended:
            return None
        within = (frames - ended) / (ended / piece)
        return (piece + min(within, 1.0)) / pieces

    return share


def bar(part: float) -> str:
    """Return a bar for a part between 0 and 1."""
    return f"[{'#' * round(part * 20):<20}] {part:4.0%}"


def duration(seconds: float) -> str:
    """Return a duration for people: "8 s", "3 min 20 s", "2 h 5 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
