"""Speed and memory on this CPU, compared with torch: `python benchmarks/cpu.py` writes results/cpu.json and its plots.

For each family, a checkpoint of official size with random weights is exported by several recipes, and each bundle is measured by
`fishrt bench` in its own process. Then the first recipe and the peers (the exporter's torch modules, eager, in float32 and
bfloat16, in the same loop) alternate for `--rounds` rounds, each turn in a new process. Ratios are of medians over the rounds.
Needs the `dev` extra, an otherwise idle machine, and for S2 24 GB of memory and 40 GB of disk.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import numpy as np

from fishrt.metrics import speed_up
from fishrt_engines.machine import default_threads, total_memory
from full_size import FAMILIES, write_checkpoint
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
HERE = Path(__file__).parent


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
@click.option("--checkpoints", type=click.Path(path_type=Path), help="Folder with a checkpoint for each family, made if missing.")
@click.option("--bundles", type=click.Path(path_type=Path), help="Folder of bundles, FAMILY-RECIPE, made if missing.")
@click.option("--rounds", default=3, help="Turns of fishrt and of each peer.")
@click.option("--frames", default=32, help="Frames of each turn, and of `fishrt bench`.")
@click.option("--smoke", is_flag=True, help="One tiny checkpoint, each part once, as a test. Times are meaningless.")
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
            checkpoint = (checkpoints or work / "checkpoints") / family
            if not checkpoint.is_dir():
                tell(f"{family}: writing a checkpoint")
                write_checkpoint(family, checkpoint, tiny=smoke)
            chosen = recipes or USUAL_RECIPES.get(family, ("int4", "int8"))
            measured[family] = measure_family(family, checkpoint, bundles or work / "bundles", chosen, rounds, frames, threads)
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


def measure_family(
    family: str, checkpoint: Path, bundles: Path, recipes: Sequence[str], rounds: int, frames: int, threads: int | None
) -> dict[str, Any]:
    """Return all measurements of one family. threads: None means each side's default."""
    found: dict[str, Any] = {"export": {}, "recipes": {}}
    option = [f"--threads={threads}"] if threads else []
    for recipe in recipes:
        bundle = bundles / f"{family}-{recipe}"
        found["export"][recipe] = export(family, recipe, checkpoint, bundle)
        tell(f"{family}: fishrt bench, {recipe}")
        measured = run("-m", "fishrt", "bench", "--json", f"--frames={frames}", *option, bundle)
        found["recipes"][recipe] = {key: value for key, value in measured.items() if key not in ("ok", "command")}
    bundle = bundles / f"{family}-{recipes[0]}"
    found["turns"] = take_turns(family, bundle, checkpoint, rounds, PEER_FRAMES.get(family, frames), option)
    found["compared"] = compare(recipes[0], found["turns"])
    tell(f"{family}: threads and texts")
    cores = range(1, (threads or default_threads()) + 1)
    child = (HERE / "one_process.py", "ours", bundle, checkpoint, f"--frames={frames}", "--no-codec")
    found["threads"] = [{"threads": n, **run(*child, f"--threads={n}")} for n in cores]
    found["texts"] = run(HERE / "one_process.py", "texts", bundle, checkpoint, *option)["texts"]
    return found


def export(family: str, recipe: str, checkpoint: Path, bundle: Path) -> dict[str, Any]:
    """Export, unless the bundle exists. Return seconds and memory of the export, from a file next to the bundle."""
    note = bundle.with_suffix(f"{bundle.suffix}.json")
    if not bundle.is_dir():
        tell(f"{family}: exporting {recipe}")
        bundle.parent.mkdir(parents=True, exist_ok=True)
        begun = time.perf_counter()
        exported = run("-m", "fishrt", "export", "--json", *RECIPES[recipe], checkpoint, bundle)
        seconds = round(time.perf_counter() - begun, 1)
        note.write_text(json.dumps({"seconds": seconds, "peak_memory_bytes": exported["peak_memory_bytes"]}))
    return json.loads(note.read_text()) if note.is_file() else {}


def take_turns(
    family: str, bundle: Path, checkpoint: Path, rounds: int, frames: int, option: Sequence[str]
) -> dict[str, list[dict[str, Any]]]:
    """Run ours, fp32, bf16, ours, fp32, …. Return the measurements of each process, by side. Too large a peer is omitted."""
    sides = ["ours", *(peer for peer in PEERS if fits(checkpoint, peer))]
    turns: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for n in range(rounds):
        for side in sides:
            tell(f"{family}: round {n + 1} of {rounds}, {side}")
            turns[side].append(run(HERE / "one_process.py", side, bundle, checkpoint, f"--frames={frames}", *option))
    return turns


def fits(checkpoint: Path, peer: str) -> bool:
    """Return whether a peer's weights fit into memory. On disk, the language model's have 16 bits, the codec's 32."""
    sizes = {path.name: path.stat().st_size for path in checkpoint.iterdir() if path.suffix in (".pth", ".safetensors")}
    model = sum(size for name, size in sizes.items() if name.startswith("model"))
    needed = model * (2 if peer == "fp32" else 1) + sum(sizes.values()) - model
    memory = total_memory()
    return memory is None or needed < PEER_MEMORY_SHARE * memory


def compare(recipe: str, turns: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return medians over the rounds, and the speed-up of fishrt over the faster peer."""
    figures = {
        "frame_ms": lambda turn: turn["frame"]["median_ms"],
        "slow_step_ms": lambda turn: turn["slow_step"]["median_ms"],
        "prefill_ms": lambda turn: turn["prefill"]["median_ms"],
        "codec_decode_ms": lambda turn: turn["codec"]["decode"]["median_ms"],
    }
    found: dict[str, Any] = {"recipe": recipe}
    for name, figure in figures.items():
        medians = {side: round(float(np.median([figure(turn) for turn in own])), 3) for side, own in turns.items()}
        found[name] = medians
        if peers := {side: median for side, median in medians.items() if side != "ours"}:
            best = min(peers, key=peers.__getitem__)
            found[name] |= {"best_peer": best, "speed_up": round(speed_up(medians["ours"], peers[best]), 2)}
    return found


def run(*arguments: object) -> Any:
    """Return the JSON object that a Python process prints. Raises SystemExit with its output if it fails."""
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, arguments))} ended with status {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout)


def tell(line: str) -> None:
    click.echo(line, err=True)


if __name__ == "__main__":
    main()
