"""The text of a command: its words, a file, or standard input."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from ...errors import FishrtError, PromptError


def read_text(words: tuple[str, ...], file: Path | None) -> str:
    """Return the text. Raises UsageError for two sources or none, FishrtError for a file, PromptError for what is not UTF-8."""
    if words and file is not None:
        raise click.UsageError("give TEXT or --file, not both")
    if words and words != ("-",):
        return " ".join(words)
    source = "standard input"
    if file is not None and str(file) != "-":
        source = str(file)
        try:
            data = file.read_bytes()
        except OSError as error:
            raise FishrtError(f"{file} cannot be read: {error.strerror}") from None
    else:
        if sys.stdin is None or (not words and file is None and sys.stdin.isatty()):
            raise click.UsageError("there is no text: give it as TEXT, with --file, or on standard input")
        data = sys.stdin.buffer.read()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PromptError(f"{source} is not UTF-8: {error.reason} at byte {error.start}", hint="convert it to UTF-8") from None
