"""What the job engine costs, and what batches save: `python benchmarks/scale.py` writes results/scale.json.

The same texts are spoken in turns, for `--rounds` rounds: by a plain loop of `TTS.speak` and `write_audio`, by `render` row by
row, and by `render` in a batch. Beside that, a job of many rows whose worker takes no time shows what a row costs the engine:
its plan, its commit and its log. That job is then run again, with all rows done.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np

from fishrt.audio.encode import encode_audio, write_audio
from fishrt.bulk.render import USUAL_BATCH, RenderJob, Speakable, render
from fishrt.bulk.rows import canonical
from fishrt.jobs.engine import run
from fishrt.jobs.folder import Made
from fishrt.jobs.threads import in_threads
from fishrt.request import Request
from fishrt.tts import TTS
from harness import tell
from record import write_record

TEXTS = (
    "Good morning.",
    "The sun is shining, and the birds are singing in the trees.",
    "She opened the door and looked into the garden.",
    "How are you today?",
    "A long road leads over the hills to the sea.",
    "We will meet again in the evening.",
)


class Ready:
    """A worker that has every row's sound already."""

    batch = 1

    def compute(self, payload: Speakable) -> Made:
        data = encode_audio(np.zeros(160, np.float32), 16000, payload.format, f"fishrt {payload.digest} end")
        return Made(data, {"seed": payload.request.seed, "seconds": 0.01, "stop": ["end"]})

    def close(self) -> None:
        pass


def rows_of(count: int) -> list[dict[str, Any]]:
    return [{"id": f"r{n}", "text": TEXTS[n % len(TEXTS)], "seed": n} for n in range(count)]


def seconds(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def speaking(tts: TTS, rows: list[dict[str, Any]], rounds: int) -> dict[str, Any]:
    """Speak the rows in three ways, in turns. Return the medians and their ratios to the loop."""

    def loop(folder: Path) -> None:
        for row in rows:
            speech = tts.speak(row["text"], seed=row["seed"])
            write_audio(folder / f"{row['id']}.wav", speech.pcm, speech.sample_rate)

    ways: dict[str, Callable[[Path], object]] = {
        "loop": loop,
        "render": lambda folder: render(tts, rows, folder, batch=1),
        f"render_batch_{USUAL_BATCH}": lambda folder: render(tts, rows, folder, batch=USUAL_BATCH),
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            tell(f"round {number} of {rounds}: {name}")
            with TemporaryDirectory() as folder:
                spent = seconds(lambda way=way, folder=folder: way(Path(folder)))
            if number:  # the first one opens graphs and reads voices
                taken[name].append(spent)
    return {
        name: {
            "row_ms": round(1000 * median(times) / len(rows), 2),
            "least_ms": round(1000 * min(times) / len(rows), 2),
            "most_ms": round(1000 * max(times) / len(rows), 2),
            "rows_per_s": round(len(rows) / median(times), 2),
            "faster_than_loop": round(median(a / b for a, b in zip(taken["loop"], times, strict=True)), 3),
        }
        for name, times in taken.items()
    }


def engine(tts: TTS, count: int) -> dict[str, Any]:
    """Make a job of many rows whose sound is ready, then run it again."""
    rows = rows_of(count)
    data = b"".join(canonical(row) + b"\n" for row in rows)
    with TemporaryDirectory() as folder:
        out = Path(folder, "out")
        job = RenderJob(tts, data, "jsonl", out, base=Path(), defaults=Request(""), format="wav", batch=1)
        first = seconds(lambda: run(job, out, in_threads(Ready())))
        again = [seconds(lambda: render(tts, data, out, batch=1)) for _ in range(3)]
        (out / "manifest.jsonl").unlink()
        lost = seconds(lambda: render(tts, data, out, batch=1))
    return {
        "rows": count,
        "row_ms": round(1000 * first / count, 3),
        "second_run_s": round(median(again), 2),
        "lost_manifest_s": round(lost, 2),
    }


@click.command(context_settings={"show_default": True})
@click.option("--bundle", type=click.Path(path_type=Path), help="A bundle.  [default: the embedded voice]")
@click.option("--rows", type=click.IntRange(min=1), default=24, help="Rows that are spoken in each turn.")
@click.option("--rounds", type=click.IntRange(min=1), default=5, help="Turns of each way.")
@click.option("--many", type=click.IntRange(min=1), default=10_000, help="Rows of the job whose sound is ready.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads of the graphs.  [default: the physical cores]")
@click.option("--output", type=click.Path(path_type=Path), help="Record to write.  [default: results/scale.json]")
def main(bundle: Path | None, rows: int, rounds: int, many: int, threads: int | None, output: Path | None) -> None:
    """Measure the job engine, and write the record."""
    load = os.getloadavg()[0]
    with TTS.load(bundle, provider="cpu", threads=threads) as tts:
        spoken = speaking(tts, rows_of(rows), rounds)
        cost = engine(tts, many)
        name = tts.bundle.manifest.name
    cost["share_of_a_row"] = round(cost["row_ms"] / spoken["loop"]["row_ms"], 4)
    method = {"bundle": name, "rows": rows, "rounds": rounds, "threads": threads, "load_before": round(load, 2)}
    tell(f"written: {write_record('scale', {'method': method, 'speaking': spoken, 'engine': cost}, output)}")


if __name__ == "__main__":
    main()
