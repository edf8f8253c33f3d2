"""Correctness, speed and memory on this GPU, compared with torch: `python benchmarks/gpu.py` writes results/gpu.json.

For each family, a checkpoint of official size with random weights is made and exported. Each bundle's graphs are compared with
torch on the device, run in batches of 1 to 64, and speak. Then fishrt and the peers (the exporter's torch modules in bfloat16,
eager and compiled, in the same loop; see `torch_peer`) alternate for `--rounds` rounds, each turn in a new process. Ratios are of
medians over the rounds.

Time on a rented machine is short: a part that fails, or for which no time is left, is recorded as an error; the next parts run
nevertheless, and the record is written after each part. `--resume` continues a record. Needs the `dev` extra with the GPU's ONNX
Runtime, a torch that supports the device, and for S2 25 GB of disk.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np

from fishrt.metrics import bandwidth_share, per_second
from fishrt_engines.errors import ProviderError
from fishrt_engines.machine import cpu_name, gpus
from fishrt_engines.providers import resolve_provider
from full_size import FAMILIES
from gpu_process import CONTEXT, SIDES, TORCH_DTYPE, read_findings
from harness import HERE, Made, ProcessError, compare, inner, python, shared_options, tell
from record import RESULTS, environment, write_record
from torch_peer import COMPILED

_FORMS = ("--target", "cuda", "--target", "tensorrt")
RECIPES = {"fp32": _FORMS, "int8": ("--precision", "int8", *_FORMS), "int4": ("--precision", "int4", *_FORMS)}
"""Options of `fishrt export` by recipe. fp32 keeps the checkpoint's bfloat16; the device decides the precision of products."""
REAL_TIME = 0.5
"""The largest real-time factor of a batch that counts as served."""
MEASURED, SMOKED = ("s2", "s1", "1.5"), "1.2"
"""Default families; for `--smoke` the one with the fastest export."""
FIGURES = {
    "frame_ms": ("frames", "frame", "median_ms"),
    "prefill_ms": ("prefill", "median_ms"),
    "codec_decode_ms": ("codec", "decode", "median_ms"),
}
"""The places of the compared figures in a measurement."""


@click.command(context_settings={"show_default": True})
@click.option("--family", "families", multiple=True, type=click.Choice(list(FAMILIES)), help="[default: s2, s1, 1.5]")
@click.option(
    "--recipe",
    "recipes",
    multiple=True,
    type=click.Choice(list(RECIPES)),
    default=("fp32",),
    help="The first one alternates with torch.",
)
@shared_options
@click.option("--provider", type=click.Choice(["cuda", "tensorrt", "cpu"]), default="cuda")
@click.option("--rounds", type=click.IntRange(min=1), default=3, help="Turns of fishrt and of each peer.")
@click.option("--frames", type=click.IntRange(min=2), default=64, help="Frames of each measurement.")
@click.option("--most-batch", type=click.IntRange(min=1), default=64, help="The largest batch.")
@click.option("--budget-s", type=float, help="Time limit in seconds; parts after it are skipped.")
@click.option("--resume", is_flag=True, help="Continue the record in OUT: parts without an error are not measured again.")
@click.option("--out", type=click.Path(path_type=Path), help="Record to write.  [default: results/gpu.json]")
def main(
    families: Sequence[str],
    recipes: Sequence[str],
    checkpoints: Path | None,
    bundles: Path | None,
    provider: str,
    rounds: int,
    frames: int,
    most_batch: int,
    budget_s: float | None,
    resume: bool,
    smoke: bool,
    out: Path | None,
) -> None:
    """Make missing checkpoints and bundles, measure and compare, and write the record."""
    deadline = None if budget_s is None else time.monotonic() + budget_s
    try:
        resolve_provider(provider)
    except ProviderError as error:
        raise click.UsageError(f"{error}. {error.hint or ''}") from None
    if smoke:
        families, recipes, rounds, frames, most_batch = families[:1] or (SMOKED,), recipes[:1], 1, 4, 2
    method = {
        "provider": provider,
        "recipes": {name: list(RECIPES[name]) for name in recipes},
        "rounds": rounds,
        "frames": frames,
        "most_batch": most_batch,
        "batch_context": CONTEXT,
        "weights": "random and tiny" if smoke else "random, of official size and layout",
        "torch": {"dtype": TORCH_DTYPE, "compiled": COMPILED},
    }
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fishrt-bench-")))
        out = out or (work / "smoke.json" if smoke else RESULTS / "gpu.json")
        run = _Run(work, out, {"method": method, "device": describe_device(provider)}, deadline, resume=resume)
        run.part(run.record, "copies", lambda: run.findings("copies", "--provider", provider))
        for family in families or MEASURED:
            places = (checkpoints or work / "checkpoints", bundles or work / "bundles")
            made = Made(family, *places, RECIPES, tiny=smoke, run=run.process)
            _measure_family(run, made, recipes, provider, rounds, frames, most_batch)
        tell(f"written: {out}")


class _Run:
    """The record, which is written after every part, and the deadline of the run."""

    def __init__(self, work: Path, out: Path, head: Mapping[str, Any], deadline: float | None, *, resume: bool) -> None:
        """head: the first fields of the record; a record to be resumed must have the same."""
        self._work, self._out, self._deadline = work, out, deadline
        self._hidden: dict[str, str] = {str(work): "WORK"}
        self.record: dict[str, Any] = {**head, "families": {}}
        if resume and out.is_file():
            before = json.loads(out.read_text())
            now = json.loads(json.dumps({"environment": _lasting(environment()), **head}))
            if other := [name for name in now if _lasting(before.get(name, {})) != now[name]]:
                raise click.UsageError(f"{out} cannot be resumed: its {' and '.join(other)} is not this run's")
            self.record = {name: value for name, value in before.items() if name not in ("benchmark", "environment")}

    def hide(self, folder: Path, name: str) -> None:
        """Replace a folder of this machine by `name` in the record."""
        self._hidden[str(folder)] = name

    def part(self, place: dict[str, Any], name: str, work: Callable[[], Any], of: str = "") -> bool:
        """Put the result of `work`, or its error, under a name. Return whether it succeeded. of: the subject, for messages."""
        if name in place and not _lacks(place[name]):
            return True
        if self._deadline is not None and time.monotonic() >= self._deadline:
            place.setdefault(name, {"skipped": "the time that the run was given is over"})
        else:
            tell(f"{of} {name}".strip())
            try:
                place[name] = work()
            except Exception as error:
                found = error.found if isinstance(error, ProcessError) else {}
                place[name] = {**found, "error": str(error)}
                tell(f"{of} {name}: {error}")
        self.flush()
        return not _lacks(place[name])

    def flush(self) -> None:
        write_record("gpu", json.loads(self._without_folders(json.dumps(self.record))), self._out)

    def process(self, *arguments: object) -> str:
        """See `python`; the process is ended at the deadline."""
        return python(*arguments, timeout_s=None if self._deadline is None else max(1.0, self._deadline - time.monotonic()))

    def findings(self, part: str, *arguments: object) -> dict[str, Any]:
        """Return the findings of a `gpu_process`. Raises ProcessError with those up to a failure."""
        path = self._work / "findings"
        path.unlink(missing_ok=True)
        begun = time.perf_counter()
        try:
            self.process(HERE / "gpu_process.py", part, path, *arguments)
        except ProcessError as failure:
            failure.found = read_findings(path)
            raise
        return {**read_findings(path), "seconds": round(time.perf_counter() - begun, 1)}

    def _without_folders(self, text: str) -> str:
        for folder, name in self._hidden.items():
            text = text.replace(folder, name)
        return text


def describe_device(provider: str) -> dict[str, Any]:
    """Return the properties of the device."""
    if provider == "cpu":
        return {"name": cpu_name()}
    gpu = next(iter(gpus() or ()), None)
    if gpu is None:
        return {"name": None}
    capability = ".".join(map(str, gpu.compute_capability))
    return {"name": gpu.name, "compute_capability": capability, "driver": gpu.driver, "memory_bytes": gpu.total_bytes}


def _measure_family(
    run: _Run, made: Made, recipes: Sequence[str], provider: str, rounds: int, frames: int, most_batch: int
) -> None:
    run.hide(made.checkpoint.absolute(), "CHECKPOINT")
    place = run.record["families"].setdefault(made.family, {})
    if not run.part(place, "checkpoint", made.write_checkpoint, made.family):
        return
    for recipe in recipes:
        own = place.setdefault("recipes", {}).setdefault(recipe, {})
        _measure_bundle(run, made, recipe, own, provider, rounds if recipe == recipes[0] else 0, frames, most_batch)


def build_plans(run: _Run, bundle: Path, most_batch: int) -> dict[str, Any]:
    begun = time.perf_counter()
    run.process("-m", "fishrt", "build-trt", "-q", "--max-batch", most_batch, bundle)
    return {"seconds": round(time.perf_counter() - begun, 1)}


def _measure_bundle(
    run: _Run, made: Made, recipe: str, place: dict[str, Any], provider: str, rounds: int, frames: int, most_batch: int
) -> None:
    bundle, of = made.bundle(recipe), f"{made.family} {recipe}"
    run.hide(bundle.absolute(), "BUNDLE")
    if not run.part(place, "export", lambda: made.export(recipe), of):
        return
    if provider == "tensorrt" and not run.part(place, "plans", lambda: build_plans(run, bundle, most_batch), of):
        return
    shared = ("--bundle", bundle, "--checkpoint", made.checkpoint, "--provider", provider, "--frames", frames)
    run.part(place, "graphs", lambda: run.findings("graphs", *shared), of)
    run.part(place, "batches", lambda: run.findings("batches", *shared, "--most-batch", most_batch), of)
    run.part(place, "speech", lambda: run.findings("speech", *shared), of)
    for n in range(1, rounds + 1):
        for side in SIDES:
            turns = place.setdefault("turns", {}).setdefault(side, {})
            run.part(turns, str(n), partial(run.findings, side, *shared), f"{of} {side}, round")
    place["reached"] = reached(place, run.record["copies"].get("copy_gb_s"))
    run.flush()


def reached(found: Mapping[str, Any], copy_gb_s: Any) -> dict[str, Any]:
    """Return the key figures of one bundle; None for those that were not measured."""
    batches = [row for name, row in found.get("batches", {}).items() if name.startswith("batch ") and "error" not in row]
    served = [row for row in batches if row["rtf"] < REAL_TIME]
    best = max(served, key=lambda row: row["acoustic_tokens_per_s"], default=None)
    first = batches[0] if batches else None
    requests = inner(found, "speech", "requests")
    loop = [inner(turn, "frames", "rtf") for turn in (inner(found, "turns", "ours") or {}).values()]
    loop = [value for value in loop if value is not None]
    weights = inner(found, "batches", "weights")
    return {
        "rtf": round(float(np.median(loop)), 4) if loop else None,
        "rtf_of_graphs": first and first["rtf"],
        "rtf_of_requests": inner(requests, "speak", "rtf"),
        "first_audio_ms": inner(requests, "ttfa", "known_voice", "median_ms"),
        "codec_decode_rtf": inner(found, "speech", "codec", "decode", "rtf"),
        "largest_batch": max((row["batch"] for row in served), default=None),
        "acoustic_tokens_per_s": best and best["acoustic_tokens_per_s"],
        "bandwidth": first and weights and _bandwidth(first, weights, copy_gb_s),
        "compared": compare({side: own.values() for side, own in found.get("turns", {}).items()}, FIGURES),
    }


def _bandwidth(row: Mapping[str, Any], weights: Mapping[str, Any], copy_gb_s: Any) -> dict[str, Any]:
    """Return read weights ÷ time in GB/s, and its share of the copy bandwidth, at a batch of 1."""
    parts = {
        "slow_step": weights["slow_bytes"],
        "frame_call": weights["fast_bytes"] * weights["fast_steps"],
        "frame": weights["frame_bytes"],
    }
    found: dict[str, Any] = {}
    for name, size in parts.items():
        seconds = row[name]["median_ms"] / 1e3
        found[f"{name}_gb_s"] = round(per_second(size, seconds) / 1e9, 1)
        if isinstance(copy_gb_s, float):
            found[f"{name}_share"] = round(bandwidth_share(size, seconds, copy_gb_s * 1e9), 4)
    return found


def _lacks(found: Any) -> bool:
    """Return whether a part, or one of its measurements, is missing or failed."""
    if not isinstance(found, Mapping):
        return False
    whole = [found, *(value for name, value in found.items() if not name.startswith("batch "))]
    return any("error" in value or "skipped" in value for value in whole if isinstance(value, Mapping))


def _lasting(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return an environment without its date and its memory, which grows with use on some virtual machines."""
    return {name: value for name, value in section.items() if name not in ("date", "memory_bytes")}


if __name__ == "__main__":
    main()
