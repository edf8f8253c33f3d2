"""The user's folders: caches, which may be deleted at any time, and data.

A process may have no home: a numeric user id without an entry in /etc/passwd, and no HOME. Then there is no such folder.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


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


def _named(variable: str) -> Path | None:
    """Return the folder that a variable of the environment names; the XDG specification has relative paths ignored."""
    folder = Path(os.environ.get(variable, ""))
    return folder if folder.is_absolute() else None


def _in_home(*parts: str) -> Path | None:
    try:
        return Path.home().joinpath(*parts)
    except RuntimeError:
        return None
