"""Downloads from the Hugging Face Hub, or from another server with its protocol ($HF_ENDPOINT): checkpoints and bundles.

`huggingface_hub` gives the token, the endpoint, the requests and the cache folder. It deletes the received part of a broken-off
file; this module keeps it, so that the next call resumes. A file gets its name when it is complete and has the hub's hash.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from ..errors import BundleError, FishrtError, HubError
from ..version import __version__

if TYPE_CHECKING:
    from huggingface_hub import HfApi

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when huggingface_hub is imported, in the functions below

log = logging.getLogger(__name__)

PREFIX = "hf:"
"""Prefix of a repository's name where a folder is possible, too."""
SNAPSHOTS = "snapshots"
PARTIAL = ".partial"
"""Folder of incomplete files, inside the target folder of a download."""
_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_ERRNO = re.compile(r"\[Errno -?\d+\] ")
_LOGIN = "hf auth login, or set HF_TOKEN to a token of https://huggingface.co/settings/tokens"

Progress = Callable[[str, int, int], None]
"""Progress callback: the name of the current file, the bytes received of all files, and their total."""
Choose = Callable[[Sequence[str], Callable[[str], Path]], Sequence[str]]
"""Chooses the files to download from the names of a repository's files. The second argument fetches a small file, to read it."""


@dataclass(frozen=True, slots=True)
class Repository:
    """A model repository of the hub."""

    id: str
    """OWNER/NAME."""
    revision: str | None = None
    """Branch, tag or commit. None: the default branch."""

    @classmethod
    def parse(cls, text: str, revision: str | None = None) -> Repository:
        """Parse OWNER/NAME or OWNER/NAME@REVISION, with or without the prefix `hf:`. Raises HubError."""
        name, at, own = text.removeprefix(PREFIX).partition("@")
        if not _ID.fullmatch(name) or (at and not own):
            raise HubError(f"{text!r} does not name a repository", hint="write OWNER/NAME, or OWNER/NAME@REVISION")
        if own and revision and own != revision:
            raise HubError(f"{text} and --revision {revision} name two revisions", hint="give one of them")
        return cls(name, own or revision)

    def __str__(self) -> str:
        return f"{self.id}@{self.revision}" if self.revision else self.id


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


def is_reference(path: str | Path) -> bool:
    """Return whether a path is `hf:OWNER/NAME`."""
    return str(path).startswith(PREFIX)


def names_repository(path: Path) -> bool:
    """Return whether a path names a repository: `hf:…`, or OWNER/NAME if no such file or folder exists."""
    text = path.as_posix()
    return is_reference(text) or (_ID.fullmatch(text.partition("@")[0]) is not None and not path.exists())


def bundle_folder(reference: str | Path, progress: Progress | None = None) -> Path:
    """Return the folder of the bundle `hf:OWNER/NAME[@REVISION]` in the hub's cache; download it if it is not there.

    A bundle in the cache is used without a request to the hub. A downloaded one is compared with the hashes of its manifest.
    Raises HubError if the repository cannot be downloaded, BundleError if it is no bundle.
    """
    from .folder import MANIFEST, Bundle

    repository = Repository.parse(Path(reference).as_posix())
    folder = _cached(repository)
    if folder is not None and (folder / MANIFEST).exists():
        with suppress(BundleError):  # not all of it was downloaded
            return Bundle.load(folder).path

    def choose(names: Sequence[str], read: Callable[[str], Path]) -> Sequence[str]:
        if MANIFEST not in names:
            raise BundleError(
                f"{repository} is not a bundle: it has no {MANIFEST}",
                hint=f"a checkpoint? First: fishrt export {repository} BUNDLE",
            )
        return choose_bundle(names, read)

    folder = download(repository, choose, progress=progress)
    Bundle.load(folder).verify()
    return folder


def choose_bundle(names: Sequence[str], read: Callable[[str], Path]) -> Sequence[str]:
    """Return the files of a bundle: its manifest, which must be there, and those that it lists. Raises BundleError."""
    from .folder import MANIFEST, Manifest

    return [*Manifest.from_json(read(MANIFEST).read_text(encoding="utf-8")).files, MANIFEST]


def download(repository: Repository, choose: Choose, folder: Path | None = None, progress: Progress | None = None) -> Path:
    """Download the chosen files into `folder`, or into the hub's cache, and return their folder. Existing files are kept.

    If the hub cannot be reached, the copy in the cache is used if it is complete. The next call resumes a broken-off download.
    Raises HubError: no such repository or revision, no right to read it, no connection, a download that breaks off, a full disk,
    a file of the same name but other content in `folder`.
    """
    with _explained(repository):
        try:
            commit, listing = _list(repository)
        except Exception as error:
            found = _cached(repository) if folder is None and _is_unreachable(error) else None
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
            progress(name, before + there, total)

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
            f"{place.repository} needs {_amount(coming)} more in {place.root}, and {_amount(free)} are free",
            hint="make room, or use another disk: name a folder there, or set HF_HOME",
        )


def _amount(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


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
        self._storage = _storage(repository)
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


def _storage(repository: Repository) -> Path:
    """Return the repository's folder in the hub's cache."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE) / f"models--{repository.id.replace('/', '--')}"


def _api() -> HfApi:
    from huggingface_hub import HfApi

    return HfApi(library_name="fishrt", library_version=__version__)


def _list(repository: Repository) -> tuple[str, dict[str, _File]]:
    """Return the commit of the revision, and its files by name. Raises HubError."""
    try:
        info = _api().model_info(repository.id, revision=repository.revision, files_metadata=True)
        files = [_File(f.rfilename, f.size, f.lfs.sha256 if f.lfs else None, f.blob_id) for f in info.siblings or ()]
    except (ValueError, TypeError, KeyError, AttributeError):
        raise HubError(f"{_endpoint()} does not answer as a hub does", hint="is HF_ENDPOINT right?") from None
    if info.sha is None:
        raise HubError(f"{repository} has no commit yet", hint="its publisher has uploaded nothing")
    return info.sha, {file.name: file for file in files}


def _cached(repository: Repository) -> Path | None:
    """Return the folder of the revision in the hub's cache, complete or not; None if there is none."""
    storage, revision = _storage(repository), repository.revision or "main"
    ref = storage / "refs" / revision
    folder = storage / SNAPSHOTS / (ref.read_text(encoding="utf-8").strip() if ref.is_file() else revision)
    return folder if folder.is_dir() else None


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


def _endpoint() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT


def _is_unreachable(error: Exception) -> bool:
    """Return whether no hub answered: no network, offline mode, or a hub that is down."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code >= 500
    return isinstance(error, OfflineModeIsEnabled | HfHubHTTPError.__bases__[0])  # the base of all errors of its HTTP client


@contextmanager
def _explained(repository: Repository) -> Iterator[None]:
    """Turn the errors of huggingface_hub, of its HTTP client and of the disk into HubError."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except FishrtError:
        raise
    except Exception as error:
        cause: BaseException = error
        if isinstance(cause, LocalEntryNotFoundError) and cause.__cause__:
            cause = cause.__cause__  # the reason why hf_hub_download could not ask the hub
        endpoint = _endpoint()
        match cause:
            case GatedRepoError():
                said = f"{repository.id} is gated: its publisher asks you to accept terms before you download it"
                hint = f"accept the terms at {endpoint}/{repository.id}; then: {_LOGIN}"
            case RepositoryNotFoundError():
                said = f"{endpoint} has no repository {repository.id}, or it is private and your token may not read it"
                hint = f"check the spelling; for a private one: {_LOGIN}; a folder is given as ./{repository.id}"
            case RevisionNotFoundError():
                said, hint = f"{repository.id} has no revision {repository.revision}", f"see {endpoint}/{repository.id}/tree/main"
            case HfHubHTTPError(response=response) if response.status_code in (401, 403):
                said, hint = f"{endpoint} refuses your token, or your token may not read {repository.id}", _LOGIN
            case HfHubHTTPError(response=response):
                said, hint = f"{endpoint} answers with HTTP status {response.status_code}", "try again later"
            case OfflineModeIsEnabled():
                said = f"{repository} is not in the cache {_storage(repository).parent}, and HF_HUB_OFFLINE is set"
                hint = "unset HF_HUB_OFFLINE to download it"
            case Exception() if _is_unreachable(cause) or (isinstance(cause, OSError) and cause.errno is None):
                said = f"{endpoint} cannot be reached, or the connection broke off: {_ERRNO.sub('', str(cause))}"
                hint = (
                    "the same command goes on where the download ended; behind a proxy set HTTPS_PROXY, for a mirror HF_ENDPOINT"
                )
            case OSError():
                said, hint = (
                    f"{cause.filename or 'a file'} cannot be written: {cause.strerror}",
                    "the same command resumes the download",
                )
            case _:
                raise
        raise HubError(said, hint=hint) from error
