"""What is kept on disk for this machine: optimised graphs, and plans of TensorRT.

    folder of a kind / hash of the key / files, entry.json

An entry's key holds all that its files depend on, such as the graph, the CPU and the versions of libraries. An entry is written
aside and renamed when complete. A damaged one is made again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .aside import new_folder

log = logging.getLogger(__name__)

ENTRY = "entry.json"
_LAYOUT = 2
"""Version of the layout; part of the hash."""
_SAMPLE, _STRIDE = 4096, 1 << 20
"""When an entry is found, _SAMPLE bytes of every _STRIDE bytes are hashed: enough to notice damage, and quick."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A folder of the store, and its description."""

    folder: Path
    key: Any
    """All that the files depend on, in JSON's types."""
    facts: Any
    """What a reader of the files must know, in JSON's types."""
    digests: Mapping[str, list[int | str]]
    """The size and a hash of samples of each file, by name."""

    def fault(self) -> str | None:
        """Return what is wrong with the files; None if nothing is."""
        for name, recorded in self.digests.items():
            if not (self.folder / name).is_file():
                return f"lacks {name}"
            if digest(self.folder / name) != recorded:
                return "was altered or is not whole"
        return None


def entries(folder: Path) -> list[Path]:
    """Return the folders of all entries in a folder, the one that was made or marked last first."""
    described = folder.glob(f"[!.]*/{ENTRY}")
    return [entry.parent for entry in sorted(described, key=lambda entry: entry.stat().st_mtime_ns, reverse=True)]


def read(folder: Path) -> Entry:
    """Return the entry in its folder, whose files are not looked at. Raises OSError or ValueError for a damaged description."""
    content = json.loads((folder / ENTRY).read_text(encoding="utf-8"))
    try:
        entry = Entry(folder, content["key"], content["facts"], dict(content["digests"]))
    except (KeyError, TypeError):
        raise ValueError("its description is incomplete") from None
    if _place(folder.parent, entry.key) != folder:
        raise ValueError("its description was altered")
    return entry


def find(folder: Path, key: Any) -> Entry | None:
    """Return the entry of this key; None if there is none. A damaged one is removed, with a warning."""
    place = _place(folder, key)
    if not place.is_dir():
        return None
    try:
        entry = read(place)
        found = entry.fault()
    except (OSError, ValueError) as error:
        found = f"cannot be read ({error})"
    if found is None:
        return entry
    discard(place, found)
    return None


def mark(entry: Path) -> None:
    """Make an entry the newest."""
    now = time.time_ns()  # finer than the time that a file system gives
    os.utime(entry / ENTRY, ns=(now, now))


def discard(entry: Path, why: str) -> None:
    """Remove an entry that cannot be used."""
    log.warning("what is kept in %s %s; it is made again", entry, why)
    shutil.rmtree(entry, ignore_errors=True)


def keep(folder: Path, key: Any, write: Callable[[Path], Any]) -> Entry:
    """Make the entry of this key, or return the same one of a process that was faster. Raises OSError if it cannot be written.

    write: writes its files into a folder, and returns its facts.
    """
    place = _place(folder, key)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with new_folder(place) as aside:
            facts = write(aside)
            digests = {file.name: digest(file) for file in sorted(aside.iterdir())}
            content = {"key": key, "facts": facts, "digests": digests}
            (aside / ENTRY).write_text(json.dumps(content, indent=1), encoding="utf-8")
            mark(aside)
    except OSError:
        if (entry := find(folder, key)) is None:
            raise
        return entry
    return Entry(place, key, facts, digests)


def _place(folder: Path, key: Any) -> Path:
    return folder / hashlib.sha256(json.dumps([_LAYOUT, key], sort_keys=True).encode()).hexdigest()[:32]


def digest(path: Path) -> list[int | str]:
    """Return the size of a file and a hash of samples of it."""
    size = path.stat().st_size
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        for start in range(0, size, _STRIDE):
            file.seek(start)
            digest.update(file.read(_SAMPLE))
        file.seek(max(size - _SAMPLE, 0))
        digest.update(file.read(_SAMPLE))
    return [size, digest.hexdigest()]
