"""A bundle on disk: `manifest.json`, the graphs with their weights, the tokenizer, and perhaps built-in voices.

`Bundle.load` checks sizes; `verify` hashes every file.
"""

from __future__ import annotations

import hashlib
import os
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..errors import BundleError
from ..hub.repository import is_reference
from .manifest import MANIFEST, FileEntry, Manifest
from .strict import AGAIN


@dataclass(frozen=True, slots=True)
class Bundle:
    """A complete bundle.

    Attributes:
        path: its folder.
        manifest: the content of its `manifest.json`.
    """

    path: Path
    manifest: Manifest

    def __repr__(self) -> str:
        return f"<Bundle {self.manifest.summary}, {self.manifest.total_bytes / 1e6:,.1f} MB, in {self.path}>"

    @classmethod
    def load(cls, path: str | Path) -> Bundle:
        """Read the manifest of a folder, or of `hf:OWNER/NAME[@REVISION]`, which is downloaded once into the hub's cache.

        Every file must be there and have the right size. A graph or weights that the manifest does not list are an error: ONNX
        Runtime would read them. Raises BundleError, and HubError if a repository cannot be downloaded.
        """
        folder = Path(path)
        if is_reference(path):
            from .fetched import bundle_folder

            folder = bundle_folder(path)
        bundle = cls(folder, Manifest.from_json(_read_manifest(folder)))
        for name, entry in bundle.manifest.files.items():
            file = bundle.file(name)
            size = file.stat().st_size if os.path.isfile(file) else None  # noqa: PTH113  # no error for a name that no file can have
            if size != entry.bytes:
                found = "is missing" if size is None else f"has {size:,} bytes instead of {entry.bytes:,}"
                raise BundleError(f"{file} {found}", hint=AGAIN)
        graphs = [file for graph in bundle.manifest.graphs.values() for file in graph.files]
        wanted = [*filter(None, [bundle.manifest.tokenizer]), *graphs]
        if missing := [name for name in wanted if name not in bundle.manifest.files]:
            raise BundleError(f"{MANIFEST} names files that it does not list: {', '.join(missing)}", hint=AGAIN)
        weights = {f"{file}.data" for file in graphs}
        strange = [
            name
            for name in iter_file_names(folder)
            if name not in bundle.manifest.files and (name in weights or name.endswith((".onnx", ".onnx.data")))
        ]
        if strange:
            raise BundleError(
                f"{folder} holds files that its {MANIFEST} does not list: {', '.join(strange)}",
                hint="remove them, or export the checkpoint again",
            )
        return bundle

    def file(self, name: str) -> Path:
        """Return the path of a file of the bundle. Raises BundleError for a name that leads out of the folder."""
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts or not pure.parts:
            raise BundleError(f"{MANIFEST} names a file outside the bundle: {name!r}", hint=AGAIN)
        return self.path.joinpath(*pure.parts)

    @property
    def tokenizer(self) -> Path:
        """The file of a language model's tokenizer. Raises BundleError for a model of another kind, whose tokens are bytes."""
        if self.manifest.tokenizer is None:
            raise BundleError(f"{self.manifest.name} has no tokenizer: its tokens are bytes")
        return self.file(self.manifest.tokenizer)

    def verify(self, progress: Callable[[int], None] = lambda _: None) -> None:
        """Hash every file; `progress` receives the bytes of each piece. Raises BundleError that names the first altered one."""
        for name, entry in self.manifest.files.items():
            if sha256(self.file(name), progress) != entry.sha256:
                raise BundleError(f"{self.file(name)} was altered: its SHA-256 is not the one in {MANIFEST}", hint=AGAIN)
        if self.manifest != self.manifest.sealed(self.manifest.files):
            raise BundleError(f"{MANIFEST} was altered: the identities of graphs are not those of their files", hint=AGAIN)


def _read_manifest(folder: Path) -> str:
    """Return the text of the manifest. Raises BundleError with a description of a path that is no bundle."""
    path, wanted = folder / MANIFEST, "the folder that `fishrt export` wrote"
    try:
        if not folder.exists():
            raise BundleError(f"{folder} does not exist", hint=f"give {wanted}, or hf:OWNER/NAME")
        if not folder.is_dir():
            raise BundleError(f"{folder} is a file, not a bundle", hint=f"give {wanted}")
        if not path.exists():
            if (folder / "config.json").exists():
                first = f"fishrt export {shlex.quote(str(folder))} BUNDLE"
                raise BundleError(f"{folder} is a checkpoint, not a bundle", hint=f"first: {first}")
            raise BundleError(f"{folder} is not a bundle: it has no {MANIFEST}", hint=f"give {wanted}")
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}", hint="check its permissions") from None
    except UnicodeDecodeError:
        raise BundleError(f"{path} is not UTF-8", hint=AGAIN) from None


def embedded_bundle() -> Path:
    """Return the folder of the bundle that is shipped with fishrt. Raises BundleError if there is none."""
    folder = Path(__file__).resolve().parents[1] / "minnow"
    if not folder.is_dir():
        raise BundleError("this installation has no embedded voice", hint="give a bundle: the folder that `fishrt export` wrote")
    return folder


def sha256(path: Path, progress: Callable[[int], None] = lambda _: None) -> str:
    """Return the SHA-256 of a file in hex; `progress` receives the bytes of each piece that is read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            progress(len(block))
    return digest.hexdigest()


def iter_file_names(folder: Path) -> Iterator[str]:
    """Yield every file under a folder except the manifest: relative, with forward slashes, sorted."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            yield path.relative_to(folder).as_posix()


def describe_file(path: Path) -> FileEntry:
    """Return a manifest's entry for a file."""
    return FileEntry(path.stat().st_size, sha256(path))


def describe_files(folder: Path) -> Mapping[str, FileEntry]:
    """Return the `files` entry of a manifest for all files of a folder."""
    return {name: describe_file(folder / name) for name in iter_file_names(folder)}
