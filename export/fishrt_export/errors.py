"""The error class of export, the form of lists in its messages, and the check of names."""

from collections.abc import Collection, Sequence

from fishrt_engines.errors import FishrtError


class ExportError(FishrtError):
    """A checkpoint cannot be exported: a file is missing or damaged, weights do not fit, or a graph differs from its module."""


def listed(names: Sequence[str], most: int = 8) -> str:
    """Return the first `most` names, separated by commas, and the number of the others."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def check_known(what: str, names: Collection[str], known: Collection[str]) -> None:
    """Check that all `names` are among `known`; `what` says what they name. Raises ExportError for the first that is not."""
    if unknown := [name for name in names if name not in known]:
        raise ExportError(f"unknown {what} {unknown[0]!r}", hint=f"choose one of: {', '.join(known)}")
