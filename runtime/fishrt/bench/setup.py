"""What measurements need: the machine, a voice and a prompt in it, engines that record calls, the weights that a run reads."""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fishrt_engines import Array, Engine, GraphSpec, State
from fishrt_engines.engine import Resident, Traits
from fishrt_engines.machine import cpu_name, default_threads, total_memory
from fishrt_engines.ort.packed import parse_model

from ..arrays import Ints
from ..bundle.folder import Bundle
from ..bundle.manifest import Manifest
from ..language_model.prompt import PromptBuilder
from ..metrics import per_second
from ..text.tokenizer import Tokenizer
from ..tts import TTS
from ..voices.store import VoiceStore
from ..voices.voice import Voice

SECONDS = 10.0
"""Seconds of speech in a made-up voice: the least that is recommended for the official models."""
TRANSCRIPT = "This is a recording of somebody who speaks for about ten seconds, and these are the words that are said in it."
_SHARE = 4
"""A made-up voice takes at most 1 / _SHARE of the longest prompt."""
SPEAKING = ("slow_ar", "fast_ar", "codec_decode")
"""Roles of the graphs that a request with a known voice needs."""
_LENGTH_OF = ("prompt", "codes", "audio")
# Bytes of an element during the computation, by ONNX's number of the type; `float_bytes` for all types that are not here.
_BYTES = {3: 1.0, 2: 1.0, 21: 0.5, 22: 0.5, 7: 8.0, 6: 4.0, 9: 1.0, 11: 8.0}
# Inputs of which a run reads a few rows only: embeddings, and the cosines and sines of positions.
_TABLES = {"Gather": (0,), "RotaryEmbedding": (1, 2)}
BUFFER_BYTES = 1 << 29
"""Much larger than any cache."""
_SWEEPS = 12
_PACKAGES = ("fishrt", "numpy", "onnxruntime", "tokenizers")


def bench_prompt(bundle: Bundle, text: str) -> Ints:
    """Return the prompt for the first piece of a text in `bench_voice`: int64 [1 + C, length]. Raises PromptError."""
    manifest, voice = bundle.manifest, bench_voice(bundle)
    lm = manifest.language_model
    prompts = PromptBuilder(Tokenizer.load(bundle.tokenizer), lm)
    heard = replace(voice, codes=voice.codes[: lm.num_codebooks])  # the codec may have more codebooks than the model
    return prompts.start([heard], None).user(prompts.split(text)[0])


def bench_voice(bundle: Bundle) -> Voice:
    """Return the bundle's default voice, or a made-up one if it has none."""
    manifest = bundle.manifest
    if manifest.voices is None:
        return made_up_voice(manifest, 0)
    return VoiceStore(bundle.path / "voices").load(manifest.voices.default)


def made_up_voice(manifest: Manifest, seed: int) -> Voice:
    """Return a voice of random codes. Voices of different seeds begin differently."""
    codec, lm = manifest.codec, manifest.language_model
    frames = max(1, min(round(SECONDS * codec.frame_rate), lm.max_prompt // _SHARE))
    # Codes that both the codec and the model's tables have.
    sizes = [min(size, lm.codebook_width - lm.code_offset) for size in codec.codebook_sizes]
    if lm.code_zero == "main":
        sizes[0] = min(sizes[0], lm.semantic_end_id - lm.semantic_begin_id + 1)
    rng = np.random.default_rng(seed)
    codes = np.stack([rng.integers(0, size, frames) for size in sizes])
    return Voice(f"bench-{seed}", codes, TRANSCRIPT, codec.fingerprint)


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

    @property
    def traits(self) -> Traits:
        """What callers may make use of."""
        return self._engine.traits

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


def bytes_read(graph: Path, float_bytes: float = 4.0) -> int:
    """Return the bytes of every constant of a graph file except tables. Only the graph is read, not its weights.

    float_bytes: size of a float during the computation; a CPU casts those of 16 bits to float32 when it loads the graph.
    """
    model = parse_model(graph)
    stored = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "Cast"}
    whole = {
        stored.get(name, name)
        for node in model.graph.node
        if node.op_type != "Cast"
        for place, name in enumerate(node.input)
        if place not in _TABLES.get(node.op_type, ())
    }
    constants = [constant for constant in model.graph.initializer if constant.name in whole]
    return int(sum(math.prod(constant.dims) * _BYTES.get(constant.data_type, float_bytes) for constant in constants))


def describe_machine() -> dict[str, Any]:
    """Return CPU, cores, memory, system and versions, without names of hosts or folders."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads_by_default": default_threads(),
        "memory_bytes": total_memory(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions,
    }


def read_bandwidth(threads: int, size: int = BUFFER_BYTES) -> float:
    """Return the bytes per second that `threads` threads read from memory together, the best of several sweeps.

    Each thread takes the maximum of its part of a float32 array, which numpy computes in vector registers and without the GIL.
    """
    parts = np.array_split(np.ones(size // 4, np.float32), threads)
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(_SWEEPS):
            begun = time.perf_counter()
            for _maximum in pool.map(np.max, parts):
                pass
            best = min(best, time.perf_counter() - begun)
    return per_second(size, best)
