"""Writing of results: a file appears complete or not at all; a device, a pipe and a link stay what they are."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import BinaryIO

from fishrt_engines.aside import new_file

from ..errors import OutputError


def check_place(path: str | Path) -> None:
    """Check before long work that a binary result can be written to a file, or to standard output for "-".

    Raises OutputError for a folder, a place in a folder that is missing or not writable, and for a standard output that is closed
    or a terminal.
    """
    if str(path) == "-":
        if sys.stdout is None:
            raise OutputError("cannot write to standard output: it is closed")
        if _is_terminal():
            raise OutputError(
                "standard output is a terminal, and the result is binary", hint="redirect it into a file or a program: … > FILE"
            )
        return
    path = Path(path)
    with _output_errors(str(path)):
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


def check_folder(path: Path) -> None:
    """Check before long work that `make_folder` can make a folder and results can be written into it. Raises OutputError."""
    with _output_errors(str(path)):
        if path.exists() and not path.is_dir():
            raise OutputError(f"cannot write into {path}: it is not a folder")
        check_place(path / "a result" if path.is_dir() else path)


def make_folder(path: Path) -> None:
    """Make a folder for results, unless it exists. Its parent must exist: a mistyped path would make a tree of folders.

    Raises OutputError.
    """
    with _output_errors(str(path)):
        path.mkdir(exist_ok=True)


@contextmanager
def growing(path: str | Path) -> Iterator[tuple[BinaryIO, bool]]:
    """Open a file for a result that is written bit by bit, standard output for "-".

    Yield the file, and whether bytes written before can still be changed. A file appears under its name when the block ends
    without an error. Raises OutputError; BrokenPipeError if nobody reads.
    """
    if str(path) == "-":
        with _output_errors("to standard output"), _standard_output() as file:
            yield file, False
        return
    with _output_errors(str(path)):
        target = Path(path).resolve()  # a link stays a link
        special = _is_special(target)
    with _output_errors(str(path)), nullcontext(target) if special else new_file(target) as place, place.open("wb") as file:
        yield file, not special


@contextmanager
def _output_errors(place: str) -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(f"cannot write {place}: {error.strerror or error}") from None


@contextmanager
def _standard_output() -> Iterator[BinaryIO]:
    """Open standard output for bytes, with a separate buffer, which Python does not try to flush again when it ends."""
    if sys.stdout is None:
        raise OutputError("cannot write to standard output: it is closed")
    try:
        sys.stdout.flush()
        number = sys.stdout.fileno()
    except (AttributeError, io.UnsupportedOperation):  # an object that stands for it, in notebooks and tests
        yield sys.stdout.buffer
        return
    with os.fdopen(number, "wb", closefd=False) as file:
        yield file


def write_whole(path: str | Path, data: bytes) -> None:
    """Write a whole file, or to standard output for "-". Raises OutputError; BrokenPipeError if nobody reads the output."""
    with growing(path) as (file, _):
        file.write(data)
        file.flush()


def _is_terminal() -> bool:
    return sys.stdout.isatty()


def _is_special(path: Path) -> bool:
    """Return whether a path is a device or a pipe, which can be written to but not replaced."""
    return path.exists() and not path.is_file()
