"""The terms of the weights: what the checkpoint says of them, carried into the bundle."""

from __future__ import annotations

import re
from pathlib import Path

from fishrt.bundle import Licence

from .content import reading

UNKNOWN = "unknown: see the publisher of the checkpoint"
NOTE = "WEIGHTS-LICENCE.txt"


def copy_licence(checkpoint: Path, bundle: Path) -> Licence:
    """Copies the checkpoint's licence files (its README, if it has none) and writes a note. The note names what is known."""
    with reading(checkpoint):
        files = {path.name: path.read_bytes() for path in sorted(checkpoint.iterdir()) if _may_tell(path)}
    readmes = [name for name in files if name.lower().startswith("readme")]
    found = [name for name in files if name not in readmes]
    copied = found or readmes
    for name in copied:
        (bundle / name).write_bytes(files[name])
    names = [stated for name in (*readmes, *found) if (stated := _licence_name(files[name], whole_file=name in found))]
    licence = Licence(names[0] if names else UNKNOWN, copied[0] if copied else None)
    where = f"They are in {licence.file}." if licence.file else "The checkpoint came with no licence file: ask its publisher."
    (bundle / NOTE).write_text(
        "The weights in this folder were converted from a published checkpoint. They keep the terms of their publisher,\n"
        f"which the licence of fishrt does not change. {where}\n\nLicence named by the checkpoint: {licence.name}\n",
        encoding="utf-8",
    )
    return licence


def _may_tell(path: Path) -> bool:
    return path.name.lower().startswith(("license", "licence", "readme")) and path.is_file()


def _licence_name(content: bytes, *, whole_file: bool) -> str | None:
    """From the front matter of a README (`license_name:`, else `license:`), or the first line of a licence file."""
    text = content.decode("utf-8-sig", errors="replace")
    for key in ("license_name", "license"):
        if match := re.search(rf"^{key}:[ \t]*(\S.*?)[ \t]*$", text, re.MULTILINE):
            return match[1].strip("\"'")
    lines = (line.strip("# \t") for line in text.splitlines())
    return next((line for line in lines if line), None) if whole_file else None
