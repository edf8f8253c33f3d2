"""Output of commands: results on standard output, everything else on standard error."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import click

from ...audio.output import write_whole

_LOGGERS = tuple(logging.getLogger(name) for name in ("fishrt_engines", "fishrt", "fishrt_export"))


def emit(text: str) -> None:
    """Write a line of a result to standard output, unless it is closed.

    A character that its encoding lacks is written as its escape. Raises OutputError; BrokenPipeError if nobody reads.
    """
    if sys.stdout is not None:
        write_whole("-", f"{text}\n".encode(sys.stdout.encoding or "utf-8", "backslashreplace"))


def say(text: str, *, nl: bool = True) -> None:
    """Write a line to standard error; on a terminal, it replaces a line of progress. A closed standard error is no error."""
    clear = "\r\x1b[K" if nl and sys.stderr is not None and sys.stderr.isatty() else ""
    try:
        click.echo(clear + text, err=True, nl=nl)
    except OSError:
        sys.stderr = None  # otherwise Python flushes it again when it ends, and changes the exit status


@contextmanager
def logging_to(handler: logging.Handler, level: int) -> Iterator[None]:
    """Give the log records of this project to a handler inside the block."""
    before = [(logger.handlers, logger.level) for logger in _LOGGERS]
    for logger in _LOGGERS:
        logger.handlers = [handler]
        logger.setLevel(level)
    try:
        yield
    finally:
        for logger, (handlers, old) in zip(_LOGGERS, before, strict=True):
            logger.handlers = handlers
            logger.setLevel(old)
