"""The error of exporting."""

from fishrt_engines.errors import FishrtError


class ExportError(FishrtError):
    """A checkpoint cannot be exported: files missing or damaged, weights that do not fit, or a graph that is not the module."""
