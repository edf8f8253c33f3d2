"""Engines that record the time of each call, and a TTS that uses them."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fishrt_engines import Array, Engine, GraphSpec, State
from fishrt_engines.engine import Resident

from ..bundle.folder import Bundle
from ..tts import TTS

SPEAKING = ("slow_ar", "fast_ar", "codec_decode")
"""Roles of the graphs that a request with a known voice needs."""
_LENGTH_OF = ("prompt", "codes", "audio")


class Call(NamedTuple):
    """One run of a graph."""

    length: int
    """Columns, frames or samples that were fed."""
    seconds: float


class TimedEngine:
    """A wrapper of an engine that records every call. See `fishrt_engines.Engine`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._measured = next((t.name for t in engine.spec.feeds if t.name in _LENGTH_OF), None)
        self.calls: list[Call] = []

    @property
    def spec(self) -> GraphSpec:
        """The graph's contract."""
        return self._engine.spec

    @property
    def provider(self) -> str:
        """The execution provider in use."""
        return self._engine.provider

    def new_state(self, **dims: int) -> State:
        """Return a state of zeros."""
        return self._engine.new_state(**dims)

    def run(
        self, feeds: Mapping[str, Array | Resident], state: State | None = None, resident: Collection[str] = ()
    ) -> dict[str, Any]:
        """Run the graph once and record the call."""
        begun = time.perf_counter()
        results = self._engine.run(feeds, state, resident)
        seconds = time.perf_counter() - begun
        self.calls.append(Call(feeds[self._measured].shape[-1] if self._measured else 1, seconds))
        return results

    def take(self) -> list[Call]:
        """Return the calls since the last `take`."""
        taken, self.calls = self.calls, []
        return taken


def open_timed(bundle: Bundle | Path | None, *, provider: str, threads: int | None) -> tuple[TTS, dict[str, TimedEngine]]:
    """Return a TTS as `TTS.load` does, with all graphs open, and its engines by role."""
    tts = TTS.load(bundle, provider=provider, threads=threads)
    engines = {role: TimedEngine(tts.engines[role]) for role in tts.bundle.manifest.graphs}
    return TTS(tts.bundle, engines), engines
