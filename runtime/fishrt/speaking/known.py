"""What was said before: the codes or latents of requests that come again."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

from .job import Spoken

KNOWN_BYTES = 32_000_000
"""Most bytes of codes or latents that are kept for requests that come again: some hours of speech."""
_ENTRY_BYTES = 500
"""Bytes that an entry and each of its pieces take beside their codes, about."""


class KnownSpeech:
    """A least-recently-used cache of what requests said, of at most some bytes. Thread-safe."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._kept: OrderedDict[bytes, Sequence[Spoken]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def find(self, key: bytes) -> Sequence[Spoken]:
        """Return what was said for `Job.key`; nothing if it is unknown."""
        with self._lock:
            if key not in self._kept:
                return ()
            self._kept.move_to_end(key)
            return self._kept[key]

    def keep(self, key: bytes, said: Sequence[Spoken]) -> None:
        """Keep what was said for `Job.key`."""
        with self._lock:
            if key in self._kept:
                self._bytes -= _nbytes(self._kept.pop(key))
            self._bytes += _nbytes(said)
            self._kept[key] = said
            while self._bytes > self._most_bytes:
                _, oldest = self._kept.popitem(last=False)
                self._bytes -= _nbytes(oldest)


def _nbytes(said: Sequence[Spoken]) -> int:
    return _ENTRY_BYTES + sum(piece.sound.nbytes + _ENTRY_BYTES for piece in said)
