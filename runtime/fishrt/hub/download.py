"""Downloads from the Hugging Face Hub, or from another server with its protocol ($HF_ENDPOINT): checkpoints and bundles.

`huggingface_hub` gives the token, the endpoint, the requests and the cache folder. It deletes the received part of a broken-off
file; this module keeps it, so that the next call resumes. A file gets its name when it is complete and has the hub's hash.
"""

from __future__ import annotations

import hashlib
import io
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from ..errors import HubError
from ..progress import Progress, size
from ..version import __version__
from .errors import endpoint, explained, is_unreachable
from .repository import SNAPSHOTS, Repository

if TYPE_CHECKING:
    from huggingface_hub import HfApi

log = logging.getLogger(__name__)

PARTIAL = ".partial"
"""Folder of incomplete files, inside the target folder of a download."""

Choose = Callable[[Sequence[str], Callable[[str], Path]], Sequence[str]]
"""Chooses the files to download from the names of a repository's files. The second argument fetches a small file, to read it."""


@dataclass(frozen=True, slots=True)
class _File:
    """A file of a repository, as the hub describes it."""

    name: str
    size: int | None
    sha256: str | None
    """SHA-256 of a large file (LFS); None for others."""
    git_id: str | None
    """Git's blob id: SHA-1 over a header and the content."""

    @property
    def key(self) -> str | None:
        """Name of the content in the hub's cache."""
        return self.sha256 or self.git_id

    def is_content_of(self, path: Path) -> bool:
        """Return whether the file at `path` has the hub's content."""
        if self.size is not None and path.stat().st_size != self.size:
            return False
        digest = hashlib.sha256() if self.sha256 else hashlib.sha1(b"blob %d\0" % path.stat().st_size)
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return self.key is None or digest.hexdigest() == self.key


def download(repository: Repository, choose: Choose, folder: Path | None = None, progress: Progress | None = None) -> Path:
    """Download the chosen files into `folder`, or into the hub's cache, and return their folder. Existing files are kept.

    If the hub cannot be reached, the copy in the cache is used if it is complete. The next call resumes a broken-off download.
    Raises HubError: no such repository or revision, no right to read it, no connection, a download that breaks off, a full disk,
    a file of the same name but other content in `folder`.
    """
    with explained(repository):
        try:
            commit, listing = _list(repository)
        except Exception as error:
            found = repository.cached() if folder is None and is_unreachable(error) else None
            if found is None:
                raise
            present = [path.relative_to(found).as_posix() for path in found.rglob("*") if path.is_file()]
            chosen = choose(present, lambda name: found / name)
            if lost := [name for name in chosen if name not in present]:
                raise HubError(
                    f"the copy of {repository} in the cache lacks {', '.join(lost)}", hint="connect to the network, and try again"
                ) from error
            log.warning("the hub cannot be reached: %s is read from the cache", repository)
            return found
        place = _Cache(repository, commit) if folder is None else _Folder(repository, commit, folder)
        names = choose(list(listing), lambda name: place.complete(listing[name], lambda _: None))
        if lost := [name for name in names if name not in listing]:
            raise HubError(f"{repository} lacks {', '.join(lost)}", hint="is it uploaded completely?")
        _fill(place, [listing[name] for name in names], progress or (lambda *_: None))
        place.finish()
        return place.root


def _fill(place: _Place, files: Sequence[_File], progress: Progress) -> None:
    total = sum(file.size or 0 for file in files)
    _check_room(place, files)
    before = 0
    for file in files:

        def report(there: int, name: str = file.name, before: int = before) -> None:
            there += before
            progress(f"downloading {name}, {size(there)} of {size(total)}", there / max(total, 1))

        report(0)
        place.complete(file, report)
        before += file.size or 0
        report(0, before=before)


def _check_room(place: _Place, files: Sequence[_File]) -> None:
    """Check that the rest of the files fits on the disk. Raises HubError otherwise."""
    coming = sum((file.size or 0) - place.present(file) for file in files)
    there = next(path for path in (place.root, *place.root.parents) if path.exists())
    free = shutil.disk_usage(there).free
    if coming > free:
        raise HubError(
            f"{place.repository} needs {size(coming)} more in {place.root}, and {size(free)} are free",
            hint="make room, or use another disk: name a folder there, or set HF_HOME",
        )


class _Place:
    """A target of a download."""

    def __init__(self, repository: Repository, commit: str, root: Path) -> None:
        self.repository, self.commit, self.root = repository, commit, root

    def complete(self, file: _File, report: Callable[[int], None]) -> Path:
        """Complete a file and return its path; `report` receives the number of its bytes that are there."""
        raise NotImplementedError

    def present(self, file: _File) -> int:
        """Return the number of a file's bytes that are there."""
        raise NotImplementedError

    def finish(self) -> None:
        """Clean up after all files are complete."""

    def _get(self, file: _File, partial: Path, target: Path, lock: Path, report: Callable[[int], None]) -> None:
        """Download the rest of `partial`, then rename it to `target`. Raises HubError if its hash is not the hub's."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import WeakFileLock, build_hf_headers

        for path in (partial, target, lock):
            path.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):
            if target.exists():  # another process has downloaded it meanwhile
                return
            if file.size is not None and _size(partial) > file.size:
                partial.unlink()
            with _quiet(), _Counted(io.FileIO(partial, "a+"), report) as stream:
                http_get(
                    hf_hub_url(self.repository.id, file.name, revision=self.commit),
                    stream,
                    resume_size=_size(partial),
                    headers=build_hf_headers(library_name="fishrt", library_version=__version__),
                    expected_size=file.size,
                )
            if not file.is_content_of(partial):
                partial.unlink()
                raise HubError(
                    f"{file.name} of {self.repository} came with other content than the hub announced", hint="try again"
                )
            partial.replace(target)


class _Folder(_Place):
    """A folder of the user, with the files under their own names."""

    def complete(self, file: _File, report: Callable[[int], None]) -> Path:
        """See `_Place`. Raises HubError if a file of other content has the name."""
        target = self.root.joinpath(*_parts(file.name))
        if not target.exists():
            self._get(file, self._partial(file), target, self._lock, report)
        elif not file.is_content_of(target):
            raise HubError(
                f"{target} exists, and is not the one of {self.repository}", hint="name another folder, or move the file away"
            )
        return target

    def present(self, file: _File) -> int:
        """See `_Place`."""
        return max(_size(self.root.joinpath(*_parts(file.name))), _size(self._partial(file)))

    def finish(self) -> None:
        """Remove the folder of partial files, unless some of another revision are left."""
        self._lock.unlink(missing_ok=True)
        with suppress(OSError):
            self._lock.parent.rmdir()

    @property
    def _lock(self) -> Path:
        return self.root / PARTIAL / "lock"

    def _partial(self, file: _File) -> Path:
        # Named by content: a part of another revision must not be resumed.
        return self.root / PARTIAL / (file.key or hashlib.sha256(f"{self.commit}/{file.name}".encode()).hexdigest())


class _Cache(_Place):
    """The hub's cache: contents in `blobs/`, and in `snapshots/COMMIT/` links to them by name, which huggingface_hub makes."""

    def __init__(self, repository: Repository, commit: str) -> None:
        self._storage = repository.storage
        super().__init__(repository, commit, self._storage / SNAPSHOTS / commit)

    def complete(self, file: _File, report: Callable[[int], None]) -> Path:
        """See `_Place`."""
        link = self.root.joinpath(*_parts(file.name))
        if link.exists():
            return link
        blob = self._storage / "blobs" / str(file.key)
        if file.key is not None and not blob.exists():
            lock = self._storage.parent / ".locks" / self._storage.name / f"{file.key}.lock"  # that of huggingface_hub
            self._get(file, blob.with_name(f"{blob.name}.incomplete"), blob, lock, report)
        return Path(_api().hf_hub_download(self.repository.id, file.name, revision=self.commit))

    def present(self, file: _File) -> int:
        """See `_Place`."""
        blobs = self._storage / "blobs"
        return max(_size(self.root / file.name), *(_size(blobs / f"{file.key}{end}") for end in ("", ".incomplete")))

    def finish(self) -> None:
        """Record the commit of the revision, as huggingface_hub does, so that it is found without a network."""
        ref = self._storage / "refs" / (self.repository.revision or "main")
        if self.repository.revision != self.commit:
            ref.parent.mkdir(parents=True, exist_ok=True)
            ref.write_text(self.commit, encoding="utf-8")


class _Counted(io.BufferedRandom):
    """A file that reports its size after each write."""

    def __init__(self, raw: io.FileIO, report: Callable[[int], None]) -> None:
        super().__init__(raw)
        self._report = report
        self.seek(0, io.SEEK_END)

    def write(self, data: Any) -> int:
        """Append data, and report the size of the file."""
        count = super().write(data)
        self._report(self.tell())
        return count


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _parts(name: str) -> tuple[str, ...]:
    """Return the parts of a file's name. Raises HubError for a name that leads out of its folder."""
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or not pure.parts:
        raise HubError(
            f"the repository has a file named {name!r}, which leads out of its folder", hint="do not use this repository"
        )
    return pure.parts


def _api() -> HfApi:
    from huggingface_hub import HfApi

    return HfApi(library_name="fishrt", library_version=__version__)


def _list(repository: Repository) -> tuple[str, dict[str, _File]]:
    """Return the commit of the revision, and its files by name. Raises HubError."""
    try:
        info = _api().model_info(repository.id, revision=repository.revision, files_metadata=True)
        files = [_File(f.rfilename, f.size, f.lfs.sha256 if f.lfs else None, f.blob_id) for f in info.siblings or ()]
    except (ValueError, TypeError, KeyError, AttributeError):
        raise HubError(f"{endpoint()} does not answer as a hub does", hint="is HF_ENDPOINT right?") from None
    if info.sha is None:
        raise HubError(f"{repository} has no commit yet", hint="its publisher has uploaded nothing")
    return info.sha, {file.name: file for file in files}


@contextmanager
def _quiet() -> Iterator[None]:
    """Disable huggingface_hub's progress bars inside the block."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    shown = not are_progress_bars_disabled()
    if shown:
        disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()
