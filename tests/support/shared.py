"""Work that is done once in a session, by whichever process of pytest-xdist needs it first: traces and exports."""

from __future__ import annotations

import hashlib
import io
import marshal
import os
import pickle
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FunctionType
from typing import Any

import onnx_ir as ir
import torch
from filelock import FileLock

import fishrt_export.graph.job
import fishrt_export.graph.trace
from fishrt_export.graph.job import GraphJob


def make_once(path: Path, make: Callable[[Path], object]) -> Path:
    """Return `path`, a file or folder. `make` writes it under another name first, so that it is never seen incomplete."""
    with FileLock(path.with_name(f".{path.name}.lock")):
        if not path.exists():
            aside = path.with_name(f".{path.name}.partial")
            shutil.rmtree(aside, ignore_errors=True)  # left by a failed test
            make(aside)
            aside.rename(path)
    return path


def share_traces(folder: Path, check: Callable[[], None]) -> None:
    """Make every GraphJob of this process take its graph from `folder`, where the same module was traced with the same spec.

    `check` runs before each trace, shared or not.
    """
    folder.mkdir(exist_ok=True)
    trace, low = fishrt_export.graph.trace.trace, fishrt_export.graph.trace._trace

    def checked(*arguments: Any) -> ir.Model:
        check()
        return low(*arguments)

    def shared(*arguments: Any) -> ir.Model:
        check()
        key = identity(arguments)
        if key is None:
            return trace(*arguments)
        return ir.load(make_once(folder / f"{key}.onnx", lambda aside: ir.save(trace(*arguments), aside)))

    fishrt_export.graph.trace._trace, fishrt_export.graph.job.trace = checked, shared


def trace_together(jobs: Sequence[GraphJob]) -> None:
    """Trace the modules of jobs, as `share_traces` keeps them. Of two processes, the second begins at the end."""
    for job in jobs[:: -1 if os.environ.get("PYTEST_XDIST_WORKER") == "gw1" else 1]:
        fishrt_export.graph.job.trace(job.build(), job.spec, job.dims)


def identity(value: object) -> str | None:
    """Return a key of what a module computes, its classes, attributes and tables, but not the values of its parameters.

    None for modules of classes inside of functions. Equal modules may have different keys: then both are traced. Modules that
    compute different things have different keys.
    """
    file = io.BytesIO()
    try:
        _Pickler(file).dump(value)
    except (pickle.PicklingError, AttributeError, TypeError):
        return None
    return hashlib.sha256(file.getvalue()).hexdigest()


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: object) -> object:
        """A function inside of a function counts by its code and by the values that it closes over."""
        if isinstance(value, FunctionType) and "<" in value.__qualname__:
            return list, (marshal.dumps(value.__code__), [cell.cell_contents for cell in value.__closure__ or ()])
        return NotImplemented

    def persistent_id(self, value: object) -> object:
        if not isinstance(value, torch.Tensor):
            return None
        kind = type(value).__name__, str(value.dtype), tuple(value.shape), str(value.device)
        if isinstance(value, torch.nn.Parameter) or value.is_meta:
            return kind
        return *kind, hashlib.sha256(value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
