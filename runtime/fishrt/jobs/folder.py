"""The folder of a job's results: one writer, files that are whole or not there, and two logs.

    manifest.jsonl   a line for each row that is done
    errors.jsonl     a line for each row that is not, and why

While a run works, it appends lines, in the order in which rows end; at the end both logs are written anew, in the order of the
input. Each shard of a job has logs of its own, `manifest-1-of-4.jsonl`, which a run of the whole job joins.
"""

from __future__ import annotations

import errno
import filecmp
import hashlib
import json
import os
import re
import secrets
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Self

from fishrt_engines.aside import sync

from ..errors import ArgumentError, FishrtError, OutputError

Entry = dict[str, Any]
"""A line of a manifest."""
_LOGS = re.compile(r"(?:manifest|errors)-\d+-of-\d+\.jsonl")
_SHARD = re.compile(r"(\d+)/(\d+)")


@dataclass(frozen=True, slots=True)
class Shard:
    """A part of a job: each `count`-th row. index: from 1."""

    index: int
    count: int

    @classmethod
    def of(cls, text: str) -> Self:
        """Return the shard of a text such as "1/4". Raises ArgumentError."""
        found = _SHARD.fullmatch(text)
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            raise ArgumentError(f"the shard is {text!r}", hint="give i/n, such as 1/4 for the first of four")
        return cls(int(found[1]), int(found[2]))

    def has(self, position: int) -> bool:
        """Return whether the row of a position, from 0, belongs to the shard."""
        return position % self.count == self.index - 1

    def __str__(self) -> str:
        return f"{self.index}-of-{self.count}"


@dataclass(frozen=True, slots=True)
class Made:
    """The result of a row. beside: further files by suffix, such as a transcript, which are written first."""

    data: bytes
    record: Mapping[str, Any]
    """What the manifest says of it."""
    warnings: tuple[str, ...] = ()
    beside: Mapping[str, bytes] | None = None


@dataclass(frozen=True, slots=True)
class Commit:
    """What puts the result of a row into its place. It can be sent to another process."""

    out: Path
    mark: str
    """Part of the names of unfinished files: a shard removes its own."""
    digest_of: Callable[[Path], str | None]
    """See `engine.Job`."""

    def __call__(self, target: str, digest: str, made: Made) -> Entry:
        """Write a result aside and rename it, unless its place has one of this digest. Return the file's size and time.

        Raises FishrtError if a file that is not ours has its name, OSError if it cannot be written.
        """
        path = self.out / target
        path.parent.mkdir(parents=True, exist_ok=True)
        for suffix, data in (made.beside or {}).items():
            with written_aside(path.with_suffix(suffix), self.mark) as file:
                file.write(data)

        def is_there(_: Path) -> bool:  # of another process, which was faster
            return path.exists() and owned_digest(path, target, self.digest_of) == digest

        with written_aside(path, self.mark, unless=is_there) as file:
            file.write(made.data)
        return stamp(path)


def stamp(path: Path) -> Entry:
    """Return the size and time of a file, by which its entry in a manifest is known to be true. Raises OSError."""
    found = path.stat()
    return {"bytes": found.st_size, "mtime_ns": found.st_mtime_ns}


def content_digest(path: Path) -> str:
    """Return the SHA-256 of a regular file, in hex. Raises OSError, also for a device or a pipe, which may have no end."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a regular file")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def owned_digest(path: Path, target: str, digest_of: Callable[[Path], str | None]) -> str:
    """Return the digest that a file carries. Raises FishrtError for a file that is not ours."""
    digest = digest_of(path)
    if digest is None:
        hint = "move it away, or choose another folder or another id"
        raise FishrtError(f"there is {target}, which this command did not write and does not replace", hint=hint)
    return digest


@contextmanager
def written_aside(path: Path, mark: str = "", unless: Callable[[Path], bool] = lambda aside: False) -> Iterator[BinaryIO]:
    """Open a hidden file, which is on disk and gets the name `path` at the end. unless: whether it is not needed, from its path.

    Raises OSError.
    """
    aside = path.with_name(f".{secrets.token_hex(8)}{mark}.tmp")
    try:
        with aside.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if not unless(aside):
            aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


class Folder:
    """A folder of results while it is locked."""

    def __init__(self, path: Path, shard: Shard | None) -> None:
        self.path, self._shard = path, shard
        self._mark = f".{shard}" if shard else ""
        self._logs: dict[str, BinaryIO] = {}
        self._touched: set[Path] = set()

    @classmethod
    @contextmanager
    def locked(cls, path: Path, shard: Shard | None) -> Iterator[Self]:
        """Make the folder if it is missing, lock it, and remove what killed runs left. Shards share it.

        Raises OutputError if it cannot be written, or if another run writes into it.
        """
        with ExitStack() as stack:
            with output_errors(path):
                path.mkdir(exist_ok=True)
                stack.enter_context(_lock(path / ".lock", shared=shard is not None))
                if shard:
                    stack.enter_context(_lock(path / f".lock-{shard}", shared=False))
            folder = cls(path, shard)
            folder._sweep()
            try:
                yield folder
            finally:
                for log in folder._logs.values():
                    log.close()
                folder._sweep()

    def commit(self, digest_of: Callable[[Path], str | None]) -> Commit:
        """Return what puts results into their places. digest_of: see `engine.Job`."""
        return Commit(self.path, self._mark, digest_of)

    def known(self) -> dict[str, list[Entry]]:
        """Return the lines of all manifests by id, of shards too. A torn line is left out. Raises OutputError."""
        entries: dict[str, list[Entry]] = {}
        with output_errors(self.path):
            for path in sorted(self.path.glob("manifest*.jsonl")):
                for line in path.read_bytes().splitlines():
                    with suppress(ValueError):
                        entry = json.loads(line)
                        if isinstance(entry, dict) and isinstance(entry.get("id"), str):
                            entries.setdefault(entry["id"], []).append(entry)
        return entries

    def begin(self, entries: Iterable[Entry], errors: Iterable[Entry]) -> None:
        """Write both logs anew, and open them for more lines. Raises OutputError."""
        self.rewrite(entries, errors)
        with output_errors(self.path):
            self._logs = {kind: self._log(kind).open("ab", buffering=0) for kind in ("manifest", "errors")}

    def log(self, kind: str, entry: Entry, target: str = "") -> None:
        """Append a line to "manifest" or "errors". target: the result that it tells of. Raises OutputError."""
        with output_errors(self.path):
            self._logs[kind].write(_line(entry))
        if target:
            self._touched.add((self.path / target).parent)

    def rewrite(self, entries: Iterable[Entry], errors: Iterable[Entry]) -> None:
        """Write both logs anew; what says the same stays as it is. A run of the whole job removes the logs of shards.

        Raises OutputError.
        """
        with output_errors(self.path):
            for log in self._logs.values():
                log.close()
            self._logs = {}
            for folder in self._touched:
                sync(folder)
            for kind, lines in (("manifest", entries), ("errors", errors)):
                path = self._log(kind)
                with written_aside(path, self._mark, partial(_equal, path)) as file:
                    file.writelines(map(_line, lines))
            if self._shard is None:
                for path in self.path.iterdir():
                    if _LOGS.fullmatch(path.name):
                        path.unlink()
            sync(self.path)

    def _log(self, kind: str) -> Path:
        return self.path / (f"{kind}-{self._shard}.jsonl" if self._shard else f"{kind}.jsonl")

    def _sweep(self) -> None:
        """Remove unfinished files: of all runs, or those of the shard."""
        mark = re.escape(self._mark) if self._shard else r"(?:\.\d+-of-\d+)?"
        unfinished = re.compile(rf"\.[0-9a-f]{{16}}{mark}\.tmp")
        for folder, _, names in os.walk(self.path):
            for name in names:
                if unfinished.fullmatch(name):
                    with suppress(OSError):
                        Path(folder, name).unlink()


def _equal(path: Path, aside: Path) -> bool:
    return path.exists() and filecmp.cmp(aside, path, shallow=False)


def _line(entry: Entry) -> bytes:
    return f"{json.dumps(entry, ensure_ascii=False)}\n".encode("utf-8", "surrogatepass")


@contextmanager
def _lock(path: Path, *, shared: bool) -> Iterator[None]:
    """Hold a lock, which the kernel frees however the process ends. Raises OutputError if another process holds it."""
    with path.open("a+") as file:
        if sys.platform != "win32":
            import fcntl

            try:
                fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "another process"
                raise OutputError(
                    f"{path.parent} is locked: {holder} writes into it", hint="wait for it, or give every run another folder"
                ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


@contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Raise an OSError of the block as an OutputError, which says that nothing is lost."""
    try:
        yield
    except OSError as error:
        hint = "what is done is kept: the same command goes on when this is mended"
        raise OutputError(f"cannot write into {path}: {error.strerror or error}", hint=hint) from error
