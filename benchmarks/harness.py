"""What `cpu.py`, `gpu.py` and `versions.py` share: options, checkpoints, bundles, processes for measurements, and medians."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import click
import numpy as np

from fishrt.metrics import speed_up

HERE = Path(__file__).parent
_SHOWN_LINES = 40
"""Largest number of lines of a process's output that are shown."""


class ProcessError(click.ClickException):
    """The failure of a process."""

    found: Mapping[str, Any] = {}
    """Its findings up to the failure."""


def shared_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of these programs to a function."""
    folder = click.Path(path_type=Path)
    for option in (
        click.option("--smoke", is_flag=True, help="One tiny checkpoint, each part once, as a test. Times are meaningless."),
        click.option("--bundles", type=folder, help="Folder of bundles, FAMILY-RECIPE, made if missing."),
        click.option("--checkpoints", type=folder, help="Folder with a checkpoint for each family, made if missing."),
    ):
        command = option(command)
    return command


def python(*arguments: object, timeout_s: float | None = None, env: Mapping[str, str] | None = None) -> str:
    """Run a Python process that finds the modules of this folder, and return what it prints on standard output.

    env: changes of the environment. The last lines of its standard error are shown.
    Raises ProcessError if it fails or takes longer.
    """
    environment = {**os.environ, **(env or {})}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE), *filter(None, [environment.get("PYTHONPATH")])])
    with TemporaryFile("w+", errors="replace") as out, TemporaryFile("w+", errors="replace") as err:
        process = subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            stdout=out,
            stderr=err,
            process_group=0,
            env=environment,
        )
        try:
            status = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            with suppress(ProcessLookupError):  # ends the compiler's processes, too
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        out.seek(0), err.seek(0)
        printed, said = out.read(), err.read()
    if shown := said.strip().splitlines()[-_SHOWN_LINES:]:
        tell("\n".join(shown))
    if status is None:
        raise ProcessError("it was not finished at the deadline of the run")
    if status:
        lines = f"{printed}\n{said}".strip().splitlines()
        why = next((line for line in lines if line.startswith("error:")), lines[-1] if lines else "it said nothing")
        raise ProcessError(f"it ended with status {status}: {why}")
    return printed


class Made:
    """A family's checkpoint and its bundles, made if missing."""

    def __init__(
        self,
        family: str,
        checkpoints: Path,
        bundles: Path,
        recipes: Mapping[str, Sequence[str]],
        *,
        tiny: bool,
        size: Sequence[object] = (),
        run: Callable[..., str] = python,
    ) -> None:
        """recipes: options of `fishrt export` by name. size: more options of `python -m full_size`. run: see `python`."""
        self.family, self.checkpoint = family, checkpoints / family
        self._bundles, self._recipes, self._run = bundles, recipes, run
        self._size = [*(["--tiny"] if tiny else []), *size]

    def bundle(self, recipe: str) -> Path:
        return self._bundles / f"{self.family}-{recipe}"

    def write_checkpoint(self) -> dict[str, Any]:
        """Return the seconds of writing, if it was missing."""
        if self.checkpoint.is_dir():
            return {"made": "before"}
        begun, aside = time.perf_counter(), self.checkpoint.with_name(f"{self.checkpoint.name}.partial")
        self._run("-m", "full_size", self.family, aside, *self._size)
        aside.rename(self.checkpoint)
        return {"seconds": round(time.perf_counter() - begun, 1)}

    def export(self, recipe: str) -> dict[str, Any]:
        """Return seconds and memory of the export, from a file next to the bundle."""
        bundle = self.bundle(recipe)
        note = bundle.with_name(f"{bundle.name}.json")
        if not bundle.is_dir():
            bundle.parent.mkdir(parents=True, exist_ok=True)
            begun = time.perf_counter()
            exported = json.loads(self._run("-m", "fishrt", "export", "--json", *self._recipes[recipe], self.checkpoint, bundle))
            seconds = round(time.perf_counter() - begun, 1)
            note.write_text(json.dumps({"seconds": seconds, "peak_memory_bytes": exported["peak_memory_bytes"]}))
        return json.loads(note.read_text()) if note.is_file() else {"made": "before"}


def compare(turns: Mapping[str, Iterable[Any]], figures: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    """Return medians over the rounds, and for times the speed-up of the side "ours", if there is one, over the fastest peer.

    turns: measurements of each side. figures: the place of each figure in a measurement, which may lack it.
    """
    found: dict[str, Any] = {}
    for name, place in figures.items():
        measured = {side: [inner(turn, *place) for turn in own] for side, own in turns.items()}
        times = {side: [time for time in own if time is not None] for side, own in measured.items()}
        medians = {side: round(float(np.median(own)), 3) for side, own in times.items() if own}
        peers = {side: median for side, median in medians.items() if side != "ours"}
        best = min(peers, key=peers.__getitem__, default=None)
        found[name] = dict(medians)
        if best is not None and "ours" in medians:
            found[name] |= {"best_peer": best, "speed_up": round(speed_up(medians["ours"], peers[best]), 2)}
    return found


def inner(found: Any, *path: str) -> Any:
    """Return the value under nested names; None if one is missing."""
    for name in path:
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def tell(line: str) -> None:
    click.echo(line, err=True)
