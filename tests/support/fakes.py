"""Engines made of Python functions, and models made of such engines: the loop and everything above it run without a graph.

A fake checks its feeds as strictly as a real engine, so that a test with fakes also checks the calls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fishrt.bundle.features import Codec, LanguageModel
from fishrt.bundle.folder import Bundle
from fishrt.language_model.batch import DualAR
from fishrt.voices.voice import Voice
from fishrt_engines import Array, GraphSpec, StatePair, TensorSpec
from fishrt_engines.engine import Traits
from helpers_text import bundle_folder, described, manifest

HIDDEN = 3
PEAK = np.float32(50)
"""A logit so far above the others (0) that it is always drawn."""


class FakeState:
    """State tensors, and for each row a `memory` for the engine's function."""

    def __init__(self, spec: GraphSpec, dims: Mapping[str, int]) -> None:
        self.dims = dict(dims)
        self._tensors = spec.state_tensors
        self.arrays = {t.name: np.zeros(t.resolve(dims), t.dtype) for t in self._tensors}
        self.memory: list[dict[str, Any]] = [{} for _ in range(self.dims.get("batch", 1))]

    def read(self, name: str) -> Array:
        return self.arrays[name].copy()

    def write(self, name: str, array: Array) -> None:
        self.arrays[name][tuple(slice(n) for n in array.shape)] = array

    def grow(self, **dims: int) -> None:
        self.dims.update(dims)
        for t in self._tensors:
            new = np.zeros(t.resolve(self.dims), t.dtype)
            new[tuple(slice(n) for n in self.arrays[t.name].shape)] = self.arrays[t.name]
            self.arrays[t.name] = new

    def row(self, n: int) -> FakeState:
        return self._part(slice(n, n + 1))

    def rows(self, count: int) -> FakeState:
        return self._part(slice(count))

    def copy_rows(self, source: FakeState, row: int, length: int) -> None:
        if source._tensors != self._tensors:
            raise ValueError("a state of another graph")
        for name, array in self.arrays.items():
            array[row, :, :length] = source.arrays[name][0, :, :length]
        self.memory[row].clear()
        self.memory[row].update(source.memory[0])

    def _part(self, rows: slice) -> FakeState:
        part = object.__new__(FakeState)
        part.memory = self.memory[rows]
        assert part.memory
        part.dims, part._tensors = {**self.dims, "batch": len(part.memory)}, self._tensors
        part.arrays = {name: array[rows] for name, array in self.arrays.items()}
        return part


class FakeEngine:
    """An engine whose results are `function(feeds, state)`. `calls` and `states` record the calls."""

    def __init__(self, spec: GraphSpec, function: Callable[[Mapping[str, Array], Any], dict[str, Array]]) -> None:
        self.spec = spec
        self.provider, self.traits = "fake", Traits()
        self.calls: list[dict[str, Array]] = []
        self.states: list[FakeState] = []
        self._function = function

    def new_state(self, **dims: int) -> FakeState:
        assert dims.keys() == {d for t in self.spec.state_tensors for d in t.shape if isinstance(d, str)}
        self.states.append(FakeState(self.spec, dims))
        return self.states[-1]

    def run(self, feeds: Mapping[str, Array], state: Any = None, resident: Any = ()) -> dict[str, Array]:
        assert (state is not None) == bool(self.spec.states)
        dims = dict(state.dims) if state is not None else {}
        check_fit(self.spec.feeds, feeds, dims)
        self.calls.append({name: array.copy() for name, array in feeds.items()})
        results = self._function(feeds, state)
        check_fit(self.spec.results, results, dims)
        return results


def check_fit(specs: Sequence[TensorSpec], arrays: Mapping[str, Array], dims: dict[str, int]) -> None:
    assert arrays.keys() == {t.name for t in specs}
    for t in specs:
        array = arrays[t.name]
        assert array.dtype == t.dtype, t.name
        assert len(array.shape) == len(t.shape), t.name
        assert all(
            (d if isinstance(d, int) else dims.setdefault(d, n)) == n for d, n in zip(t.shape, array.shape, strict=True)
        ), t.name


def specs(lm: LanguageModel, codec: Codec) -> dict[str, GraphSpec]:
    """Return the descriptions of a bundle's four graphs, with one attention layer each."""
    head = lm.vocab_size if lm.head == "full" else 2 + lm.semantic_end_id - lm.semantic_begin_id
    rows = len(codec.codebook_sizes)

    def caches(length: int | str, suffix: str) -> list[TensorSpec]:
        return [TensorSpec(f"{kind}_cache{suffix}.0", "float32", ("batch", 1, length, 2)) for kind in ("key", "value")]

    states = tuple(StatePair(f"{kind}_cache.0", f"{kind}_cache_out.0") for kind in ("key", "value"))

    def autoregressive(file: str, inputs: list[TensorSpec], outputs: list[TensorSpec], length: int | str) -> GraphSpec:
        return GraphSpec(file, (*inputs, *caches(length, "")), (*outputs, *caches(length, "_out")), states)

    positions = [TensorSpec("position_ids", "int64", ("batch", "length")), TensorSpec("write_index", "int64", ("batch",))]
    hidden = TensorSpec("hidden", "float32", ("batch", HIDDEN))
    return {
        "slow_ar": autoregressive(
            "slow_ar.onnx",
            [
                TensorSpec("prompt", "int64", ("batch", 1 + lm.num_codebooks, "length")),
                *positions,
                TensorSpec("last_index", "int64", ("batch",)),
            ],
            [TensorSpec("logits", "float32", ("batch", head)), hidden],
            "cache",
        ),
        "fast_ar": autoregressive(
            "fast_ar.onnx",
            [hidden, TensorSpec("codes", "int64", ("batch", "length")), *positions],
            [TensorSpec("logits", "float32", ("batch", lm.codebook_width))],
            lm.num_codebooks,
        ),
        "codec_encode": GraphSpec(
            "codec_encode.onnx",
            (TensorSpec("audio", "float32", ("batch", 1, "samples")),),
            (TensorSpec("codes", "int64", ("batch", rows, "frames")),),
        ),
        "codec_decode": GraphSpec(
            "codec_decode.onnx",
            (TensorSpec("codes", "int64", ("batch", rows, "frames")),),
            (TensorSpec("audio", "float32", ("batch", 1, "samples")),),
        ),
    }


def fake_engines(lm: LanguageModel, codec: Codec, main_tokens: Sequence[int] | None = None) -> dict[str, FakeEngine]:
    """Return a model that speaks: frame i of every generation has the main token main_tokens[i] (the end token after the last),
    and the codes of `expected_codes`. Without `main_tokens` everything is equally likely.

    The codec's frame t is `sum of codes / 1000`, and encoding gives the codes `frame number + row`.
    """
    from fishrt.language_model.sampling import audio_ids

    ids = audio_ids(lm)

    def slow(feeds: Mapping[str, Array], state: FakeState) -> dict[str, Array]:
        batch, _, length = feeds["prompt"].shape
        logits = np.zeros((batch, feeds_width("slow_ar")), np.float32)
        hidden = np.zeros((batch, HIDDEN), np.float32)
        for n, memory in enumerate(state.memory):
            start = int(feeds["write_index"][n])
            assert start <= memory.get("next", 0), "all columns before are in the cache"
            assert feeds["position_ids"][n].tolist() == list(range(start, start + length))
            assert feeds["last_index"][n] == length - 1
            assert start + length <= state.dims["cache"]
            memory["next"] = start + length
            if length > 1:  # a prompt, or the part of it that is not in the cache
                memory["first"] = memory["next"]
            if main_tokens is not None:
                frame = memory["next"] - memory.get("first", 1)
                main = main_tokens[frame] if frame < len(main_tokens) else lm.end_id
                logits[n, main if lm.head == "full" else int(np.searchsorted(ids, main))] = PEAK
                hidden[n] = main
        return {"logits": logits, "hidden": hidden}

    def fast(feeds: Mapping[str, Array], state: FakeState) -> dict[str, Array]:
        logits = np.zeros((len(feeds["codes"]), lm.codebook_width), np.float32)
        for n, memory in enumerate(state.memory):
            codes, position = feeds["codes"][n].tolist(), int(feeds["position_ids"][n, -1])
            start = int(feeds["write_index"][n])
            assert feeds["position_ids"][n].tolist() == list(range(start, start + len(codes)))
            assert start == (0 if start == 0 else memory["next"])
            memory["next"] = start + len(codes)
            if start == 0:
                memory["main"] = int(feeds["hidden"][n, 0])
            if main_tokens is not None:
                logits[n, next_code(lm, memory["main"], codes[-1], position)] = PEAK
        return {"logits": logits}

    def encode(feeds: Mapping[str, Array], state: None) -> dict[str, Array]:
        frames, rest = divmod(feeds["audio"].shape[2], codec.hop)
        assert rest == 0
        rows = len(codec.codebook_sizes)
        codes = np.arange(frames)[None] + np.arange(rows)[:, None]
        return {"codes": (codes % np.array(codec.codebook_sizes)[:, None])[None].astype(np.int64)}

    def decode(feeds: Mapping[str, Array], state: None) -> dict[str, Array]:
        sums = np.where(feeds["codes"] < 0, 0, feeds["codes"]).sum(axis=1) / 1000
        return {"audio": np.repeat(sums, codec.hop, axis=1)[:, None].astype(np.float32)}

    graphs = specs(lm, codec)

    def feeds_width(role: str) -> int:
        return int(graphs[role].outputs[0].shape[1])

    functions: dict[str, Any] = {"slow_ar": slow, "fast_ar": fast, "codec_encode": encode, "codec_decode": decode}
    return {role: FakeEngine(graphs[role], function) for role, function in functions.items()}


def fake_dual_ar(lm: LanguageModel, main_tokens: Sequence[int] | None = None) -> DualAR:
    """Return a dual-AR model of FakeEngines."""
    engines = fake_engines(lm, manifest().codec, main_tokens)
    return DualAR(engines["slow_ar"], engines["fast_ar"], lm)


def next_code(lm: LanguageModel, main: int, previous: int, position: int) -> int:
    """Return the code that the fake fast AR draws at a position, from its feeds there and at position 0; never padding."""
    return lm.code_offset + (7 * main + 3 * previous + position) % (lm.fast_candidates - lm.code_offset)


def expected_codes(lm: LanguageModel, main: int) -> list[int]:
    """Return the frame that the fake model draws for a main token."""
    first = min(max(main - lm.semantic_begin_id, 0), lm.codebook_width - 1)
    drawn = [first if lm.code_zero == "main" else next_code(lm, main, 0, 0)]
    while len(drawn) < lm.num_codebooks:
        drawn.append(next_code(lm, main, drawn[-1], len(drawn)))
    return [code - lm.code_offset for code in drawn]


def fake_bundle(folder: Path, voices: Sequence[Voice] = (), **changes: Any) -> Bundle:
    """Write a bundle that loads, with descriptions of all four graphs but no graph that runs. changes: of the manifest."""
    plain = manifest(**changes)
    return bundle_folder(folder, voices=voices, **{"graphs": described(specs(plain.model, plain.codec)), **changes})
