"""Fills the marked tables in README.md from the records: `python benchmarks/table.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from record import RESULTS

README = Path(__file__).parent.parent / "README.md"
HEAD = (
    "weights",
    "size",
    "frame",
    "of real time",
    "times torch¹",
    "slow step, share of bandwidth",
    "codec decode, RTF",
    "text to speech, RTF",
    "first audio, known voice",
    "load, first / later",
    "memory",
)


def table(record: dict[str, Any]) -> str:
    """The lines between the markers: a table with a row for each family and recipe, and what it was measured on."""
    lines = [f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|"]
    for family, found in record["families"].items():
        for recipe, bench in found["recipes"].items():
            compared = found["compared"] if found["compared"]["recipe"] == recipe else None
            lines.append(f"| {' | '.join([f'{family} {recipe}', *_cells(bench, compared)])} |")
    machine = record["environment"]
    versions = machine["versions"]
    lines += [
        "",
        f"¹ The better of the same modules in torch {versions['torch']}, eager, float32 and bfloat16, in the same loop and run. "
        f"Random weights of official size; {machine['cpu']}, {machine['cores']} cores, which read "
        f"{_widest(record):.0f} GB/s; ONNX Runtime {versions['onnxruntime']}.",
    ]
    return "\n".join(lines)


def _widest(record: dict[str, Any]) -> float:
    """The best read bandwidth that any of the runs met, in GB/s."""
    return max(bench["machine"]["read_gb_s"] for found in record["families"].values() for bench in found["recipes"].values())


def _cells(bench: dict[str, Any], compared: dict[str, Any] | None) -> list[str]:
    frame, load, memory = bench["frame"]["median_ms"], bench["load"], bench["memory"]["speaking_peak_bytes"]
    ratio = compared["frame_ms"].get("speed_up") if compared else None
    return [
        f"{bench['bundle']['bytes'] / 1e9:.2f} GB",
        f"{frame:.1f} ms",
        f"{frame * bench['bundle']['frame_rate'] / 1e3:.0%}",
        f"{ratio:.1f} ×" if ratio else "",
        f"{bench['weights']['slow_share']:.0%}",
        f"{bench['codec']['decode']['rtf']:.2f}",
        f"{bench['speak']['rtf']:.2f}",
        f"{bench['ttfa']['known_voice']['median_ms']:.0f} ms",
        f"{load['cold_s']:.1f} / {load['cached_s']:.1f} s",
        f"{memory / 2**30:.1f} GiB" if memory else "",
    ]


def precision_table(record: dict[str, Any]) -> str:
    """What each recipe costs on minnow: a row for each."""
    head = (
        "recipe",
        "bundle",
        "word error rate",
        "against fp32",
        "95 % interval",
        "voice recognised",
        "ended by itself",
        "signal over error",
    )
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, found in record["summary"].items():
        low, high = found["difference_95_percent"]
        cells = (
            name,
            f"{found['bytes'] / 1e6:.1f} MB",
            f"{found['word_error_rate']:.1%}",
            "" if name == "fp32" else f"{100 * found['difference']:+.1f} points",
            "" if name == "fp32" else f"{100 * low:+.1f} and {100 * high:+.1f}",
            f"{found['voice_recognised']:.1%}",
            f"{found['ended_by_itself']:.1%}",
            f"{found['snr_db']:.1f} dB, {found['least_snr_db']:.1f} at least" if "snr_db" in found else "",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


TABLES = {"cpu": table, "minnow-precision": precision_table}
"""By the name of a record and of the markers in the README."""


def filled(text: str, name: str, lines: str) -> str:
    """The text with `lines` between the markers of this name. Raises ValueError unless both stand in it once, in order."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"expected {begin} and then {end}, once each")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{lines}\n{end}{rest.split(end)[1]}"


@click.command()
@click.option("--records", type=click.Path(path_type=Path), default=RESULTS, help="Folder of the records.")
@click.option("--readme", type=click.Path(path_type=Path), default=README)
def main(records: Path, readme: Path) -> None:
    """Writes the table of each record into the README."""
    text = readme.read_text()
    for name, make in TABLES.items():
        text = filled(text, name, make(json.loads((records / f"{name}.json").read_text())))
    readme.write_text(text)
    click.echo(f"written: {readme}")


if __name__ == "__main__":
    main()
