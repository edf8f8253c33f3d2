"""Bundles of the Hugging Face Hub, in its cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from ..errors import BundleError
from ..hub.download import download
from ..hub.repository import Repository
from ..progress import Progress


def bundle_folder(reference: str | Path, progress: Progress | None = None) -> Path:
    """Return the folder of the bundle `hf:OWNER/NAME[@REVISION]` in the hub's cache; download it if it is not there.

    A bundle in the cache is used without a request to the hub. A downloaded one is compared with the hashes of its manifest.
    Raises HubError if the repository cannot be downloaded, BundleError if it is no bundle.
    """
    from .folder import Bundle
    from .manifest import MANIFEST

    repository = Repository.parse(Path(reference).as_posix())
    folder = repository.cached()
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
    from .manifest import MANIFEST, Manifest

    return [*Manifest.from_json(read(MANIFEST).read_text(encoding="utf-8")).files, MANIFEST]
