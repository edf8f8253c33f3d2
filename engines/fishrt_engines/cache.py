"""What is kept on disk for this machine: optimised graphs, and plans of TensorRT.

    folder of a kind / hash of the key / files, entry.json

An entry's key holds all that its files depend on, such as the graph, the CPU and the versions of libraries. An entry is written
aside and renamed when complete. A damaged one is made again. `trim` removes what has not been used for long.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from .aside import new_folder, remove_folder

log = logging.getLogger(__name__)

ENTRY = "entry.json"
_LAYOUT = 2
"""Version of the layout; part of the hash."""
_SAMPLE, _STRIDE = 4096, 1 << 20
"""When an entry is found, _SAMPLE bytes of every _STRIDE bytes are hashed: enough to notice damage, and quick."""
_NAME = re.compile("[0-9a-f]{32}")
"""Names of entries. Nothing else in their folder is removed."""
UNUSED_S = 30 * 24 * 3600.0
"""Age in seconds of the last use from which `trim` removes an entry."""
_FRESH_S = 60.0
"""An entry that was found or made so many seconds ago stays: its user may not hold it yet."""


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

    def hold(self) -> BinaryIO:
        """Return an open file: until it is closed, `trim` of any process leaves the entry. Raises OSError if the entry is gone.

        Windows renames no folder of an open file, so that there is nothing to lock.
        """
        file = (self.folder / ENTRY).open("rb")
        if sys.platform != "win32":
            import fcntl

            with suppress(OSError):  # a file system without locks: nothing can be removed from it, either
                fcntl.flock(file, fcntl.LOCK_SH)
            if not self.folder.is_dir():  # removed while this waited for the lock
                file.close()
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.folder))
        return file


def entries(folder: Path) -> list[Path]:
    """Return the folders of all entries in a folder, the one that was made or found last first."""
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
    """Return the entry of this key, which becomes the newest; None if there is none. A damaged one is removed, with a warning."""
    place = _place(folder, key)
    try:
        entry = read(place)
        with suppress(OSError):  # another user's
            _mark(place)
        found = entry.fault()
    except (OSError, ValueError) as error:
        found = f"cannot be read ({error})"
    if found is None:
        return entry
    if place.is_dir():
        discard(place, found)
    return None


def _mark(entry: Path) -> None:
    """Make an entry the one that was used last."""
    now = time.time_ns()  # finer than the time that a file system gives
    os.utime(entry / ENTRY, ns=(now, now))


def trim(folder: Path, most: int) -> None:
    """Remove the entries of a folder that nobody used for UNUSED_S, and the least recently used ones beyond `most` bytes in all.

    What a process holds, or has just found or made, stays. What is removed disappears at once, also if this is interrupted.
    """
    found = []
    for description in folder.glob(f"*/{ENTRY}"):
        if _NAME.fullmatch((entry := description.parent).name):
            with suppress(OSError):  # another process removes it at the same time
                found.append((description.stat().st_mtime_ns, sum(file.stat().st_size for file in entry.iterdir()), entry))
    total = sum(size for _, size, _ in found)
    for used_ns, size, entry in sorted(found):
        age_s = time.time() - used_ns / 1e9
        if age_s > _FRESH_S and (total > most or age_s > UNUSED_S) and _removed(entry, used_ns):
            total -= size


def _removed(entry: Path, used_ns: int) -> bool:
    """Remove an entry, unless it is held or was used after `used_ns`. Return whether it is gone."""
    try:
        if sys.platform == "win32":
            remove_folder(entry)
        else:
            import fcntl

            with (entry / ENTRY).open("r+b") as description:  # NFS locks only what is open for writing
                fcntl.flock(description, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(description.fileno()).st_mtime_ns != used_ns:
                    return False
                remove_folder(entry)
    except OSError:
        return not entry.exists()
    log.debug("removed %s, which was not used for %.1f days", entry, (time.time() - used_ns / 1e9) / 86400)
    return True


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
            _mark(aside)
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
