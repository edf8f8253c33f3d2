"""What long work reports: callbacks with the part that is done, and sizes as text."""

from collections.abc import Callable

Progress = Callable[[str, float], None]
"""Receives the name of the current stage and the completed part of the whole work, 0..1."""
PartDone = Callable[[float], None]
"""Receives the completed part of one stage, 0..1."""


def size(count: float) -> str:
    """Return a number of bytes as text: "812 B", "1.4 GB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
