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
from bisect import bisect
from collections import OrderedDict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fishrt_engines import Engine, State

from ..arrays import Ints
from ..voices.prepared import read_prepared, write_prepared

log = logging.getLogger(__name__)

FIRST_FRAMES = 256
"""Frames for which the cache has room at first; it doubles when it is full, since the length of the speech is unknown."""
KEPT_BYTES = 256_000_000
"""Most bytes of keys and values that `ContextStore` keeps; the newest stays in any case. A second of a voice takes 5 MB with
S1-mini and 0.5 MB with 1.5."""
PART = 512
"""Most columns of a prompt that are read at once: others that speak meanwhile wait no longer, and activations stay small."""
LEAST_ROWS = 1024
"""Fewest rows of a cache where few sizes should be used: a long voice, a sentence, and its speech. Sizes are powers of two there,
of rows and of batches, so that requests share captured calls."""


class SlowContext:
    """The slow AR's KV caches, one for each slot, and the columns that are in them. Used by one thread at a time."""

    def __init__(self, engine: Engine, num_codebooks: int, slots: int = 1) -> None:
        self.engine = engine
        self.state = engine.new_state(batch=slots, cache=1)
        self._columns = np.zeros((slots, 1 + num_codebooks, 1), np.int64)
        self._lengths, self._most = [0] * slots, [1] * slots
        self.heads = [0] * slots
        """Columns at the front of each slot that were read by themselves; see `ContextStore`."""
        few = engine.traits.few_sizes
        self.batch_sizes = [*(1 << n for n in range((slots - 1).bit_length())), slots] if few else list(range(1, 1 + slots))
        """Sizes of the batches of `step`, ascending."""
        self._stepped = np.zeros((slots, 1 + num_codebooks, 1), np.int64)
        self._last_index = [np.zeros(n, np.int64) for n in range(1 + slots)]
        for array in self._last_index:  # constants of steps
            array.flags.writeable = False

    def length(self, slot: int = 0) -> int:
        """Return the number of columns read so far."""
        return self._lengths[slot]

    def columns(self, slot: int = 0) -> Ints:
        """Return the columns read so far, int64 [1 + num_codebooks, length]."""
        return self._columns[slot, :, : self._lengths[slot]]

    def holds(self, head: Ints, slot: int = 0) -> bool:
        """Return whether `head`, int64 [1 + num_codebooks, length], is at the front of a slot, read by itself; or is empty."""
        length = head.shape[1]
        return length in (0, self.heads[slot]) and np.array_equal(self.columns(slot)[:, :length], head)

    def reserve(self, length: int, most: int, slot: int = 0) -> None:
        """Make room for a prompt of `length` columns and some speech. The cache later grows to at most `most` rows."""
        self._most[slot] = most
        self._grow(min(length + FIRST_FRAMES, most))

    def keep(self, length: int, slot: int = 0) -> None:
        """Keep only the first columns of a slot."""
        self._lengths[slot] = length
        if length < self.heads[slot]:
            self.heads[slot] = 0

    def rewind(self, prompt: Ints, slot: int = 0) -> Ints:
        """Keep only the columns that are a prefix of `prompt` [1 + num_codebooks, T].

        Return the rest of the prompt, at least its last column: reading it gives the logits of the first frame.
        """
        common = min(self._lengths[slot], prompt.shape[1] - 1)
        differ = (self.columns(slot)[:, :common] != prompt[:, :common]).any(axis=0)
        length = int(differ.argmax()) if differ.any() else common
        self.keep(length, slot)
        return prompt[:, length:]

    def read(self, columns: Ints, resident: Collection[str] = (), slot: int = 0) -> Mapping[str, Any]:
        """Read the next columns of a slot, int64 [1 + num_codebooks, length]. Return `logits` and `hidden` [1, …] of the last.

        resident: names of the results that stay on the device; see `Engine.run`.
        """
        start, length = self._lengths[slot], columns.shape[1]
        self._make_room(start + length)
        self._columns[slot, :, start : start + length] = columns
        self._lengths[slot] += length
        feeds = {
            "prompt": np.ascontiguousarray(columns[None]),
            "position_ids": np.arange(start, start + length, dtype=np.int64)[None],
            "write_index": np.array([start]),
            "last_index": np.array([length - 1]),
        }
        return self.engine.run(feeds, self.state.row(slot), resident)

    def step(self, columns: Mapping[int, Ints], resident: Collection[str] = ()) -> Mapping[str, Any]:
        """Read one column, int64 [1 + num_codebooks, 1], for each of some slots. Return `logits` and `hidden` [b, …].

        b: the slots up to the last of these, and up to a power of two where few sizes should be used. The results of the others
        mean nothing.
        """
        count = self.batch_sizes[bisect(self.batch_sizes, max(columns))]
        self._make_room(1 + max([self._lengths[slot] for slot in columns]))
        # A slot that is left out has a place to write to behind its columns; if it is full, it gives up the last.
        last = self.state.dims["cache"] - 1
        self._lengths = [min(length, last) for length in self._lengths]
        index = np.array(self._lengths[:count])
        for slot, column in columns.items():
            self._stepped[slot] = column
            self._columns[slot, :, self._lengths[slot]] = column[:, 0]
            self._lengths[slot] += 1
        feeds = {
            "prompt": self._stepped[:count],
            "position_ids": index[:, None],
            "write_index": index,
            "last_index": self._last_index[count],
        }
        return self.engine.run(feeds, self.state.rows(count), resident)

    def save(self, slot: int = 0) -> State:
        """Return the keys and values of all columns of a slot: a state of one row and that length."""
        length = self._lengths[slot]
        saved = self.engine.new_state(batch=1, cache=length)
        saved.copy_rows(self.state.row(slot), 0, length)
        return saved

    def restore(self, columns: Ints, saved: State, slot: int = 0) -> None:
        """Take back what `save` returned, and its columns. Raises ValueError for keys and values of another graph."""
        length = columns.shape[1]
        self._grow(length)
        self.state.copy_rows(saved, slot, length)
        self._columns[slot, :, :length] = columns
        self.keep(length, slot)

    def _make_room(self, length: int) -> None:
        if length > (rows := self.state.dims["cache"]):
            self._grow(max(length, min(2 * rows, max(self._most))))

    def _grow(self, rows: int) -> None:
        if rows > self.state.dims["cache"]:
            if self.engine.traits.few_sizes:
                rows = max(rows, min(max(LEAST_ROWS, 1 << (rows - 1).bit_length()), max(self._most)))
            self.state.grow(cache=rows)
            self._columns = np.pad(self._columns, ((0, 0), (0, 0), (0, rows - self._columns.shape[2])))


class ContextStore:
    """A least-recently-used cache of the keys and values of heads of requests, of at most KEPT_BYTES. Thread-safe."""

    def __init__(self) -> None:
        self._kept: OrderedDict[bytes, tuple[State, int]] = OrderedDict()
        self._lock = threading.Lock()

    def load(self, context: SlowContext, head: Ints, slot: int = 0) -> None:
        """Let a slot hold `head`, int64 [1 + num_codebooks, length], and nothing else; it may be empty."""
        self.restore(context, head, slot)
        length = head.shape[1]
        while (start := context.length(slot)) < length:
            context.read(head[:, start : part_end(start, length, length)], slot=slot)
        if not context.holds(head, slot):
            self.keep(context, length, slot)

    def restore(self, context: SlowContext, head: Ints, slot: int = 0) -> None:
        """Let a slot hold `head` and nothing else if its keys and values are known; nothing at all otherwise."""
        length = head.shape[1]
        if context.holds(head, slot):
            context.keep(length, slot)
            return
        context.keep(0, slot)
        key = head.tobytes()
        with self._lock:
            saved = self._kept.get(key)
            if saved is not None:
                self._kept.move_to_end(key)
        log.debug("the voice of %d columns is %s", length, "read" if saved is None else "known")
        if saved is not None:
            context.restore(head, saved[0], slot)
            context.heads[slot] = length

    def keep(self, context: SlowContext, length: int, slot: int = 0) -> None:
        """Keep the keys and values of the columns of a slot: a head of this length that was read by itself."""
        context.heads[slot] = length
        # Where states cannot be parted, reading a head again is faster than a copy of hundreds of MB through the host.
        if context.engine.traits.parts_states:
            self.add(context.engine, context.columns(slot), context.save(slot))

    def add(self, engine: Engine, head: Ints, saved: State) -> None:
        """Keep the keys and values of `head`, a state of one row."""
        nbytes = sum(t.nbytes(saved.dims) for t in engine.spec.state_tensors)
        with self._lock:
            self._kept[head.tobytes()] = saved, nbytes
            while len(self._kept) > 1 and sum(nbytes for _, nbytes in self._kept.values()) > KEPT_BYTES:
                self._kept.popitem(last=False)


def part_end(start: int, head: int, length: int) -> int:
    """Return the end of the part of a prompt that is read next: at most PART columns, and not beyond the head if it is in that.

    start: columns read so far. length: of the prompt.
    """
    return min(start + PART, head if start < head else length)


def prepare(engine: Engine, head: Ints, contexts: ContextStore, path: Path | None) -> None:
    """Read a head, so that `contexts` has it. path: take it from the file there, or write the file if there is none."""
    dims = {"batch": 1, "cache": head.shape[1]}
    wanted = {t.name: (t.as_read, t.resolve(dims)) for t in engine.spec.state_tensors}
    stored = None if path is None else read_prepared(path, head, wanted)
    if stored is not None:
        state = engine.new_state(**dims)
        for name, array in stored.items():
            state.write(name, array)
        contexts.add(engine, head, state)
        return
    context = SlowContext(engine, len(head) - 1)
    contexts.load(context, head)
    if path is not None:
        saved = context.save()
        write_prepared(path, head, {name: saved.read(name) for name in wanted})
