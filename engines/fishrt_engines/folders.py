"""The user's folders: caches, which may be deleted at any time, and data. Writing of a cache entry.

A process may have no home: a numeric user id without an entry in /etc/passwd, and no HOME. Then there is no such folder.
"""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_ASIDE = ".aside-"
_ABANDONED_S = 24 * 3600
"""Age in seconds at which an unfinished folder counts as left by a killed process."""


def cache_folder() -> Path | None:
    """Return the folder of optimised graphs and plans: $FISHRT_CACHE, or fishrt/graphs in the system's folder for caches."""
    if own := os.environ.get("FISHRT_CACHE"):
        return Path(own)
    if sys.platform == "darwin":
        base = _in_home("Library", "Caches")
    elif sys.platform == "win32":
        base = _named("LOCALAPPDATA") or _in_home("AppData", "Local")
    else:
        base = _named("XDG_CACHE_HOME") or _in_home(".cache")
    return base and base / "fishrt" / "graphs"


def data_folder() -> Path | None:
    """Return fishrt's folder of the user's own data, by the rules of XDG on every system."""
    base = _named("XDG_DATA_HOME") or _in_home(".local", "share")
    return base and base / "fishrt"


@contextmanager
def written_aside(folder: Path) -> Iterator[Path]:
    """Yield a new folder next to `folder` to write into and to rename. If it is still there at the end, it is removed.

    Unfinished folders of killed processes, which may hold gigabytes, are removed after a day. Raises OSError.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f"{_ASIDE}*"):
        with suppress(OSError):  # another process removes it at the same time
            if time.time() - left.stat().st_mtime > _ABANDONED_S:
                shutil.rmtree(left)
    aside = folder.with_name(f"{_ASIDE}{secrets.token_hex(8)}")
    aside.mkdir()  # with the umask's permissions: one user may write an entry that another reads
    try:
        yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _named(variable: str) -> Path | None:
    """Return the folder that a variable of the environment names; the XDG specification has relative paths ignored."""
    folder = Path(os.environ.get(variable, ""))
    return folder if folder.is_absolute() else None


def _in_home(*parts: str) -> Path | None:
    try:
        return Path.home().joinpath(*parts)
    except RuntimeError:
        return None
