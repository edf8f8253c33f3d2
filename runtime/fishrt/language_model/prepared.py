"""Prepared voices: the slow AR's keys and values of a voice on disk, so that not even the first request computes them.

There is one file for each slow AR that a voice was prepared for: `prepared-<part of the graph's hash>.npz`. It can be computed
again, so a damaged file, or one of other columns, is skipped with a warning.
"""

from __future__ import annotations

import io
import logging
from pathlib import Path

import numpy as np

from fishrt_engines import Array, GraphSpec

from ..arrays import Ints
from ..audio.output import write_whole

log = logging.getLogger(__name__)

_COLUMNS = "columns"


def prepared_path(folder: Path, graph: str) -> Path:
    """Return the path of a prepared voice. folder: the voice's. graph: a hash of the slow AR and its weights."""
    return folder / f"prepared-{graph[:16]}.npz"


def write_prepared(folder: Path, graph: str, columns: Ints, saved: dict[str, Array]) -> Path:
    """Write the result of `SlowContext.save` for `columns`; return the path. Raises OutputError."""
    path, buffer = prepared_path(folder, graph), io.BytesIO()
    np.savez(buffer, **{_COLUMNS: columns}, **saved)  # type: ignore[arg-type]
    write_whole(path, buffer.getvalue())
    return path


def read_prepared(folder: Path, graph: str, columns: Ints, spec: GraphSpec) -> dict[str, Array] | None:
    """Return the keys and values written for these columns; None if there are none or, with a warning, if they do not fit.

    spec: the slow AR's.
    """
    path = prepared_path(folder, graph)
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            stored = {name: file[name] for name in file.files}
        kept = stored.pop(_COLUMNS)
    except Exception as error:  # numpy and zipfile raise whatever a damaged file makes them raise
        log.warning("%s cannot be read (%s); the voice is read again", path, error)
        return None
    wanted = {t.name: (t.dtype, t.resolve({"batch": 1, "cache": columns.shape[1]})) for t in spec.state_tensors}
    if not np.array_equal(kept, columns) or {n: (a.dtype, a.shape) for n, a in stored.items()} != wanted:
        log.warning("%s was made of another state of the voice; the voice is read again", path)
        return None
    return stored
