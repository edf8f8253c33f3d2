"""The keys and values of voices, which depend on nothing else: the last ones used are kept, and those of a file can be read."""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path

from ..arrays import Floats
from ..voices.prepared import read_prepared, write_prepared
from .generate import Denoiser, KeysValues

KEPT_BYTES = 256_000_000
"""Most bytes of keys and values that are kept; the newest stay in any case. A second of a voice may take 2 MB."""


class VoiceKeys:
    """A least-recently-used cache of the keys and values of voices, of at most KEPT_BYTES. Thread-safe."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser = denoiser
        self._kept: OrderedDict[bytes, KeysValues] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, latents: Floats) -> KeysValues:
        """Return the keys and values of a voice, latents float32 [frames, channels]: those that are kept, or new ones."""
        key = latents.tobytes()
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        found = self.denoiser.voice(latents)
        self._keep(key, found)
        return found

    def prepare(self, latents: Floats, path: Path | None) -> None:
        """Keep the keys and values of a voice. path: take them from the file there, or write the file if there is none."""
        model = self.denoiser.model
        shape = (1, model.layers, model.heads, len(latents) // model.patch, model.head_dim)
        stored = None if path is None else read_prepared(path, latents, dict.fromkeys(("keys", "values"), ("float32", shape)))
        if stored is not None:
            self._keep(latents.tobytes(), KeysValues.of(stored["keys"], stored["values"]))
            return
        found = self.of(latents)
        if path is not None:
            write_prepared(path, latents, {"keys": found.keys, "values": found.values})

    def _keep(self, key: bytes, found: KeysValues) -> None:
        with self._lock:
            self._kept[key] = found
            while len(self._kept) > 1 and sum(kept.nbytes for kept in self._kept.values()) > KEPT_BYTES:
                self._kept.popitem(last=False)
