"""The user's folders: for caches, which may be deleted at any time, and for data; and how an entry of a cache is written.

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
"""Age from which on a folder that is being written is one of a process that was killed."""


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
    """Yield a new folder beside `folder` to write into and to rename. If it is still there at the end, it is removed.

    Gigabytes may be left by processes that were killed: folders of that kind are removed a day later. Raises OSError.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f"{_ASIDE}*"):
        with suppress(OSError):  # another process removes it, too
            if time.time() - left.stat().st_mtime > _ABANDONED_S:
                shutil.rmtree(left)
    aside = folder.with_name(f"{_ASIDE}{secrets.token_hex(8)}")
    aside.mkdir()  # readable for all whom the umask lets: an entry may be made by one user and read by another
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
