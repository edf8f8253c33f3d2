"""Speed and memory on this CPU, compared with torch: `python benchmarks/cpu.py` writes results/cpu.json and its plots.

For each family, a checkpoint of official size with random weights is exported by several recipes, and each bundle is measured by
`fishrt bench` in its own process. Then the first recipe and the peers (the exporter's torch modules, eager, in float32 and
bfloat16, in the same loop) alternate for `--rounds` rounds, each turn in a new process. Ratios are of medians over the rounds.
Needs the `dev` extra, an otherwise idle machine, and for S2 24 GB of memory and 40 GB of disk.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from fishrt_engines.machine import default_threads, total_memory
from full_size import FAMILIES
from harness import HERE, Made, compare, python, shared_options, tell
from plot import write_plots
from record import RESULTS, write_record

RECIPES = {
    "int4": ("--precision", "int4"),
    "int8": ("--precision", "int8"),
    "all-int4": ("--precision", "int4", "--keep", "fast_ar.*=int4", "--keep", "slow_ar.output=int4"),
    "int4-codec-int8": ("--precision", "int4", "--codec-int8"),
    "fp32": (),
}
USUAL_RECIPES = {"s1": ("int4", "int8", "int4-codec-int8"), "s2": ("int4", "all-int4")}
"""Default recipes of families; int4 and int8 for the others."""
PEERS = ("fp32", "bf16")
PEER_FRAMES = {"s2": 8}
"""Frames of a peer's turn, if not `--frames`: torch takes about a second for a frame of S2's size."""
PEER_MEMORY_SHARE = 0.75
"""Largest share of the machine's memory for a peer's weights; a larger peer is omitted."""
FIGURES = {
    "frame_ms": ("frame", "median_ms"),
    "slow_step_ms": ("slow_step", "median_ms"),
    "prefill_ms": ("prefill", "median_ms"),
    "codec_decode_ms": ("codec", "decode", "median_ms"),
}
"""The places of the compared figures in a measurement."""


@click.command(context_settings={"show_default": True})
@click.option("--family", "families", multiple=True, type=click.Choice(list(FAMILIES)), default=("1.5", "s1", "s2"))
@click.option(
    "--recipe",
    "recipes",
    multiple=True,
    type=click.Choice(list(RECIPES)),
    help="The first one alternates with the peers.  [default: int4 and int8; for s1 also int4-codec-int8; int4 "
    "and all-int4 for s2]",
)
@shared_options
@click.option("--rounds", default=3, help="Turns of fishrt and of each peer.")
@click.option("--frames", default=32, help="Frames of each turn, and of `fishrt bench`.")
@click.option("--out", type=click.Path(path_type=Path), help="Record; plots go into its folder.  [default: results/cpu.json]")
def main(
    families: Sequence[str],
    recipes: Sequence[str],
    checkpoints: Path | None,
    bundles: Path | None,
    rounds: int,
    frames: int,
    smoke: bool,
    out: Path | None,
) -> None:
    """Export, measure and compare, and write the record."""
    threads = None
    if smoke:
        families, recipes, rounds, frames, threads = families[:1], recipes[:1] or ("int4",), 1, 3, 1
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fishrt-bench-")))
        out = out or (work / "smoke.json" if smoke else RESULTS / "cpu.json")
        measured = {}
        for family in families:
            made = Made(family, checkpoints or work / "checkpoints", bundles or work / "bundles", RECIPES, tiny=smoke)
            chosen = recipes or USUAL_RECIPES.get(family, ("int4", "int8"))
            measured[family] = measure_family(made, chosen, rounds, frames, threads)
        method = {
            "recipes": {name: list(options) for name, options in RECIPES.items()},
            "rounds": rounds,
            "frames": frames,
            "peer_frames": PEER_FRAMES,
            "weights": "random, of official size and layout" if not smoke else "random and tiny",
            "warm_up": "in each process, one generation of as many frames before the timed ones",
        }
        path = write_record("cpu", {"method": method, "families": measured}, out)
        plots = write_plots(path)
        for written in (path, *plots):
            tell(f"written: {written}")


def measure_family(made: Made, recipes: Sequence[str], rounds: int, frames: int, threads: int | None) -> dict[str, Any]:
    """Return all measurements of one family. threads: None means each side's default."""
    found: dict[str, Any] = {"export": {}, "recipes": {}}
    option = [f"--threads={threads}"] if threads else []
    tell(f"{made.family}: checkpoint")
    made.write_checkpoint()
    for recipe in recipes:
        tell(f"{made.family}: export, {recipe}")
        found["export"][recipe] = made.export(recipe)
        tell(f"{made.family}: fishrt bench, {recipe}")
        measured = run("-m", "fishrt", "bench", "--json", f"--frames={frames}", *option, made.bundle(recipe))
        found["recipes"][recipe] = {key: value for key, value in measured.items() if key not in ("ok", "command")}
    measured_with = (made.bundle(recipes[0]), made.checkpoint)
    found["turns"] = take_turns(made, measured_with, rounds, [f"--frames={PEER_FRAMES.get(made.family, frames)}", *option])
    found["compared"] = {"recipe": recipes[0], **compare(found["turns"], FIGURES)}
    tell(f"{made.family}: threads and texts")
    cores = range(1, (threads or default_threads()) + 1)
    child = (HERE / "cpu_process.py", "ours", *measured_with, f"--frames={frames}", "--no-codec")
    found["threads"] = [{"threads": n, **run(*child, f"--threads={n}")} for n in cores]
    found["texts"] = run(HERE / "cpu_process.py", "texts", *measured_with, *option)["texts"]
    return found


def take_turns(made: Made, paths: Sequence[Path], rounds: int, options: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Run ours, fp32, bf16, ours, fp32, …. Return the measurements of each process, by side. Too large a peer is omitted."""
    turns: dict[str, list[dict[str, Any]]] = {side: [] for side in ("ours", *PEERS) if fits(made.checkpoint, side)}
    for n in range(rounds):
        for side, measured in turns.items():
            tell(f"{made.family}: round {n + 1} of {rounds}, {side}")
            measured.append(run(HERE / "cpu_process.py", side, *paths, *options))
    return turns


def fits(checkpoint: Path, side: str) -> bool:
    """Return whether a side's weights fit into memory; ours do. On disk, the language model's have 16 bits, the codec's 32."""
    sizes = {path.name: path.stat().st_size for path in checkpoint.iterdir() if path.suffix in (".pth", ".safetensors")}
    model = sum(size for name, size in sizes.items() if name.startswith("model"))
    needed = model * (2 if side == "fp32" else 1) + sum(sizes.values()) - model
    memory = total_memory()
    return side == "ours" or memory is None or needed < PEER_MEMORY_SHARE * memory


def run(*arguments: object) -> Any:
    """Return the JSON object that a Python process prints. Raises ProcessError if it fails."""
    return json.loads(python(*arguments))


if __name__ == "__main__":
    main()
