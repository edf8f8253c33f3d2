"""Progress of long work on standard error."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable

import click

from .streams import say

_SURE = 0.1
"""Part of the work after which the time left is estimated."""
_STILL = 3.0
"""Seconds after which the line shows how long the stage has taken."""


class Reporter:
    """One line of progress: rewritten in place on a terminal, else a new line every few seconds.

    During a long stage, a thread repeats the line with the time that the stage has taken.
    """

    INTERVAL_S = 5.0
    STILL_S = 15.0
    """Seconds between two lines about a stage without progress."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._terminal = sys.stderr is not None and sys.stderr.isatty()
        self._shown_at = time.monotonic()
        self._open = False
        self._text, self._since = "", self._shown_at
        self._part: float | None = None
        self._first: tuple[float, float] | None = None
        self._ends: float | None = None
        self._lock = threading.Lock()
        self._ticker: threading.Thread | None = None
        self._closed = threading.Event()
        if context := click.get_current_context(silent=True):
            context.call_on_close(self.clear)  # before an error is printed

    def show(self, text: str, part: float | None = None) -> None:
        """Show the current stage. part: of the whole work, 0 to 1; the line then has a bar, per cent and the time left."""
        if self._quiet:
            return
        now = time.monotonic()
        with self._lock:
            if text != self._text:
                self._text, self._since = text, now
            if part is not None and part != self._part:
                self._part, self._first = part, self._first or (now, part)
                begun, start = self._first  # some of the work may have been done earlier
                if part - start > _SURE:
                    self._ends = now + (now - begun) * (1 - part) / (part - start)
            if now - self._shown_at >= (0.1 if self._terminal else self.INTERVAL_S):
                self._draw(now)
            if self._ticker is None:
                self._ticker = threading.Thread(target=self._tick, daemon=True)
                self._ticker.start()

    def _tick(self) -> None:
        while not self._closed.wait(1.0):
            with self._lock:
                now = time.monotonic()
                if not self._closed.is_set() and now - self._shown_at >= (1.0 if self._terminal else self.STILL_S):
                    self._draw(now)

    def _draw(self, now: float) -> None:
        self._shown_at = now
        text = self._text
        if now - self._since >= _STILL:
            text += f", for {duration(now - self._since)}"
        if self._part is not None:
            text = f"{bar(self._part)} {text}"
            if self._ends is not None and self._ends > now:
                text += f", about {duration(self._ends - now)} left"
        self._open = self._terminal
        say(f"\r\x1b[K{text}" if self._terminal else text, nl=not self._terminal)

    def clear(self) -> None:
        """End the progress, and take its line off the terminal."""
        self._closed.set()
        with self._lock:
            if self._open:
                say("\r\x1b[K", nl=False)
            self._open = False

    def done(self, text: str) -> None:
        """End the progress, and show a result instead of its line."""
        self.clear()
        if not self._quiet:
            say(text)


def share_of_pieces() -> Callable[[int, int, int], float | None]:
    """Return a function (piece, pieces, frames of all pieces so far) → the part of the speech that is done.

    Within a piece, it estimates from the mean length of the pieces before; in the first piece, it returns None.
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
    """Return a duration as text: "8 s", "3 min 20 s", "2 h 5 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
