"""The slow AR's context: the columns that it has read, with their keys and values, which need not be computed again.

    request with a voice   │ system text and voice │ text │ speech …
                           └─ kept for the next ───┘
    next piece of text     │ system text and voice │ text │ speech │ text │ speech …
                           └─ read already ────────────────────────┘

Keys and values of a column depend on it and the columns before it and, by rounding, on how many were read at once. System text
and voice are always read by themselves, so that a request gives the same codes whether its voice is cached or not.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from fishrt_engines import Array, Engine

from ..arrays import Ints

log = logging.getLogger(__name__)

FIRST_FRAMES = 256
"""Frames for which the cache has room at first; it doubles when it is full, since the length of the speech is unknown."""
KEPT_BYTES = 256_000_000
"""Most bytes of keys and values that `ContextStore` keeps; the newest stays in any case. A second of a voice takes 5 MB with
S1-mini and 0.5 MB with 1.5."""
LEAST_ROWS = 512
"""Fewest rows of a cache on a CUDA device. Sizes are powers of two there, so that requests share the captured CUDA graphs."""
_LAST_OF_ONE = np.zeros(1, np.int64)
_LAST_OF_ONE.flags.writeable = False
"""`last_index` of a step."""
READ_AGAIN = ("cuda", "tensorrt")
"""Providers that read a known voice again: by calculation, that is faster than a copy of hundreds of MB through the host."""


class SlowContext:
    """The slow AR's KV cache and the columns that are in it. Used by one generation at a time."""

    def __init__(self, engine: Engine, num_codebooks: int) -> None:
        self._engine = engine
        self._state = engine.new_state(batch=1, cache=1)
        self._columns = np.zeros((1 + num_codebooks, 1), np.int64)
        self._positions = np.arange(1, dtype=np.int64)
        self._write_index = np.zeros(1, np.int64)
        self._length = 0
        self._most = 1

    @property
    def columns(self) -> Ints:
        """The columns read so far, int64 [1 + num_codebooks, length]."""
        return self._columns[:, : self._length]

    def reserve(self, length: int, most: int) -> None:
        """Make room for a prompt of `length` columns and some speech. The cache later grows to at most `most` rows."""
        self._most = most
        self._grow(min(length + FIRST_FRAMES, most))

    def rewind(self, prompt: Ints) -> Ints:
        """Keep only the columns that are a prefix of `prompt` [1 + num_codebooks, T].

        Return the rest of the prompt, at least its last column: reading it gives the logits of the first frame.
        """
        common = min(self._length, prompt.shape[1] - 1)
        differ = (self.columns[:, :common] != prompt[:, :common]).any(axis=0)
        self._length = int(differ.argmax()) if differ.any() else common
        return prompt[:, self._length :]

    def read(self, columns: Ints, resident: Collection[str] = ()) -> Mapping[str, Any]:
        """Read the next columns, int64 [1 + num_codebooks, at least 1]. Return `logits` and `hidden` of the last.

        resident: names of the results that stay on the device; see `Engine.run`.
        """
        start, length = self._length, columns.shape[1]
        if start + length > (rows := self._state.dims["cache"]):
            self._grow(max(start + length, min(2 * rows, self._most)))
        self._columns[:, start : start + length] = columns
        self._length += length
        self._write_index[0] = start
        feeds = {
            "prompt": np.ascontiguousarray(columns[None]),
            "position_ids": self._positions[None, start : start + length],
            "write_index": self._write_index,
            "last_index": _LAST_OF_ONE if length == 1 else np.array([length - 1]),
        }
        return self._engine.run(feeds, self._state, resident)

    def save(self) -> dict[str, Array]:
        """Return keys and values of all columns, by the names of the graph's inputs: arrays [1, heads, length, head_dim]."""
        return {t.name: self._state.read(t.name)[:, :, : self._length].copy() for t in self._engine.spec.state_tensors}

    def restore(self, columns: Ints, saved: Mapping[str, Array]) -> None:
        """Take back what `save` returned, and its columns. Raises ValueError for keys and values of another graph."""
        if saved.keys() != {t.name for t in self._engine.spec.state_tensors}:
            raise ValueError("the keys and values are not those of this graph")
        self._grow(columns.shape[1])
        for name, array in saved.items():
            self._state.write(name, array)
        self._columns[:, : columns.shape[1]] = columns
        self._length = columns.shape[1]

    def _grow(self, rows: int) -> None:
        if rows > self._state.dims["cache"]:
            if self._engine.provider == "cuda":
                rows = max(rows, min(max(LEAST_ROWS, 1 << (rows - 1).bit_length()), self._most))
            self._state.grow(cache=rows)
            self._columns = np.pad(self._columns, ((0, 0), (0, rows - self._columns.shape[1])))
            self._positions = np.arange(rows, dtype=np.int64)


class ContextStore:
    """A least-recently-used cache of the keys and values of heads of requests, of at most KEPT_BYTES. Thread-safe."""

    def __init__(self) -> None:
        self._kept: OrderedDict[bytes, dict[str, Array]] = OrderedDict()
        self._lock = threading.Lock()

    def context(self, engine: Engine, head: Ints) -> SlowContext:
        """Return a new context that has read `head`, int64 [1 + num_codebooks, length], which may be empty."""
        context = SlowContext(engine, head.shape[0] - 1)
        if not head.shape[1]:
            return context
        context.reserve(head.shape[1], head.shape[1] + FIRST_FRAMES)
        if engine.provider in READ_AGAIN:
            context.read(head)
            return context
        key = head.tobytes()
        with self._lock:
            saved = self._kept.get(key)
            if saved is not None:
                self._kept.move_to_end(key)
        log.debug("the voice of %d columns is %s", head.shape[1], "read" if saved is None else "known")
        if saved is not None:
            context.restore(head, saved)
        else:
            context.read(head)
            self.add(head, context.save())
        return context

    def add(self, head: Ints, saved: dict[str, Array]) -> None:
        """Keep the keys and values of `head`."""
        with self._lock:
            self._kept[head.tobytes()] = saved
            while len(self._kept) > 1 and sum(map(_bytes, self._kept.values())) > KEPT_BYTES:
                self._kept.popitem(last=False)


def _bytes(saved: Mapping[str, Array]) -> int:
    return sum(array.nbytes for array in saved.values())
