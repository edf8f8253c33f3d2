"""Plots of a record of `cpu.py`: `python benchmarks/plot.py [RECORD]` writes cpu-context.svg and cpu-frame.svg into its folder.

cpu-context: RTF of the language model against the context. cpu-frame: the parts of a frame's time. Needs the `dev` extra.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from fishrt.metrics import rtf
from record import RESULTS

PARTS = ("slow AR", "fast AR", "loop", "codec")
_METADATA = {"Date": None, "Creator": None}
"""No metadata that changes, so that the same record gives the same file."""


def write_plots(record: Path) -> list[Path]:
    """Write both plots of a record into its folder. Return their paths."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "fishrt"
    families = json.loads(record.read_text())["families"]
    return [
        plot(families, record.with_name(f"{record.stem}-{name}.svg"))
        for name, plot in (("context", plot_contexts), ("frame", plot_frames))
    ]


def plot_contexts(families: dict[str, Any], path: Path) -> Path:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    points: dict[int, float] = {}
    for n, (family, found) in enumerate(families.items()):
        rate = next(iter(found["recipes"].values()))["bundle"]["frame_rate"]
        sides = {f"{family} {found['compared']['recipe']}": ("-", found["turns"]["ours"])}
        sides |= {f"{family} torch {peer}": (style, found["turns"][peer]) for peer, style in _styles(found)}
        for label, (style, turns) in sides.items():
            points = context_rtf(turns, rate)
            axes.plot(list(points), list(points.values()), style, color=f"C{n}", marker=".", label=label)
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="context, positions",
        ylabel="RTF of the language model\n(below 1: faster than real time)",
    )
    axes.set_xticks(contexts := sorted(points), map(str, contexts))
    axes.xaxis.minorticks_off()
    axes.yaxis.set_major_formatter("{x:g}")
    figure.legend(fontsize="small", loc="outside right upper")
    figure.savefig(path, metadata=_METADATA)
    plt.close(figure)
    return path


def _styles(found: dict[str, Any]) -> list[tuple[str, str]]:
    return [(peer, style) for peer, style in (("fp32", ":"), ("bf16", "--")) if peer in found["turns"]]


def context_rtf(turns: list[dict[str, Any]], frame_rate: float) -> dict[int, float]:
    """Return context → RTF of a frame: the slow step at that context plus the rest of a frame; the best of the turns."""
    found: dict[int, float] = {}
    for turn in turns:
        rest_ms = turn["frame"]["median_ms"] - turn["slow_step"]["median_ms"]
        for row in turn["contexts"]:
            value = rtf((row["median_ms"] + rest_ms) / 1e3, 1 / frame_rate)
            found[row["context"]] = min(found.get(row["context"], value), value)
    return found


def plot_frames(families: dict[str, Any], path: Path) -> Path:
    from matplotlib import pyplot as plt

    rows = {
        f"{family} {recipe}": (frame_parts(bench), 1e3 / bench["bundle"]["frame_rate"])
        for family, found in families.items()
        for recipe, bench in found["recipes"].items()
    }
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.4 * len(rows)), layout="constrained")
    for n, part in enumerate(PARTS):
        starts = [sum(list(parts.values())[:n]) for parts, _ in rows.values()]
        axes.barh(list(rows), [parts[part] for parts, _ in rows.values()], left=starts, label=part)
    for place, (_, budget) in enumerate(rows.values()):
        axes.plot([budget, budget], [place - 0.4, place + 0.4], color="black", label="real time" if place == 0 else None)
    axes.invert_yaxis()
    axes.set(xlabel="ms a frame")
    figure.legend(fontsize="small", loc="outside right upper")
    figure.savefig(path, metadata=_METADATA)
    plt.close(figure)
    return path


def frame_parts(bench: dict[str, Any]) -> dict[str, float]:
    """Return milliseconds of a frame by PARTS, from the medians of `fishrt bench`."""
    fast = bench["fast_step"]["median_ms"] * bench["fast_steps_per_frame"]
    codec = bench["codec"]["decode"]["rtf"] * 1e3 / bench["bundle"]["frame_rate"]
    return dict(zip(PARTS, (bench["slow_step"]["median_ms"], fast, bench["loop"]["median_ms"], codec), strict=True))


@click.command()
@click.argument("record", type=click.Path(path_type=Path), default=RESULTS / "cpu.json")
def main(record: Path) -> None:
    """Plot a RECORD."""
    for path in write_plots(record):
        click.echo(path)


if __name__ == "__main__":
    main()
