"""Seconds from the start of a process: `python benchmarks/start.py [CHECKOUT …]` writes results/start.json.

Each process does one of STEPS, prints a line and ends. The time is that from its start to the line. Processes of all steps and
checkouts take turns for `--rounds` rounds; the first round, in which files are read and compiled, is left out. Without a
checkout, this one is measured. Needs the extra `cpu` and an otherwise idle machine.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click

from harness import HERE, ProcessError, compare, tell
from record import RESULTS, commit, write_record

TEXT = "Good morning, my friend."
STEPS = {
    "python": "",
    "numpy": "import numpy",
    "fishrt": "import fishrt",
    "tts": "from fishrt import TTS",
    "loaded": "from fishrt import TTS; TTS.load(provider='cpu')",
    "first_sample": "from fishrt import TTS\n"
    f"next(c for c in TTS.load(provider='cpu').stream({TEXT!r}, seed=1, max_frames=8) if len(c))",
    "command": f"import sys; sys.argv = ['fishrt', *'speak --seed 1 --stream --format pcm -q -o -'.split(), {TEXT!r}]\n"
    "from fishrt.__main__ import run; run()",
}
"""What each process does before it prints; the last prints samples."""


def seconds(checkout: Path, code: str) -> float:
    """Return the seconds from the start of a process with the packages of a checkout to its first output."""
    path = os.pathsep.join(str(checkout / layer) for layer in ("engines", "runtime"))
    begun = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-c", f"{code}\nprint(flush=True)"], env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        found = time.perf_counter() - begun
        process.kill()
    if not first:
        raise ProcessError(f"it printed nothing: {code}")
    return found


@click.command(context_settings={"show_default": True})
@click.argument("checkouts", nargs=-1, type=click.Path(exists=True, file_okay=False, resolve_path=True, path_type=Path))
@click.option("--rounds", type=click.IntRange(min=1), default=9, help="Turns of each step and checkout.")
@click.option("--output", type=click.Path(path_type=Path), help="Record to write.  [default: results/start.json]")
def main(checkouts: tuple[Path, ...], rounds: int, output: Path | None) -> None:
    """Measure starts, and write the record."""
    sides = {str(n): checkout for n, checkout in enumerate(checkouts or [HERE.parent])}
    turns: dict[str, list[dict[str, Any]]] = {side: [{} for _ in range(1 + rounds)] for side in sides}
    for n, (step, code), (side, checkout) in itertools.product(range(1 + rounds), STEPS.items(), sides.items()):
        turns[side][n][step] = round(seconds(checkout, code), 4)
    kept = {side: own[1:] for side, own in turns.items()}
    compared = compare(kept, {step: (step,) for step in STEPS})
    tell("\n".join(f"{step}: {medians}" for step, medians in compared.items()))
    method = {"rounds": rounds, "text": TEXT, "commits": {side: commit(checkout) for side, checkout in sides.items()}}
    path = write_record("start", {"method": method, "turns": kept, "seconds": compared}, output or RESULTS / "start.json")
    tell(f"written: {path}")


if __name__ == "__main__":
    main()
