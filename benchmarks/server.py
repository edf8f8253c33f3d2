"""A server under load on this CPU: `python benchmarks/server.py [BUNDLE …]` writes results/server.json and server.svg.

For each bundle, beside the embedded one, 1, 2, 4, 8 and 16 clients stream speech at the same time from the server as it is, and 1
and 8 from the same server with `--max-active 1` and in plain threads of one process. The three take turns for `--rounds` rounds.

aggregate: seconds of audio ÷ seconds. first: seconds from a request to its first sound. dry: seconds of silence within streams.
`--soak N` sends N short requests to the embedded voice and records the memory of the server. Two bundles of 1.5, two rounds and
10,000 such requests take about 20 minutes on two cores.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, median
from tempfile import NamedTemporaryFile
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import click
import numpy as np

from harness import HERE, python, tell
from record import write_record

CLIENT = HERE / "server_clients.py"
CLIENTS = (1, 2, 4, 8, 16)
COMPARED = (1, 8)
"""Clients of the ways that are only compared."""
WAYS: Mapping[str, Sequence[str]] = {"batch": (), "one at a time": ("--max-active", "1"), "threads": ()}
FRAMES, SOAK_FRAMES = 48, 4
"""Frames of a reply: full-size checkpoints of random weights do not end by themselves."""
DRY_S = 0.01
"""Shorter gaps are not heard as such."""


@click.command(context_settings={"show_default": True})
@click.argument("bundles", nargs=-1, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--rounds", type=click.IntRange(min=1), default=2, help="Turns of each way and number of clients.")
@click.option("--requests", type=click.IntRange(min=1), default=2, help="Requests of each client.")
@click.option("--most", type=click.IntRange(min=1), default=CLIENTS[-1], help="Most clients.")
@click.option("--soak", type=click.IntRange(min=0), default=0, help="Short requests for the memory of the server.")
@click.option("--output", type=click.Path(path_type=Path), help="Record to write.  [default: results/server.json]")
def main(bundles: tuple[Path, ...], rounds: int, requests: int, most: int, soak: int, output: Path | None) -> None:
    """Measure a server, and write the record and its plot."""
    sizes = {way: [n for n in (CLIENTS if way == "batch" else COMPARED) if n <= most] for way in WAYS}
    found: dict[str, Any] = {}
    for bundle in ("minnow", *map(str, bundles)):
        name = Path(bundle).name
        turns: dict[str, dict[int, list[dict[str, float]]]] = {way: {n: [] for n in of} for way, of in sizes.items()}
        for n in range(rounds):
            for way, options in WAYS.items():
                tell(f"round {n + 1} of {rounds}: {name}, {way}")
                for clients, said in measure(bundle, way, options, sizes[way], requests).items():
                    turns[way][clients].append(said)
        found[name] = {way: {str(n): medians(said) for n, said in of.items()} for way, of in turns.items()}
        found[name]["goals"] = goals(found[name]["batch"])
    measured: dict[str, Any] = {"method": {"rounds": rounds, "requests": requests, "frames": FRAMES}, "bundles": found}
    if soak:
        measured["soak"] = soaked(soak)
    path = write_record("server", measured, output)
    tell(f"written: {path} and {plot(measured, path.with_suffix('.svg'))}")


def measure(bundle: str, way: str, options: Sequence[str], sizes: Sequence[int], requests: int) -> dict[int, dict[str, float]]:
    """Return the figures of each number of clients."""
    if way == "threads":
        return {n: figures(json.loads(python(CLIENT, way, bundle, n, requests, FRAMES))) for n in sizes}
    found = {}
    with server(bundle, *options) as (process, url):
        clients(url, 1, 1, FRAMES)
        for n in sizes:
            before, cpu_s = metrics(url), cpu_seconds(process.pid)
            found[n] = figures(clients(url, n, requests, FRAMES))
            after = metrics(url)
            rows, batches = (after[name] - before[name] for name in ("fishrt_rows_total", "fishrt_steps_total"))
            found[n] |= {
                "cpu_s": cpu_seconds(process.pid) - cpu_s,
                "batch": rows / batches if batches else 0.0,
                "memory_mb": memory_mb(process.pid),
            }
    return found


def clients(url: str, count: int, requests: int, frames: int) -> dict[str, Any]:
    """Run clients of a server in a process of their own; see `server_clients.py`."""
    said: dict[str, Any] = json.loads(python(CLIENT, "http", url, count, requests, frames))
    return said


@contextmanager
def server(bundle: str, *options: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Run a server on a free port until the block ends. Yield its process and its address once it is ready to speak."""
    of = [] if bundle == "minnow" else ["--bundle", bundle]
    command = [sys.executable, "-m", "fishrt", "serve", "--port", "0", "--provider", "cpu", *of, *options]
    with NamedTemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            while not (said := re.search(r"http://[\d.]+:\d+", Path(log.name).read_text())):
                if process.poll() is not None:
                    raise click.ClickException(f"the server ended: {Path(log.name).read_text()}")
                time.sleep(0.05)
            while not is_ready(said[0]):
                time.sleep(0.05)
            yield process, said[0]
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()


def is_ready(url: str) -> bool:
    """Return whether a server would speak now."""
    try:
        with urlopen(f"{url}/health") as reply:
            return bool(reply.status == 200)
    except URLError:
        return False


def metrics(url: str) -> dict[str, float]:
    """Return the counts of a server."""
    with urlopen(f"{url}/metrics") as reply:
        lines = (line.decode().split() for line in reply if not line.startswith(b"#"))
        return {name: float(value) for name, value in lines if name.endswith("_total")}


def cpu_seconds(pid: int) -> float:
    """Return the processor time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_mb(pid: int) -> float:
    """Return the memory of a process now."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0]) / 1000


def figures(said: Mapping[str, Any]) -> dict[str, float]:
    """Return the figures of what clients heard."""
    of = said["requests"]
    first = [request["first_s"] for request in of]
    return {
        "aggregate": sum(request["audio_s"] for request in of) / said["wall_s"],
        **{f"first_p{p}_s": float(np.percentile(first, p)) for p in (50, 95, 99)},
        "slowest_first": max(first) / median(first),
        "dry_streams": mean(request["dry_s"] > DRY_S for request in of),
        "dry_s": mean(request["dry_s"] for request in of),
    }


def medians(turns: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the median of each figure over the rounds."""
    return {name: round(median(turn[name] for turn in turns), 4) for name in turns[0]}


def goals(by_clients: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return the ratios of 8 clients to one that the server aims at; none without 8 clients.

    dry_streams: the largest share of streams that ran dry, of as many clients as can be served in real time; if there are any.
    """
    if "8" not in by_clients:
        return {}
    dry = [said["dry_streams"] for clients, said in by_clients.items() if said["aggregate"] >= int(clients)]
    one, eight = by_clients["1"], by_clients["8"]
    return {
        "aggregate": round(eight["aggregate"] / one["aggregate"], 3),
        "first_p95": round(eight["first_p95_s"] / one["first_p95_s"], 3),
        "slowest_first": eight["slowest_first"],
        **({"dry_streams": max(dry)} if dry else {}),
    }


def soaked(requests: int) -> dict[str, float]:
    """Return the memory of a server after a tenth of some short requests, and after all."""
    with server("minnow") as (process, url):
        clients(url, 8, max(1, requests // 80), SOAK_FRAMES)
        early = memory_mb(process.pid)
        clients(url, 8, requests // 8 - max(1, requests // 80), SOAK_FRAMES)
        return {"requests": requests // 8 * 8, "early_mb": round(early, 1), "memory_mb": round(memory_mb(process.pid), 1)}


def plot(measured: Mapping[str, Any], path: Path) -> Path:
    """Plot the aggregate and the first sound against the number of clients. Return the path."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "fishrt"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for color, (name, ways) in enumerate(measured["bundles"].items()):
        for way, style in zip(WAYS, ("-", ":", "--"), strict=True):
            sizes = list(map(int, ways[way]))
            for axis, figure_of in zip(axes, ("aggregate", "first_p95_s"), strict=True):
                values = [ways[way][str(n)][figure_of] for n in sizes]
                axis.plot(sizes, values, style, color=f"C{color}", marker=".", label=f"{name}, {way}")
    axes[0].set(xlabel="clients", ylabel="seconds of audio a second")
    axes[1].set(xlabel="clients", ylabel="first sound, seconds (95th percentile)", yscale="log")
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
    axes[0].legend(fontsize="small")
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    plt.close(figure)
    return path


if __name__ == "__main__":
    main()
