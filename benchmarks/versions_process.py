"""One measurement of one checkout in its own process, printed as JSON: `versions_process.py BUNDLE THREADS TEXT FRAMES`.

`versions.py` starts it with each of two checkouts on the path, so it uses only what both have: the methods of `TTS`, and
`peak_memory`. FRAMES: frames of each request; with 0, only loading is measured. THREADS: 0 means the default.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

import numpy as np

SEEDS = (0, 1, 2)
ROLES = ("slow_ar", "fast_ar", "codec_decode")
"""Graphs that speaking needs."""
WARM_UP = 4
"""Frames of the request before those that are measured."""


def main(bundle: str, threads: int, text: str, frames: int) -> None:
    """Print seconds from the first import to open graphs, peak memory until then, and the measurements of speech."""
    begun = time.perf_counter()
    import fishrt
    from fishrt_engines.machine import peak_memory

    tts = fishrt.TTS.load(bundle, provider="cpu", threads=threads or None)
    for role in ROLES:
        tts.engines[role]
    found = {"load_s": round(time.perf_counter() - begun, 3), "load_peak_bytes": peak_memory(), "package": fishrt.__file__}
    print(json.dumps(found | (measure_speech(tts, text, frames) if frames else {})))


def measure_speech(tts: Any, text: str, frames: int) -> dict[str, Any]:
    """Return medians in milliseconds over all seeds, and the codes of each seed: [K, frames] as lists."""
    logging.disable(logging.WARNING)  # every request is cut off by the limit
    tts.speak(text, seed=SEEDS[0], max_frames=WARM_UP)
    times, codes = [], []
    for seed in SEEDS:
        drawn: list[float] = []
        speech = tts.speak(text, seed=seed, max_frames=frames, progress=lambda _, drawn=drawn: drawn.append(time.perf_counter()))
        times += np.diff(drawn).tolist()  # the prefill gives the first frame
        codes.append(speech.codes.tolist())
    first = [first_audio(tts, text, seed, frames) for seed in SEEDS]
    medians = {"frame_ms": times, "first_audio_ms": first}
    return {name: round(1e3 * float(np.median(values)), 3) for name, values in medians.items()} | {"codes": codes}


def first_audio(tts: Any, text: str, seed: int, frames: int) -> float:
    """Return the seconds from a request to its first samples."""
    begun = time.perf_counter()
    stream = tts.stream(text, seed=seed, max_frames=frames)
    next(chunk for chunk in stream if len(chunk))
    seconds = time.perf_counter() - begun
    stream.close()
    return seconds


if __name__ == "__main__":
    bundle, threads, text, frames = sys.argv[1:]
    main(bundle, int(threads), text, int(frames))
