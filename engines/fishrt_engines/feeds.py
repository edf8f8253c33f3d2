"""Checks of the arrays of a call against the description of its graph, the same for every engine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from .spec import GraphSpec


def check_feeds(spec: GraphSpec, feeds: Mapping[str, Any], known: Mapping[str, int]) -> dict[str, int]:
    """Return the size of every symbolic dimension of the feeds and the state. Raises ValueError for feeds that do not fit.

    feeds: arrays, or other objects with `dtype` and `shape`. known: sizes of the state's dimensions.
    """
    wanted = [t.name for t in spec.feeds]
    if feeds.keys() != set(wanted):
        raise ValueError(f"feeds are {names(feeds)}; {spec.file} needs {names(wanted)}")
    dims = dict(known)
    for t in spec.feeds:
        array = feeds[t.name]
        if not hasattr(array, "shape") or array.dtype != t.dtype:
            raise ValueError(f"{t.name} is {getattr(array, 'dtype', type(array).__name__)}; {spec.file} needs {t.dtype}")
        fits = len(array.shape) == len(t.shape) and 0 not in array.shape
        if fits:
            sizes = zip(t.shape, array.shape, strict=True)
            fits = all((d if isinstance(d, int) else dims.setdefault(d, size)) == size for d, size in sizes)
        if not fits:
            where = ", ".join(f"{name} = {size}" for name, size in dims.items())
            shape = ", ".join(str(d) for d in t.shape)
            raise ValueError(f"{t.name} has shape {list(array.shape)}; {spec.file} needs [{shape}] with {where or 'sizes > 0'}")
    return dims


def is_constant(feed: object) -> bool:
    """Return whether a feed never changes, so that a device needs it once: a read-only array that owns its memory."""
    return isinstance(feed, np.ndarray) and feed.base is None and not feed.flags.writeable


def check_state_dims(spec: GraphSpec, dims: Mapping[str, int]) -> None:
    """Check that `dims` names the dimensions of the state tensors, each at least 1. Raises ValueError otherwise."""
    wanted = {d for t in spec.state_tensors for d in t.shape if isinstance(d, str)}
    if dims.keys() != wanted:
        raise ValueError(f"state dimensions are {names(dims)}; {spec.file} needs {names(wanted)}")
    if small := [f"{name} = {size}" for name, size in dims.items() if size < 1]:
        raise ValueError(f"state dimensions must be at least 1: {', '.join(small)}")


def check_growth(now: Mapping[str, int], dims: Mapping[str, int]) -> None:
    """Check that state dimensions are known and do not shrink. Raises ValueError otherwise."""
    if bad := [f"{name} = {size}" for name, size in dims.items() if size < now.get(name, size + 1)]:
        raise ValueError(f"state dimensions cannot become {', '.join(bad)}; they are {dict(now)}")


def check_written(tensor_name: str, dtype: str, shape: tuple[int, ...], array: Any) -> None:
    """Check that an array fits into a state tensor. Raises ValueError otherwise."""
    if array.dtype != dtype or array.ndim != len(shape) or any(a > b for a, b in zip(array.shape, shape, strict=True)):
        raise ValueError(f"{tensor_name} is {dtype} {list(shape)}; {array.dtype} {list(array.shape)} does not fit into it")


def names(of: Iterable[str]) -> str:
    """Return names as one text for messages."""
    return ", ".join(sorted(of)) or "none"
