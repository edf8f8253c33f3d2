"""Two checkouts of fishrt, compared on this CPU: `python benchmarks/versions.py BEFORE AFTER` writes results/versions.json.

Each checkout exports minnow and a checkpoint of official size with random weights, once. Then the checkouts alternate for
`--rounds` rounds, and the other one begins each round: what a turn wrote may still be on its way to the disk in the next. A turn
with a bundle is two new processes: one loads it with an empty cache, the other loads it from that cache and speaks.
minnow speaks from the bundle that its checkout embeds. Ratios are after ÷ before, of medians over the rounds.
Needs the `dev` extra, an otherwise idle machine, 8 GB of memory and 6 GB of disk.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click

from fishrt.bench.measure import TEXT
from fishrt.bundle.manifest import PRECISIONS
from fishrt_engines.machine import default_threads
from full_size import FAMILIES
from harness import HERE, Made, ProcessError, compare, python, shared_options, tell
from record import RESULTS, commit, write_record
from versions_process import SEEDS

FIGURES = {
    **{f"{start}_{figure}": (start, figure) for start in ("cold", "cached") for figure in ("load_s", "load_peak_bytes")},
    **{figure: ("cached", figure) for figure in ("frame_ms", "first_audio_ms")},
}
"""The places of the compared figures in a turn."""
EXPORT_FIGURES = {"export_s": ("seconds",), "export_peak_bytes": ("peak_memory_bytes",)}
RESERVE = 1.5
"""A further round begins only if this many times the duration of the last one are left."""
_CHECKOUT = click.Path(exists=True, file_okay=False, resolve_path=True, path_type=Path)


@dataclass(frozen=True)
class Side:
    """A checkout, its folder of optimised graphs, and the time of `time.monotonic` at which its processes are ended."""

    checkout: Path
    commit: str
    cache: Path
    deadline: float

    def run(self, *arguments: object) -> str:
        """Run a process with the packages of the checkout. See `python`."""
        path = os.pathsep.join(str(self.checkout / layer) for layer in ("engines", "runtime", "export"))
        env = {"PYTHONPATH": path, "FISHRT_CACHE": str(self.cache)}
        return python(*arguments, timeout_s=max(1.0, self.deadline - time.monotonic()), env=env)

    def export(self, made: Made, recipe: str) -> dict[str, Any]:
        """Return seconds and memory of the export, and the number of forms in the bundle."""
        found = made.export(recipe)
        manifest = json.loads((made.bundle(recipe) / "manifest.json").read_text(encoding="utf-8"))
        return found | {"forms": sum(len(graph["forms"]) for graph in manifest["graphs"].values())}

    def turn(self, bundle: Path, threads: int, frames: int) -> dict[str, Any]:
        """Return the measurements of a process with an empty cache, and of one with the cache of the first, which speaks."""
        found = {}
        shutil.rmtree(self.cache, ignore_errors=True)
        for start, spoken in (("cold", 0), ("cached", frames)):
            found[start] = json.loads(self.run(HERE / "versions_process.py", bundle, threads, TEXT, spoken))
            if not Path(package := found[start].pop("package")).is_relative_to(self.checkout):
                raise ProcessError(f"it measured {package}, which is not in {self.checkout}")
        return found


@click.command(context_settings={"show_default": True})
@click.argument("checkouts", metavar="BEFORE AFTER", nargs=2, type=_CHECKOUT)
@click.option("--size", type=click.Choice(list(FAMILIES)), default="1.2", help="Family of the checkpoint with random weights.")
@click.option("--precision", type=click.Choice(PRECISIONS), default="int8", help="Precision of its bundle.")
@shared_options
@click.option("--rounds", type=click.IntRange(min=1), default=5, help="Turns of each checkout.")
@click.option("--frames", type=click.IntRange(min=2), default=32, help="Frames of each request.")
@click.option("--budget-s", default=660.0, help="Time limit in seconds; rounds that do not fit are omitted.")
@click.option("--output", type=click.Path(path_type=Path), help="Record to write.  [default: results/versions.json]")
def main(checkouts: tuple[Path, Path], size: str, precision: str, budget_s: float, smoke: bool, **options: Any) -> None:
    """Export, measure and compare two checkouts without uncommitted changes, and write the record."""
    deadline = time.monotonic() + budget_s
    rounds, frames, threads = (1, 4, 1) if smoke else (options["rounds"], options["frames"], 0)
    for checkout in checkouts:
        if not smoke and (commit(checkout) or "-dirty").endswith("-dirty"):
            raise click.UsageError(f"{checkout} is no checkout of git, or has uncommitted changes")
    with tempfile.TemporaryDirectory(prefix="fishrt-bench-") as folder:
        checkpoints, bundles = (options[name] or Path(folder, name) for name in ("checkpoints", "bundles"))
        named = zip(("before", "after"), checkouts, strict=True)
        sides = {name: Side(at, commit(at) or "none", Path(folder, name), deadline) for name, at in named}
        found, spoken = {}, {}
        tell(f"checkpoint: {size}")
        Made(size, checkpoints, bundles, {}, tiny=smoke, run=partial(python, timeout_s=budget_s)).write_checkpoint()
        for family, recipe in (("minnow", "fp32"), (size, precision)):
            found[family] = {"recipe": recipe, "export": {}, "turns": {name: [] for name in sides}}
            for name, side in sides.items():
                tell(f"{name}: export, {family}")
                source = side.checkout / "export" if family == "minnow" else checkpoints
                recipes = {recipe: ("--precision", recipe)}
                made = Made(family, source, bundles / side.commit, recipes, tiny=smoke, run=side.run)
                found[family]["export"][name] = side.export(made, recipe)
                spoken[family, name] = side.checkout / "runtime/fishrt/minnow" if family == "minnow" else made.bundle(recipe)
        for n in range(rounds):
            begun = time.monotonic()
            for (family, name), bundle in [*spoken.items()][:: -1 if n % 2 else 1]:
                os.sync()
                tell(f"round {n + 1} of {rounds}: {family}, {name}")
                found[family]["turns"][name].append(sides[name].turn(bundle, threads, frames))
            now = time.monotonic()
            if now + RESERVE * (now - begun) > deadline:
                break
        for family, measured in found.items():
            measured |= summarise(measured["export"], measured["turns"])
            tell("\n".join(f"{family}, {name}: {values}" for name, values in measured["compared"].items()))
        method = {
            "commits": {name: side.commit for name, side in sides.items()},
            "weights": f"of {size}: random{' and tiny' if smoke else ', of official size and layout'}",
            **{"rounds": n + 1, "frames": frames, "threads": threads or default_threads(), "text": TEXT},
        }
        output = options["output"] or (Path(folder, "smoke.json") if smoke else RESULTS / "versions.json")
        tell(f"written: {write_record('versions', {'method': method, 'families': found}, output)}")


def summarise(export: Mapping[str, Any], turns: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return medians and ratios, and for each seed whether all turns of both sides gave the same codes, which are taken out."""
    compared = compare(turns, FIGURES) | compare({name: [found] for name, found in export.items()}, EXPORT_FIGURES)
    for medians in compared.values():
        if len(medians) == len(turns):
            medians["ratio"] = round(medians["after"] / medians["before"], 3)
    codes = [turn["cached"].pop("codes") for own in turns.values() for turn in own]
    return {"compared": compared, "same_codes": {seed: all(of[n] == codes[0][n] for of in codes) for n, seed in enumerate(SEEDS)}}


if __name__ == "__main__":
    main()
