"""The place of a new bundle: checked before long work, and taken when the bundle is complete."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fishrt.audio.output import check_place
from fishrt_engines.aside import new_folder

from .errors import ExportError


def check_out(out: Path) -> None:
    """Check that `out` is an empty folder, or new in a folder that can be written. Raises ExportError, OutputError."""
    if not out.exists():
        check_place(out)
    elif not out.is_dir() or any(out.iterdir()):
        what = "is not empty" if out.is_dir() else "is a file"
        raise ExportError(f"{out} exists and {what}", hint="name a folder that does not exist yet")
    check_replaceable(out)


def check_replaceable(folder: Path) -> None:
    """Check that a folder may be renamed, which the place of a file system may not. Raises ExportError."""
    if folder.resolve().is_mount():
        raise ExportError(
            f"{folder} is a mount point, which cannot be replaced by another folder",
            hint=f"mount the folder around it, or use a folder in it, such as {folder / 'bundle'}",
        )


@contextmanager
def written_aside(out: Path) -> Iterator[Path]:
    """Yield a new folder, which becomes `out`, a new or an empty one, if the block succeeds. Raises ExportError for OSErrors."""
    out = out.resolve()  # a link stays, and its target is written
    try:
        with _terminable(), new_folder(out) as aside:
            yield aside
            if out.exists():
                out.rmdir()
    except OSError as error:
        raise ExportError(f"{out} cannot be written: {error}", hint="check the free space and your permissions") from error


@contextmanager
def _terminable() -> Iterator[None]:
    """Make SIGTERM end the block with SystemExit, so that it cleans up. A program's own handler of the signal is kept."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def leave(number: int, _frame: object) -> None:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
