"""Measurements of the language model: its loop frame by frame, its prefill, and its steps at growing contexts.

They take any engines, so that the same loop can measure others.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from fishrt_engines import Engine

from ..arrays import Ints
from ..bundle.features import LanguageModel
from ..bundle.folder import Bundle
from ..errors import FishrtError
from ..language_model.batch import Batch, DualAR, Row
from ..language_model.generate import generate
from ..language_model.sampling import Sampling, SeededNoise
from ..metrics import Summary, per_second
from .setup import TimedEngine, bench_prompt

CONTEXTS = (128, 256, 512, 1024, 2048, 4096)
"""Positions before the measured step."""
PREFILL = 256
"""Columns of the measured prefill."""
REPEATS = 5
_TRIES = 20
"""Most generations: a model may end before the requested number of frames."""


def measure_frames(bundle: Bundle, engines: Mapping[str, TimedEngine], text: str, frames: int) -> dict[str, Any]:
    """Measure the steps of at least `frames` frames, or fewer if the model ends, and the share of the loop in a frame's time.

    The first piece of `text` is spoken in a known voice; the prefill's frame and the first generation do not count.
    Raises FishrtError if the model ends at once with every seed.
    """
    manifest = bundle.manifest
    slow, fast = engines["slow_ar"], engines["fast_ar"]
    model = DualAR(slow, fast, manifest.language_model)
    prompt = bench_prompt(bundle, text)
    sampling = Sampling().resolve(manifest.language_model.sampling)
    spent: list[float] = []
    loops: list[float] = []
    slow_steps: list[float] = []
    fast_steps: list[float] = []
    for seed in range(_TRIES):
        row = Row(model.language_model, prompt, sampling, SeededNoise(seed), max_columns=frames + 1)
        generation = generate(Batch(model), row)
        next(generation, None)  # the prefill's frame
        slow.take(), fast.take()
        begun = time.perf_counter()
        for _ in generation:
            seconds = time.perf_counter() - begun
            slow_calls, fast_calls = slow.take(), fast.take()
            if seed:  # the first generation warms up
                spent.append(seconds)
                loops.append(seconds - sum(call.seconds for call in slow_calls + fast_calls))
                slow_steps += [call.seconds for call in slow_calls]
                fast_steps += [call.seconds for call in fast_calls]
            begun = time.perf_counter()
        if len(spent) >= frames:
            break
    if not spent:
        raise _ended()
    frame, loop, slow_step, fast_step = (Summary.of(times) for times in (spent, loops, slow_steps, fast_steps))
    per_frame = len(fast_steps) / len(spent)
    return {
        "frame": asdict(frame),
        "slow_step": asdict(slow_step),
        "fast_step": asdict(fast_step),
        "fast_steps_per_frame": round(per_frame, 2),
        "loop": {**asdict(loop), "share": round(loop.median_s / frame.median_s, 4)},
        "frames_per_s": round(per_second(len(spent), sum(spent)), 2),
        "prompt_columns": prompt.shape[1],
    }


def measure_batches(
    bundle: Bundle, engines: Mapping[str, Engine], text: str, frames: int, sizes: Sequence[int]
) -> list[dict[str, Any]]:
    """Measure the steps of batches of these sizes, about `frames` each, while all rows speak. A row that ends is replaced.

    Raises FishrtError if the model ends at once with every seed.
    """
    lm, prompt = bundle.manifest.language_model, bench_prompt(bundle, text)
    model = DualAR(engines["slow_ar"], engines["fast_ar"], lm)
    sampling, found = Sampling().resolve(lm.sampling), []
    for size in sizes:
        batch, spent, rows = Batch(model, size), list[float](), list[Row]()
        for seed in range(_TRIES * size):
            rows.append(Row(lm, prompt, sampling, SeededNoise(seed), max_columns=frames + 1))
            batch.admit(rows[-1])
            while len(rows) == size and len(spent) < frames:
                speak = all(row.begun for row in rows)
                begun = time.perf_counter()
                batch.step()
                if speak:
                    spent.append(time.perf_counter() - begun)
                rows = [row for row in rows if row.stop_reason is None]
            if len(spent) == frames:
                break
        if not spent:
            raise _ended()
        found.append(
            {"rows": size, **asdict(Summary.of(spent)), "frames_per_s": round(per_second(size * len(spent), sum(spent)), 2)}
        )
    return found


def measure_prefill(lm: LanguageModel, slow: TimedEngine) -> dict[str, Any]:
    """Measure one call of PREFILL columns."""
    columns = min(PREFILL, lm.max_prompt)
    times = []
    for repeat in range(1 + REPEATS):
        state = slow.new_state(batch=1, cache=columns)
        slow.take()
        slow.run(_columns(lm, 0, columns), state)
        if repeat:
            times.append(slow.take()[0].seconds)
    summary = Summary.of(times)
    return {**asdict(summary), "columns": columns, "tokens_per_s": round(per_second(columns, summary.median_s), 1)}


def measure_contexts(lm: LanguageModel, slow: TimedEngine) -> list[dict[str, Any]]:
    """Measure the slow step at growing contexts, with a cache of the context's size."""
    found = []
    for context in CONTEXTS:
        if context >= lm.max_seq_len:
            break
        state = slow.new_state(batch=1, cache=context + 1)
        for _ in range(2):
            slow.run(_columns(lm, context, 1), state)
        slow.take()
        for _ in range(2 * REPEATS):
            slow.run(_columns(lm, context, 1), state)
        found.append({"context": context, **asdict(Summary.of([call.seconds for call in slow.take()]))})
    return found


def _ended() -> FishrtError:
    return FishrtError("the model ended before there was anything to measure", hint="give another --text")


def _columns(lm: LanguageModel, start: int, length: int) -> dict[str, Ints]:
    """Return feeds of the slow AR: `length` columns of one token from position `start` on."""
    prompt = np.zeros((1, 1 + lm.num_codebooks, length), np.int64)
    prompt[:, 0] = lm.semantic_begin_id
    prompt[:, 1:] = lm.code_offset
    return {
        "prompt": prompt,
        "position_ids": np.arange(start, start + length, dtype=np.int64)[None],
        "write_index": np.array([start], np.int64),
        "last_index": np.array([length - 1], np.int64),
    }
