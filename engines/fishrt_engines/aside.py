"""Results that appear complete or not at all: they are written next to their place under a hidden name, and then renamed."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_HIDDEN = re.compile(r"\.fishrt-[0-9a-f]{16}(?:-(.+))?")
"""Hidden names; the group is the name of a folder that is being replaced."""
_ABANDONED_S = 24 * 3600
"""Age in seconds at which an unfinished folder counts as left by a killed process."""


@contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """Yield a path next to `target` for a file. At the end it gets the name `target`; after an error it is removed.

    Raises OSError.
    """
    aside = _hidden(target)
    try:
        yield aside
        aside.replace(target)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def new_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a new folder next to `target`. At the end it gets the name `target`; after an error it is removed.

    replace: whether it takes the place of a folder; otherwise a folder there that is not empty is an error, and stays.

    Unfinished folders of killed processes, which may hold gigabytes, are removed after a day, but none whose place is empty: a
    process that is killed between the two renamings leaves the replaced folder as `.fishrt-…-NAME`. Raises OSError.
    """
    _remove_abandoned(target.parent)
    aside = _hidden(target)
    old = target.with_name(f"{aside.name}-{target.name}")
    aside.mkdir()  # with the umask's permissions: one user may write a cache that another reads
    try:
        yield aside
        if replace and target.exists():
            target.rename(old)
        aside.rename(target)
    except BaseException:
        if old.exists():
            old.rename(target)
        raise
    finally:
        for left in (aside, old):
            shutil.rmtree(left, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Remove a folder whose whole content disappears at once, also after a power failure. Raises OSError."""
    old = _hidden(folder)
    folder.rename(old)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, would survive a power failure. Raises OSError."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _hidden(target: Path) -> Path:
    return target.with_name(f".fishrt-{secrets.token_hex(8)}")


def _remove_abandoned(folder: Path) -> None:
    for left in folder.glob(".fishrt-*"):
        with suppress(OSError):  # another process removes it at the same time
            found = _HIDDEN.fullmatch(left.name)
            if found is None or (found[1] and not (folder / found[1]).exists()):
                continue
            if left.is_dir() and time.time() - left.stat().st_mtime > _ABANDONED_S:
                shutil.rmtree(left)
