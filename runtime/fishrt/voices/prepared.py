"""Prepared voices: what a model computes of a voice, in a file in the voice's folder, so that not even the first request does."""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fishrt_engines import Array

from ..arrays import Sound
from ..audio.output import write_whole

log = logging.getLogger(__name__)

_MADE_OF = "columns"


def prepared_path(folder: Path, graph: str) -> Path:
    """Return the path of a prepared voice.

    folder: the voice's, with a file for each graph that it was prepared for. graph: a hash of the graph and its weights.
    """
    return folder / f"prepared-{graph[:16]}.npz"


def write_prepared(path: Path, made_of: Sound, arrays: Mapping[str, Array]) -> None:
    """Write what was computed of codes or latents. Raises OutputError."""
    buffer = io.BytesIO()
    np.savez(buffer, **{_MADE_OF: made_of}, **arrays)  # type: ignore[arg-type]
    write_whole(path, buffer.getvalue())


def read_prepared(path: Path, made_of: Sound, wanted: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, Any] | None:
    """Return what was written for these codes or latents; None if there is nothing or, with a warning, if it does not fit.

    wanted: type and shape of each array. They can be computed again, so a damaged file, or one of another voice, is skipped.
    """
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            stored: dict[str, Any] = {name: file[name] for name in file.files}
        kept = stored.pop(_MADE_OF)
    except Exception as error:  # numpy and zipfile raise whatever a damaged file makes them raise
        log.warning("%s cannot be read (%s); the voice is read again", path, error)
        return None
    if not np.array_equal(kept, made_of) or {n: (a.dtype.name, a.shape) for n, a in stored.items()} != wanted:
        log.warning("%s was made of another state of the voice; the voice is read again", path)
        return None
    return stored
