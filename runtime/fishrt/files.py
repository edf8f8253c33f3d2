"""Writing results: a file appears complete or not at all, and what is no file (a device, a pipe, a link) stays what it is."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from .errors import OutputError


def check_place(path: Path) -> None:
    """To be called before long work. Raises OutputError for a folder, or a place in a folder that is missing or not writable."""
    if path.is_dir():
        raise OutputError(f"cannot write {path}: it is a folder")
    folder = path.resolve().parent
    if not folder.is_dir():
        raise OutputError(f"cannot write {path}: there is no folder {folder}", hint="create the folder first")
    if _is_special(path):
        if not os.access(path, os.W_OK):
            raise OutputError(f"cannot write {path}: it cannot be written")
    elif not os.access(folder, os.W_OK):
        raise OutputError(f"cannot write {path}: the folder {folder} cannot be written")


@contextmanager
def growing(path: str | Path) -> Iterator[tuple[BinaryIO, bool]]:
    """Opens a result that is written bit by bit, standard output for "-"; and whether what was written can still be changed.

    A file appears under its name when the block ends without an error. Raises OutputError; BrokenPipeError if nobody reads.
    """
    if str(path) == "-":
        if sys.stdout is None:
            raise OutputError("cannot write to standard output: it is closed")
        yield sys.stdout.buffer, False
        return
    target = Path(path).resolve()  # a link stays a link
    special = _is_special(target)
    aside = target if special else target.with_name(f".{secrets.token_hex(8)}.part")
    try:
        try:
            with aside.open("wb") as file:
                yield file, not special
            if not special:
                aside.replace(target)
        finally:
            if not special:
                aside.unlink(missing_ok=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from None


def write_whole(path: str | Path, data: bytes) -> None:
    """Writes a whole file, or to standard output for "-". Raises OutputError; BrokenPipeError if nobody reads the output."""
    with growing(path) as (file, _):
        file.write(data)
        file.flush()


def _is_special(path: Path) -> bool:
    """A device or a pipe: it can be written to, but not replaced."""
    return path.exists() and not path.is_file()
