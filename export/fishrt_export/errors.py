"""The error class of export, and the form of lists in its messages."""

from collections.abc import Sequence

from fishrt_engines.errors import FishrtError


class ExportError(FishrtError):
    """A checkpoint cannot be exported: a file is missing or damaged, weights do not fit, or a graph differs from its module."""


def listed(names: Sequence[str], most: int = 8) -> str:
    """Return the first `most` names, separated by commas, and the number of the others."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
