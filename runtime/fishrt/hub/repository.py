"""Names of repositories on the Hugging Face Hub, and their places in its cache."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import HubError

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when huggingface_hub is imported, in the functions of this folder

PREFIX = "hf:"
"""Prefix of a repository's name where a folder is possible, too."""
SNAPSHOTS = "snapshots"
_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


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

    @property
    def storage(self) -> Path:
        """The repository's folder in the hub's cache."""
        from huggingface_hub.constants import HF_HUB_CACHE

        return Path(HF_HUB_CACHE) / f"models--{self.id.replace('/', '--')}"

    def cached(self) -> Path | None:
        """Return the folder of the revision in the hub's cache, complete or not; None if there is none."""
        revision = self.revision or "main"
        ref = self.storage / "refs" / revision
        folder = self.storage / SNAPSHOTS / (ref.read_text(encoding="utf-8").strip() if ref.is_file() else revision)
        return folder if folder.is_dir() else None

    def __str__(self) -> str:
        return f"{self.id}@{self.revision}" if self.revision else self.id


def is_reference(path: str | Path) -> bool:
    """Return whether a path is `hf:OWNER/NAME`."""
    return str(path).startswith(PREFIX)


def names_repository(path: Path) -> bool:
    """Return whether a path names a repository: `hf:…`, or OWNER/NAME if no such file or folder exists."""
    text = path.as_posix()
    return is_reference(text) or (_ID.fullmatch(text.partition("@")[0]) is not None and not path.exists())
