"""Measurements that need a separate process: `python -m fishrt.bench.child BUNDLE PROVIDER THREADS TEXT FRAMES`.

The process opens the graphs that speaking needs, speaks FRAMES frames of the text, and prints the load time and its peak memory.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import FishrtError


@dataclass(frozen=True, slots=True)
class ChildReport:
    """Measurements of one process."""

    load_s: float
    """Seconds from the first import to the last graph that speaking needs, with the manifest and the hashes of small bundles."""
    peak_rss_bytes: int | None


def run_child(bundle: Path, *, provider: str, threads: int | None, cache: Path, text: str = "", frames: int = 0) -> ChildReport:
    """Run a process with `cache` as its folder of optimised graphs. Raises FishrtError if it fails."""
    arguments = [str(bundle), provider, str(threads or 0), text, str(frames)]
    done = subprocess.run(
        [sys.executable, "-m", "fishrt.bench.child", *arguments],
        env={**os.environ, "FISHRT_CACHE": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise FishrtError(f"a process that loads {bundle} ended with status {done.returncode}: {last}")
    return ChildReport(**json.loads(done.stdout))


def main(arguments: Sequence[str]) -> None:
    """Run in the process."""
    bundle, provider, threads, text, frames = arguments
    begun = time.perf_counter()
    from fishrt_engines.machine import peak_memory

    from ..tts import TTS
    from .setup import SPEAKING, bench_voice

    tts = TTS.load(bundle, provider=provider, threads=int(threads) or None)
    for role in SPEAKING:
        tts.engines[role]
    load_s = time.perf_counter() - begun
    if int(frames):
        tts.speak(text, voice=bench_voice(tts.bundle), seed=0, max_frames=int(frames))
    print(json.dumps({"load_s": load_s, "peak_rss_bytes": peak_memory()}))


if __name__ == "__main__":
    main(sys.argv[1:])
