"""Exports of other forms of the weights beside that of the official ones: `python benchmarks/checkpoints.py` writes
results/checkpoints.json.

A checkpoint of S2-Pro with random weights is written in each form, exported in a process of its own, and its bundle speaks some
frames in another. The record has the peak memory of each export, its ratio to that of the official weights in bfloat16, and the
distance of the weights from these. Widths and vocabulary are the official ones. Layers are few and the codec is small, or the
record would take hours: an export holds one stretch of layers at a time, and the codec is equal in all forms. A bundle whose
weights would fill the memory in float32 does not speak. Each is deleted before the next is made, unless folders are given. Needs
the `dev` extra, 12 GB of memory and 10 GB of disk.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import click
import torch

from fishrt.bundle.folder import Bundle
from fishrt.bundle.memory import estimate
from fishrt_engines.machine import total_memory
from fishrt_export.graph.quantise import relative_error
from fishrt_export.sources.language_model import open_language_model
from full_size.forms import FORMS
from harness import HERE, Made, python, shared_options, tell
from record import RESULTS, write_record

OFFICIAL = "s2"
SIDES: dict[str, tuple[str, tuple[str, ...]]] = {
    "official": (OFFICIAL, ()),
    **{form: (form, ()) for form in FORMS},
    "official-int8": (OFFICIAL, ("--precision", "int8")),
    "nf4-int8": ("nf4", ("--precision", "int8")),
}
"""The checkpoint of each bundle, and the options of `fishrt export`."""
COMPARED = ("layers.0.attention.wqkv.weight", "layers.0.feed_forward.w2.weight")
"""Weights whose distance from the official ones is measured."""
MEMORY_SHARE = 0.75
"""Largest share of the machine's memory for a bundle that speaks."""


@click.command(context_settings={"show_default": True})
@shared_options
@click.option("--side", "sides", type=click.Choice(list(SIDES)), multiple=True, default=list(SIDES), help="Bundles.")
@click.option("--layers", type=click.IntRange(min=1), default=3, help="Layers of the slow AR; the official model has 36.")
@click.option("--frames", type=click.IntRange(min=2), default=6, help="Frames that each bundle speaks.")
@click.option("--output", type=click.Path(path_type=Path), help="Record to write.  [default: results/checkpoints.json]")
def main(
    sides: tuple[str, ...],
    layers: int,
    frames: int,
    output: Path | None,
    smoke: bool,
    bundles: Path | None,
    checkpoints: Path | None,
) -> None:
    """Export each form, and write the record."""
    with tempfile.TemporaryDirectory(prefix="fishrt-bench-") as folder:
        home = checkpoints or Path(folder, "c")
        size = () if smoke else ("--layers", layers)
        official = Made(OFFICIAL, home, bundles or Path(folder, "b"), {}, tiny=smoke, size=size)
        tell("checkpoint")
        official.write_checkpoint()
        found: dict[str, Any] = {}
        for side in sorted(sides, key=lambda side: (SIDES[side][0] != OFFICIAL, SIDES[side][0])):
            form, options = SIDES[side]
            made = Made(form, home, bundles or Path(folder, "b"), {side: options}, tiny=smoke)
            if not made.checkpoint.is_dir():
                tell(f"checkpoint: {form}")
                python("-m", "full_size.forms", form, official.checkpoint, made.checkpoint)
            found[side] = measure(made, side, official.checkpoint, frames)
            if bundles is None:
                shutil.rmtree(made.bundle(side))
            later = [SIDES[other][0] for other in sides if other not in found]
            if checkpoints is None and form not in (OFFICIAL, *later):
                shutil.rmtree(made.checkpoint)
        method = {
            "weights": "random, of S2-Pro's layout"
            + (", tiny" if smoke else f" and widths, {layers} slow layers, a small codec"),
            "frames": frames,
            "sides": {side: {"checkpoint": form, "options": list(options)} for side, (form, options) in SIDES.items()},
        }
        peaks = {side: of["export"]["peak_memory_bytes"] for side, of in found.items()}
        ratios = {side: round(peak / peaks["official"], 3) for side, peak in peaks.items()} if "official" in peaks else {}
        output = output or (Path(folder, "smoke.json") if smoke else RESULTS / "checkpoints.json")
        tell(f"peak memory of exports, times that of the official weights: {json.dumps(ratios)}")
        tell(f"written: {write_record('checkpoints', {'method': method, 'sides': found, 'peak_ratios': ratios}, output)}")


def measure(made: Made, side: str, official: Path, frames: int) -> dict[str, Any]:
    """Export a checkpoint, and return what was measured of it and its bundle."""
    tell(f"export: {side}")
    export = made.export(side)
    bundle = Bundle.load(made.bundle(side))
    needed, memory, report = estimate(bundle.manifest).speaking, total_memory(), bundle.manifest.quantisation
    found = {
        "checkpoint_bytes": sum(path.stat().st_size for path in made.checkpoint.iterdir() if path.is_file()),
        "weights_error": distance(made.checkpoint, official),
        "export": export,
        "bundle_bytes": bundle.manifest.total_bytes,
        "stored": {
            role: (report and report.precisions(role)) or graph.precision for role, graph in bundle.manifest.graphs.items()
        },
    }
    if memory is None or needed < MEMORY_SHARE * memory:
        tell(f"frames: {side}")
        found["speaking"] = json.loads(
            python(HERE / "cpu_process.py", "frames", made.bundle(side), official, f"--frames={frames}")
        )
    else:
        found["speaking"] = {"omitted": f"it would need {needed / 1e9:.0f} GB of memory"}
    return found


def distance(checkpoint: Path, official: Path) -> float:
    """Return the root mean square of the difference of the compared weights ÷ that of the official ones."""
    found, right = (open_language_model(path).weights for path in (checkpoint, official))
    actual, wanted = (torch.cat([weights[name].float().flatten() for name in COMPARED]) for weights in (found, right))
    return round(relative_error(actual, wanted), 4)


if __name__ == "__main__":
    main()
