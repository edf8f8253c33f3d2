"""Where the results of rows lie: names that every file system takes, in folders that are not too full."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Collection
from hashlib import blake2b
from pathlib import Path

MOST_FILES = 10_000
"""Most files of a folder."""
_PLAIN = re.compile(r"[a-z0-9][a-z0-9_-]{0,99}")
_RESERVED = re.compile(r"con|prn|aux|nul|com\d|lpt\d")
"""Names of devices on Windows."""
_FILLED = 2_000_000
"""Files that 256 folders hold: 7,800 each, and none above MOST_FILES, since their number varies by some hundreds."""


def file_name(id: str) -> str:
    """Return a name for the file of an id: the id if it is plain, else its letters with 12 hex digits of its digest."""
    if _PLAIN.fullmatch(id) and not _RESERVED.fullmatch(id):
        return id
    ascii_id = unicodedata.normalize("NFKD", id).encode("ascii", "ignore").decode().lower()
    slug = re.sub(r"[^a-z0-9_]+", "-", ascii_id).strip("-")[:80]
    return f"{slug}-{_hash(id, 6)}".lstrip("-_")


def places(folder: Path, names: Collection[str]) -> dict[str, str]:
    """Return for each file name of a job its path in `folder`, with "/": where it is already, else where it belongs.

    Up to MOST_FILES files lie in the folder itself. Of more, each new one lies in one of 256 folders, or of 4,096, by the digest
    of its name: inserted rows move no other. All shards of a job find the same places.
    """
    there = {name: f"{inner}/{name}" for inner in _names(folder, files=False) for name in _names(folder / inner, files=True)}
    there |= {name: name for name in _names(folder, files=True)}
    count = len(there.keys() | names)
    digits = 0 if count <= MOST_FILES else 2 if count <= _FILLED else 3
    return {name: there.get(name) or (f"{_hash(name, 2)[:digits]}/{name}" if digits else name) for name in names}


def _names(folder: Path, *, files: bool) -> list[str]:
    """Return the names of the files in a folder that may be missing, or those of its folders."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return [entry.name for entry in entries if entry.is_file() == files]


def _hash(text: str, size: int) -> str:
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=size).hexdigest()
