"""Frames per second of batches on this CPU: `python benchmarks/batch.py [BUNDLE …]` writes results/batch.json.

Each bundle, beside the embedded one, is measured by `fishrt bench --batch` in a process of its own. The bundles take turns for
`--rounds` rounds; the record has the medians, and the growth of the throughput over a batch of one.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

import click

from harness import python, tell
from record import write_record

SIZES = (1, 2, 4, 8)


@click.command(context_settings={"show_default": True})
@click.argument("bundles", nargs=-1, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--rounds", type=click.IntRange(min=1), default=3, help="Turns of each bundle.")
@click.option("--frames", type=click.IntRange(min=2), default=64, help="Frames of each batch.")
@click.option("--output", type=click.Path(path_type=Path), help="Record to write.  [default: results/batch.json]")
def main(bundles: tuple[Path, ...], rounds: int, frames: int, output: Path | None) -> None:
    """Measure batches of 1, 2, 4 and 8 rows, and write the record."""
    turns: dict[str, list[dict[str, Any]]] = {}
    for n in range(rounds):
        for bundle in (None, *bundles):
            name = bundle.name if bundle else "minnow"
            tell(f"round {n + 1} of {rounds}: {name}")
            options = ("--batch", ",".join(map(str, SIZES)), "--frames", frames, "--json", "--quiet")
            said = json.loads(python("-m", "fishrt", "bench", *([bundle] if bundle else []), *options))
            turns.setdefault(name, []).append({row["rows"]: row["frames_per_s"] for row in said["batches"]})
    found = {}
    for name, rows in turns.items():
        speeds = {size: median(turn[size] for turn in rows) for size in SIZES}
        found[name] = {
            str(size): {"frames_per_s": round(speed, 2), "growth": round(speed / speeds[1], 3)} for size, speed in speeds.items()
        }
    tell(f"written: {write_record('batch', {'method': {'rounds': rounds, 'frames': frames}, 'batches': found}, output)}")


if __name__ == "__main__":
    main()
