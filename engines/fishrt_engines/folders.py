"""The user's folders: caches, which may be deleted at any time, and data.

A process may have no home: a numeric user id without an entry in /etc/passwd, and no HOME. Then there is no such folder.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from .errors import FishrtError

_CACHE_GB = 20.0
"""The optimised graphs of two bundles of the largest model."""


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


def cache_limit() -> int:
    """Return the bytes that optimised graphs may take together: $FISHRT_CACHE_GB, or 20 GB. 0 keeps none.

    Plans of TensorRT do not count: they are made only if asked for. Raises FishrtError for what is no size.
    """
    given = os.environ.get("FISHRT_CACHE_GB") or _CACHE_GB
    try:
        size = float(given)
    except ValueError:
        size = -1.0
    if not 0 <= size < float("inf"):
        raise FishrtError(f"FISHRT_CACHE_GB is {given!r}", hint="set it to a number of GB, such as 20, or unset it")
    return int(size * 1e9)


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
