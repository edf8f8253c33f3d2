"""Seconds from the start of a process: `python benchmarks/start.py [CHECKOUT …]` writes results/start.json.

Each process does one of STEPS, prints a line and ends. The time is that from its start to the line. Processes of all steps and
checkouts take turns for `--rounds` rounds; the first round, in which files are read and compiled, is left out. Without a
checkout, this one is measured.

Then each bundle, minnow first, is started in parts (see start_process.py), on each checkout in turns: with an empty cache of
graphs, with that cache, and again beside the process before, which stays; the record also has the size of the cache. Needs the
extra `cpu` and an otherwise idle machine with Linux.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
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
STARTS = ("first", "later", "beside")
"""Starts of a bundle: with an empty cache, with the cache of the first, and beside the one before."""
PARTS = ("python", "import_fishrt", "import_tts", "bundle", "graphs", "first_sample", "all", "peak_bytes", "own_bytes")


def seconds(checkout: Path, code: str) -> float:
    """Return the seconds from the start of a process with the packages of a checkout to its first output."""
    begun = time.perf_counter()
    with subprocess.Popen([sys.executable, "-c", f"{code}\nprint(flush=True)"], env=environment(checkout), stdout=-1) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        found = time.perf_counter() - begun
        process.kill()
    if not first:
        raise ProcessError(f"it printed nothing: {code}")
    return found


def starts(checkout: Path, bundle: Path | None) -> dict[str, Any]:
    """Return the parts of each start of a bundle, minnow for None, and the bytes of the cache."""
    bundle = bundle or checkout / "runtime/fishrt/minnow"
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="fishrt-bench-") as cache, ExitStack() as processes:
        for start in STARTS:
            if start != "beside":
                processes.close()
            begun, env = time.monotonic(), environment(checkout) | {"FISHRT_CACHE": cache}
            command = [sys.executable, HERE / "start_process.py", str(begun), bundle, TEXT]
            process = processes.enter_context(subprocess.Popen(command, env=env, stdin=-1, stdout=-1, text=True))
            assert process.stdout is not None
            if not (printed := process.stdout.readline()):
                raise ProcessError(f"a start of {bundle.name} printed nothing")
            found[start] = json.loads(printed)
            if not Path(package := found[start].pop("package")).is_relative_to(checkout):
                raise ProcessError(f"it measured {package}, which is not in {checkout}")
        found["cache_bytes"] = sum(file.stat().st_size for file in Path(cache).rglob("*") if file.is_file())
    found["bundle_bytes"] = sum(file.stat().st_size for file in bundle.rglob("*") if file.is_file())
    return found


def environment(checkout: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(str(checkout / layer) for layer in ("engines", "runtime"))}


@click.command(context_settings={"show_default": True})
@click.argument("checkouts", nargs=-1, type=click.Path(exists=True, file_okay=False, resolve_path=True, path_type=Path))
@click.option("--rounds", type=click.IntRange(min=1), default=9, help="Turns of each step and checkout.")
@click.option("--bundle", "bundles", multiple=True, type=click.Path(exists=True, path_type=Path), help="Bundle to start as well.")
@click.option("--bundle-rounds", type=click.IntRange(min=1), default=3, help="Turns of each bundle and checkout.")
@click.option("--output", type=click.Path(path_type=Path), help="Record to write.  [default: results/start.json]")
def main(checkouts: tuple[Path, ...], rounds: int, bundles: tuple[Path, ...], bundle_rounds: int, output: Path | None) -> None:
    """Measure starts, and write the record."""
    sides = {str(n): checkout for n, checkout in enumerate(checkouts or [HERE.parent])}
    turns: dict[str, list[dict[str, Any]]] = {side: [{} for _ in range(1 + rounds)] for side in sides}
    for n, (step, code), (side, checkout) in itertools.product(range(1 + rounds), STEPS.items(), sides.items()):
        turns[side][n][step] = round(seconds(checkout, code), 4)
    kept = {side: own[1:] for side, own in turns.items()}
    compared = compare(kept, {step: (step,) for step in STEPS})
    tell("\n".join(f"{step}: {medians}" for step, medians in compared.items()))
    figures = {f"{start}_{part}": (start, part) for start in STARTS for part in PARTS}
    figures |= {name: (name,) for name in ("cache_bytes", "bundle_bytes")}
    started: dict[str, Any] = {}
    for bundle in (None, *bundles):
        of: dict[str, list[Any]] = {side: [] for side in sides}
        for _, (side, checkout) in itertools.product(range(bundle_rounds), sides.items()):
            of[side].append(starts(checkout, bundle))
        name = bundle.name if bundle else "minnow"
        started[name] = {"turns": of, "compared": compare(of, figures)}
        tell("\n".join(f"{name}, {figure}: {medians}" for figure, medians in started[name]["compared"].items()))
    method = {"rounds": rounds, "bundle_rounds": bundle_rounds, "text": TEXT}
    method |= {"commits": {side: commit(checkout) for side, checkout in sides.items()}}
    measured = {"method": method, "turns": kept, "seconds": compared, "bundles": started}
    path = write_record("start", measured, output or RESULTS / "start.json")
    tell(f"written: {path}")


if __name__ == "__main__":
    main()
