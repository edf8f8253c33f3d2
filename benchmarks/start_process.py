"""One start in its own process, printed as JSON: `start_process.py BEGUN BUNDLE TEXT`.

BEGUN: the time of `time.monotonic` at which the process was started. The process stays, with all that it has loaded, until its
input ends. `start.py` starts it with a checkout on the path, so it uses only what several have: the methods of `TTS`.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path

ROLES = ("slow_ar", "fast_ar", "codec_decode")
"""Graphs that speaking needs."""


def main(begun: float, bundle: str, text: str) -> None:
    """Print the seconds of each part of a start, one after another, and the memory of the process in bytes."""
    marks = {"python": time.monotonic()}
    import fishrt

    marks["import_fishrt"] = time.monotonic()
    from fishrt import TTS

    marks["import_tts"] = time.monotonic()
    tts = TTS.load(bundle, provider="cpu")
    marks["bundle"] = time.monotonic()
    for role in ROLES:
        tts.engines[role]
    marks["graphs"] = time.monotonic()
    logging.disable(logging.WARNING)  # the request is cut off by the limit
    next(chunk for chunk in tts.stream(text, seed=1, max_frames=8) if len(chunk))
    marks["first_sample"] = time.monotonic()
    ends = list(marks.values())
    parts = {name: round(end - start, 4) for name, start, end in zip(marks, [begun, *ends], ends, strict=False)}
    print(json.dumps({"package": fishrt.__file__, **parts, "all": round(ends[-1] - begun, 4), **memory()}), flush=True)
    sys.stdin.read()


def memory() -> dict[str, int]:
    """Return the largest size of this process, and what no other process shares of its present one; on Linux."""
    found = {}
    for file, names in (("status", {"VmHWM": "peak"}), ("smaps_rollup", {"Private_Clean": "own", "Private_Dirty": "own"})):
        for line in Path("/proc/self", file).read_text().splitlines():
            name, *size = line.split()
            if own := names.get(name.removesuffix(":")):
                found[f"{own}_bytes"] = found.get(f"{own}_bytes", 0) + 1024 * int(size[0])
    return found


if __name__ == "__main__":
    main(float(sys.argv[1]), *sys.argv[2:])
