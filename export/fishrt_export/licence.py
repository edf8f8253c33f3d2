"""The terms of the weights: what the checkpoint says of them, carried into the bundle."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from fishrt.bundle import Licence

UNKNOWN = "unknown: see the publisher of the checkpoint"
NOTE = "WEIGHTS-LICENCE.txt"


def copy_licence(checkpoint: Path, bundle: Path) -> Licence:
    """Copies the checkpoint's licence files (its README, if it has none) and writes a note. The note names what is known."""
    files = sorted(path for path in checkpoint.iterdir() if path.is_file())
    found = [path for path in files if path.name.lower().startswith(("license", "licence"))]
    readmes = [path for path in files if path.name.lower().startswith("readme")]
    for path in found or readmes:
        shutil.copyfile(path, bundle / path.name)
    names = [name for path in (*readmes, *found) if (name := _licence_name(path, whole_file=path in found))]
    licence = Licence(names[0] if names else UNKNOWN, (found or readmes)[0].name if found or readmes else None)
    terms = f"They are in {licence.file}." if licence.file else "The checkpoint came with no licence file: ask its publisher."
    (bundle / NOTE).write_text(
        "The weights in this folder were converted from a published checkpoint. They keep the terms of their publisher,\n"
        f"which the licence of fishrt does not change. {terms}\n\nLicence named by the checkpoint: {licence.name}\n",
        encoding="utf-8",
    )
    return licence


def _licence_name(path: Path, *, whole_file: bool) -> str | None:
    """From the front matter of a README (`license_name:`, else `license:`), or the first line of a licence file."""
    text = path.read_text(encoding="utf-8", errors="replace")
    for key in ("license_name", "license"):
        if match := re.search(rf"^{key}:[ \t]*(\S.*?)[ \t]*$", text, re.MULTILINE):
            return match[1].strip("\"'")
    lines = (line.strip("# \t") for line in text.splitlines())
    return next((line for line in lines if line), None) if whole_file else None
