"""The error of exporting, and how it names many things."""

from collections.abc import Sequence

from fishrt_engines.errors import FishrtError


class ExportError(FishrtError):
    """A checkpoint cannot be exported: files missing or damaged, weights that do not fit, or a graph that is not the module."""


def listed(names: Sequence[str], most: int = 8) -> str:
    """Return the first names and the number of the others."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
