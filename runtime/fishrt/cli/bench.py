"""`fishrt bench`: the speed and memory of a bundle on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .base.commands import finish
from .base.options import Whole, load_bundle, new_reporter, output_options, threads_option


class _Sizes(click.ParamType[tuple[int, ...]]):
    """Whole numbers of at least 1, with commas between them."""

    name = "sizes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Return the numbers."""
        sizes = value.split(",") if isinstance(value, str) else value
        if any(str(size).strip() in ("", "0") or not str(size).strip().isdecimal() for size in sizes):
            self.fail(f"{value!r} is no list of whole numbers such as 1,2,4,8", param, ctx)
        return tuple(int(size) for size in sizes)


@click.command(short_help="Measure the speed and memory of a bundle here.")
@click.argument("bundle", required=False, type=click.Path(path_type=Path))
@click.option("--text", help="The text that is spoken.  [default: one sentence]")
@click.option("--frames", type=Whole(min=2), default=64, show_default=True, metavar="N", help="Frames of each timed generation.")
@click.option("--batch", type=_Sizes(), default=(), metavar="N,…", help="Also measure batches of 1,2,4,8, … generations.")
@threads_option
@click.option(
    "--provider", default="auto", show_default=True, metavar="NAME", help="Execution provider; see `fishrt speak --help`."
)
@output_options
def bench(bundle: Path | None, text: str | None, frames: int, batch: tuple[int, ...], threads: int | None, provider: str) -> None:
    """Measure how fast BUNDLE (default: the embedded voice) runs on this machine, and how much memory it needs.

    Measured are the steps of the language model, the codec, whole requests, and loading. It takes from 15 seconds (the embedded
    voice) to several minutes (large models). Other programs that use the processor distort the times.

    RTF, the real-time factor, is compute seconds ÷ audio seconds: below 1 is faster than real time. TTFA, the time to first
    audio, is measured from the request to its first sound.
    """
    from ..bench import BenchRequest, bench

    loaded = load_bundle(bundle)
    reporter = new_reporter()
    options: dict[str, Any] = {} if text is None else {"text": text}
    request = BenchRequest(provider=provider, threads=threads, frames=frames, batch=batch, **options)
    found = bench(loaded, request, lambda stage, part: reporter.show(f"measuring {stage}", part))
    reporter.clear()
    finish(found, printed="\n".join(f"{name:26} {value}" for name, value in _rows(found)))


def _rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the rows of the table: names, and values with units."""
    machine, weights, codec, speak = (found[name] for name in ("machine", "weights", "codec", "speak"))
    ttfa, load, memory, loop = (found[name] for name in ("ttfa", "load", "memory", "loop"))
    mb = {name: f"{(found_bytes or 0) / 1e6:,.0f} MB" if found_bytes else "unknown" for name, found_bytes in memory.items()}
    return [
        ("bundle", f"{found['bundle']['name']}, {found['bundle']['bytes'] / 1e6:,.1f} MB"),
        ("machine", f"{machine['cpu']}, {machine['cores']} cores, reads {machine['read_gb_s']} GB/s"),
        ("prefill", f"{found['prefill']['tokens_per_s']:,.0f} tokens/s"),
        *((name.replace("_", " "), _times(found[name])) for name in ("slow_step", "fast_step", "frame")),
        ("loop in a frame", f"{_times(loop)}, {loop['share']:.1%}"),
        ("frames", f"{found['frames_per_s']:,.1f} frames/s; real time is {found['bundle']['frame_rate']:.1f}"),
        ("weights read in a frame", f"{weights['frame_bytes'] / 1e6:,.1f} MB"),
        ("  achieved, slow step", f"{weights['slow_gb_s']} GB/s, {weights['slow_share']:.0%} of the machine's"),
        ("  achieved, frame", f"{weights['frame_gb_s']} GB/s, {weights['frame_share']:.0%} of the machine's"),
        *((f"codec {way}", f"RTF {codec[way]['rtf']:.3f}") for way in ("encode", "decode")),
        ("text to speech", f"RTF {speak['rtf']:.3f} ({speak['audio_s']:.2f} s of audio)"),
        ("TTFA, known voice", _times(ttfa["known_voice"])),
        ("TTFA, new voice", _times(ttfa["new_voice"])),
        ("load", f"cold {load['cold_s']:.2f} s, cached {load['cached_s']:.2f} s"),
        ("peak memory", f"speaking {mb['speaking_peak_bytes']}, first load {mb['cold_load_peak_bytes']}"),
        *(
            (f"batch of {row['rows']}", f"{row['frames_per_s']:,.1f} frames/s of all; step {_times(row)}")
            for row in found["batches"]
        ),
        *((f"slow step at {row['context']:,}", _times(row)) for row in found["contexts"]),
    ]


def _times(summary: dict[str, Any]) -> str:
    return f"{summary['median_ms']:,.2f} ms (95th percentile {summary['p95_ms']:,.2f})"
