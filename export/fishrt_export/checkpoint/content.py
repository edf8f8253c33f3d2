"""The content of a checkpoint's files: text with or without a byte order mark, and files whose content belies their name.

The latter are git-lfs pointers, web pages, messages of a server and weights of other programs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import ExportError

DAMAGED = "the file may be incomplete; copy or download it again"

_START = 1024
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")
_POINTERS = (b"version https://git-lfs.github.com/spec/", b"version https://hawser.github.com/spec/")


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raises ExportError."""
    text = read_text(path)
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ExportError(f"{path} is not valid JSON: {error}", hint=DAMAGED) from None
    if not isinstance(data, dict):
        raise ExportError(f"{path} is not valid: it holds no JSON object", hint=DAMAGED)
    return data


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file, without its byte order mark. Raises ExportError."""
    with reading(path):
        content = path.read_bytes()
    _refuse_stand_ins(path, content)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        hint = "convert it from UTF-16 to UTF-8" if content.startswith(_UTF_16) else DAMAGED
        raise ExportError(f"{path} is not UTF-8 and cannot be read: {error.reason} at byte {error.start}", hint=hint) from None


def is_safetensors(path: Path) -> bool:
    """Return whether a file of weights is in the safetensors format; if not, it is torch's. Raises ExportError for others."""
    with reading(path), path.open("rb") as file:
        start = file.read(_START)
        size = file.seek(0, os.SEEK_END)
    # The JSON header follows its own length, 8 bytes. The first of these may be a space or "<", but as the length that 8 bytes of
    # text stand for, it would be beyond the size of any file.
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < size:
        return True
    _refuse_stand_ins(path, start)
    if line := _first_line(start):
        raise ExportError(f"{path} cannot be read: it is text, not weights: {line[:80]!r}", hint=DAMAGED)
    return start[8:9] == b"{"  # cut off


def is_gguf(path: Path) -> bool:
    """Return whether a file is in the GGUF format. Raises ExportError for a file that cannot be read."""
    with reading(path), path.open("rb") as file:
        return file.read(4) == b"GGUF"


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into an ExportError that names `path`."""
    try:
        yield
    except OSError as error:
        raise ExportError(
            f"{path} cannot be read: {error.strerror or error}", hint="check that it still exists and that you may read it"
        ) from None


def _refuse_stand_ins(path: Path, start: bytes) -> None:
    """Check that a download or a clone left the file itself. Raises ExportError for an empty file, a pointer or a web page."""
    if not start:
        raise ExportError(f"{path} cannot be read: it is empty", hint=DAMAGED)
    if start.startswith(_POINTERS):
        raise ExportError(
            f"{path} is a git-lfs pointer, not the file itself", hint="git lfs pull, or download it from the publisher"
        )
    if start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"<"):
        raise ExportError(
            f"{path} is a web page, not the file itself",
            hint="download it from the publisher; if it is behind a licence, accept the licence and log in first",
        )


def _first_line(start: bytes) -> str | None:
    """Return the first line of text, or None for binary content, such as weights."""
    try:
        text = start.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    return text.splitlines()[0] if text.replace("\n", "").replace("\r", "").replace("\t", "").isprintable() else None
