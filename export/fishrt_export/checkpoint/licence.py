"""The licence of the weights, copied from the checkpoint into the bundle."""

from __future__ import annotations

import re
from pathlib import Path

from fishrt.bundle.folder import Licence

from .content import reading
from .families import Family
from .names import tells_terms

NOTE = "WEIGHTS-LICENCE.txt"


def copy_licence(checkpoint: Path, bundle: Path, family: Family) -> Licence:
    """Copy the checkpoint's licence files (its README, if it has none) and write a note.

    The licence is the one that they name, else that of the family's published weights.
    """
    with reading(checkpoint):
        files = {p.name: p.read_bytes() for p in sorted(checkpoint.iterdir()) if tells_terms(p.name) and p.is_file()}
    readmes = [name for name in files if name.lower().startswith("readme")]
    found = [name for name in files if name not in readmes]
    copied = found or readmes
    for name in copied:
        (bundle / name).write_bytes(files[name])
    names = [stated for name in (*readmes, *found) if (stated := _licence_name(files[name], whole_file=name in found))]
    file = copied[0] if copied else None
    named = names[0] if names else f"{family.licence} (of the published {family.title}; the checkpoint names none)"
    (bundle / NOTE).write_text(
        "The weights in this folder were converted from a published checkpoint. They keep the terms of their publisher,\n"
        f"which the licence of fishrt does not change.\n\nLicence: {named}\n"
        + (f"The checkpoint's own words: {file}\n" if file else f"The terms: https://huggingface.co/{family.repository}\n"),
        encoding="utf-8",
    )
    return Licence(named, file)


def _licence_name(content: bytes, *, whole_file: bool) -> str | None:
    """Return the licence in the front matter of a README (`license_name:`, else `license:`), or a licence file's first line."""
    text = content.decode("utf-8-sig", errors="replace")
    for key in ("license_name", "license"):
        if match := re.search(rf"^{key}:[ \t]*(\S.*?)[ \t]*$", text, re.MULTILINE):
            return match[1].strip("\"'")
    lines = (line.strip("# \t") for line in text.splitlines())
    return next((line for line in lines if line), None) if whole_file else None
