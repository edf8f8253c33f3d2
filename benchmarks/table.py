"""Fill the marked tables of README.md and docs/ from the records: `python benchmarks/table.py`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from record import RESULTS

ROOT = Path(__file__).parent.parent
NAMES = {
    "1.2": "Fish Speech 1.2-SFT",
    "1.4": "Fish Speech 1.4",
    "1.5": "Fish Speech 1.5",
    "s1": "OpenAudio S1-mini",
    "s2": "Fish Audio S2-Pro",
}
NAMES_OF_FORMS = {
    "official": "official, bfloat16",
    "fp8": "FP8",
    "gptq": "GPTQ, 4 bits",
    "q8_0": "GGUF Q8_0",
    "nf4": "NF4",
    "official-int8": "official, `--precision int8`",
    "nf4-int8": "NF4, `--precision int8`",
}
SHORT = (", int4", ", int4-codec-int8")
"""Recipes of the short table."""
GIB = 2**30


def rows(head: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(row)} |" for row in cells)])


def measured(record: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yield each bundle of `cpu.json`: its name, the result of `fishrt bench`, and torch's time of a frame ÷ ours."""
    for family, found in record["families"].items():
        for recipe, bench in found["recipes"].items():
            ratio = found["compared"]["frame_ms"].get("speed_up") if found["compared"]["recipe"] == recipe else None
            yield f"{NAMES.get(family, family)}, {recipe}", bench, f"{ratio:.1f} ×" if ratio else ""


def speed_table(record: dict[str, Any]) -> str:
    """Return the table of the page on speed: a row for each family and recipe."""
    head = (
        "weights",
        "frame",
        "share of real time",
        "times torch",
        "memory read",
        "slow step, share of it",
        "codec decode, RTF",
        "text to speech, RTF",
        "first audio",
        "load, first / later",
    )
    return rows(head, [(name, *_speed_cells(bench, ratio)) for name, bench, ratio in measured(record)])


def _speed_cells(bench: dict[str, Any], ratio: str) -> tuple[str, ...]:
    frame, load = bench["frame"]["median_ms"], bench["load"]
    return (
        f"{frame:.1f} ms",
        f"{frame * bench['bundle']['frame_rate'] / 1e3:.0%}",
        ratio,
        f"{bench['machine']['read_gb_s']:.0f} GB/s",
        f"{bench['weights']['slow_share']:.0%}",
        f"{bench['codec']['decode']['rtf']:.2f}",
        f"{bench['speak']['rtf']:.2f}",
        _first_audio(bench),
        f"{load['cold_s']:.1f} / {load['cached_s']:.1f} s",
    )


def short_table(record: dict[str, Any]) -> str:
    """Return the table of the README."""
    head = ("weights", "bundle", "memory", "text to speech, RTF", "first audio", "language model, times torch")
    cells = [
        (name, _size(bench), _memory(bench), f"{bench['speak']['rtf']:.2f}", _first_audio(bench), ratio)
        for name, bench, ratio in measured(record)
        if name.endswith(SHORT)
    ]
    return rows(head, cells)


def memory_table(record: dict[str, Any]) -> str:
    """Return the table of the page on memory: of speaking and of the export."""
    head = ("weights", "bundle on disk", "memory to speak", "first start", "export, time", "export, memory")
    cells = []
    for family, found in record["families"].items():
        for recipe, bench in found["recipes"].items():
            export = found["export"][recipe]
            cells.append(
                (
                    f"{NAMES.get(family, family)}, {recipe}",
                    _size(bench),
                    _memory(bench),
                    f"{bench['memory']['cold_load_peak_bytes'] / GIB:.1f} GiB",
                    f"{export['seconds'] / 60:.0f} min",
                    f"{export['peak_memory_bytes'] / GIB:.1f} GiB",
                )
            )
    return rows(head, cells)


def device_table(_: dict[str, Any]) -> str:
    """Return the sizes of weights on a GPU, calculated from the official configs: language model in 16 bits, codec in float32."""
    from full_size import FAMILIES, count_parameters

    head = ("family", "language model, parameters", "codec, parameters", "weights on a GPU")
    cells = []
    for family in FAMILIES:
        model, codec = count_parameters(family)
        cells.append(
            (
                NAMES[family],
                f"{model / 1e9:.2f} billion",
                f"{codec / 1e9:.2f} billion",
                f"{(2 * model + 4 * codec) / GIB:.1f} GiB",
            )
        )
    return rows(head, cells)


def _size(bench: dict[str, Any]) -> str:
    return f"{bench['bundle']['bytes'] / 1e9:.1f} GB"


def _first_audio(bench: dict[str, Any]) -> str:
    return f"{bench['ttfa']['known_voice']['median_ms']:.0f} ms"


def _memory(bench: dict[str, Any]) -> str:
    peak = bench["memory"]["speaking_peak_bytes"]
    return f"{peak / GIB:.1f} GiB" if peak else ""


def quality_table(record: dict[str, Any]) -> str:
    """Return the table of minnow's quality, compared with the voices that it learned from."""
    found = record["summary"]
    cells = [
        ("word error rate", f"{found['word_error_rate']:.1%}", f"{found['flite_word_error_rate']:.1%}"),
        ("voice recognised", f"{found['voice_recognised']:.1%}", f"{found['flite_voice_recognised']:.1%}"),
        ("duration within 30 % of flite's", f"{found['duration_within_30_percent']:.1%}", ""),
        ("ended by itself", f"{found['stopped_by_end_token']:.1%}", ""),
    ]
    return rows((f"{found['sentences']} sentences", "minnow", "flite"), cells)


def precision_table(record: dict[str, Any]) -> str:
    """Return the table of minnow's quality by recipe."""
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
    cells = []
    for name, found in record["summary"].items():
        low, high = found["difference_95_percent"]
        cells.append(
            (
                name,
                f"{found['bytes'] / 1e6:.1f} MB",
                f"{found['word_error_rate']:.1%}",
                "" if name == "fp32" else f"{100 * found['difference']:+.1f} points",
                "" if name == "fp32" else f"{100 * low:+.1f} and {100 * high:+.1f}",
                f"{found['voice_recognised']:.1%}",
                f"{found['ended_by_itself']:.1%}",
                f"{found['snr_db']:.1f} dB, {found['least_snr_db']:.1f} at least" if "snr_db" in found else "",
            )
        )
    return rows(head, cells)


def server_table(record: dict[str, Any]) -> str:
    """Return the table of a server with many clients: a row for each bundle."""
    head = (
        "bundle",
        "1 client",
        "8 clients",
        "8, one at a time",
        "8 threads",
        "first sound, 1 client",
        "first sound, 8 clients",
        "8, one at a time",
        "slowest ÷ median first sound, 8 clients",
    )
    cells = []
    for name, found in record["bundles"].items():
        one, eight, alone, goals = found["batch"]["1"], found["batch"]["8"], found["one at a time"]["8"], found["goals"]
        cells.append(
            (
                name,
                f"{one['aggregate']:.2f}",
                f"{eight['aggregate']:.2f} ({goals['aggregate']:.2f} ×)",
                f"{alone['aggregate']:.2f}",
                f"{found['threads']['8']['aggregate']:.2f}",
                f"{one['first_p95_s']:.2f} s",
                f"{eight['first_p95_s']:.2f} s ({goals['first_p95']:.1f} ×)",
                f"{alone['first_p95_s']:.1f} s",
                f"{goals['slowest_first']:.1f}",
            )
        )
    return rows(head, cells)


def checkpoints_table(record: dict[str, Any]) -> str:
    """Return the table of exports of other forms of the weights: a row for each."""
    head = ("form", "checkpoint", "bundle", "memory of the export", "times the official one's", "error of the weights")
    cells = [
        (
            NAMES_OF_FORMS[side],
            f"{found['checkpoint_bytes'] / 1e9:.2f} GB",
            f"{found['bundle_bytes'] / 1e9:.2f} GB",
            f"{found['export']['peak_memory_bytes'] / 1e9:.2f} GB",
            f"{record['peak_ratios'][side]:.2f}",
            f"{found['weights_error']:.1%}" if found["weights_error"] else "none",
        )
        for side, found in record["sides"].items()
    ]
    return rows(head, cells)


Table = Callable[[dict[str, Any]], str]
TABLES: dict[str, tuple[str, str, Table]] = {
    "cpu-short": ("README.md", "cpu", short_table),
    "cpu": ("docs/speed.md", "cpu", speed_table),
    "cpu-memory": ("docs/platforms.md", "cpu", memory_table),
    "device-memory": ("docs/platforms.md", "cpu", device_table),
    "server": ("docs/speed.md", "server", server_table),
    "server-rows": ("docs/speed.md", "server-rows", server_table),
    "checkpoints": ("docs/checkpoints.md", "checkpoints", checkpoints_table),
    "minnow-precision": ("docs/export.md", "minnow-precision", precision_table),
    "minnow-quality": ("docs/verification.md", "minnow-quality", quality_table),
}
"""Page, record, and function of each table, by the name of its markers."""


def filled(text: str, name: str, lines: str) -> str:
    """Return the text with `lines` between the markers of this name. Raises ValueError unless both are there once, in order."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"expected {begin} and then {end}, once each")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{lines}\n{end}{rest.split(end)[1]}"


@click.command()
@click.option("--records", type=click.Path(path_type=Path), default=RESULTS, help="Folder of the records.")
@click.option("--root", type=click.Path(path_type=Path), default=ROOT, help="Folder of README.md and docs/.")
def main(records: Path, root: Path) -> None:
    """Write the table of each record into its page."""
    for name, (page, record, table) in TABLES.items():
        path = root / page
        lines = table(json.loads((records / f"{record}.json").read_text()))
        path.write_text(filled(path.read_text(encoding="utf-8"), name, lines), encoding="utf-8")
        click.echo(f"written: {path}")


if __name__ == "__main__":
    main()
