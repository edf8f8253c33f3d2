"""A job as a command: its progress, the signals that end it, its result and its exit status."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...jobs.engine import BadRow, Outcome, Report, Stop, Told
from .commands import IncompleteError, Interrupted, finish, warn
from .options import new_reporter

_MOST_NOTES = 5


class Notes:
    """Warnings about single lines, of which the first few are printed; an input may have thousands."""

    def __init__(self) -> None:
        self._count = 0

    def add(self, text: str) -> None:
        """Print a warning, unless there were many."""
        self._count += 1
        if self._count <= _MOST_NOTES:
            warn(text)

    def end(self, where: str) -> None:
        """Say how many were not printed. where: what lists them all."""
        if self._count > _MOST_NOTES:
            warn(f"and {self._count - _MOST_NOTES:,} more such warnings; {where}")


def carry_out(out: Path, errors: str, begin: Callable[[Told, Stop], Report]) -> None:
    """Run a job, and end the command. errors: name of its log of errors. begin: runs it.

    Raises IncompleteError with exit status 1 if rows have errors, and Interrupted.
    """
    reporter, notes = new_reporter(), Notes()

    def tell(report: Report, ended: Outcome | BadRow | None) -> None:
        if isinstance(ended, BadRow):
            notes.add(f"line {ended.line}: {ended.error}")
        elif ended is None:
            reporter.show("checking the rows")
        else:
            for text in ended.warnings if ended.error is None else (ended.error,):
                notes.add(f"line {ended.row.line}: {text}")
            counts = f"{report.done:,} of {report.rows:,} rows" + (f", {report.errors:,} errors" if report.errors else "")
            reporter.show(f"{counts}, {_sound(report)}", report.share)

    with _stopping() as stop:
        report = begin(tell, stop)
    notes.end(f"{out / errors} lists all errors")
    data = _result(out, report)
    done = f"{report.done:,} of {report.rows:,} done"
    if report.interrupted:
        raise Interrupted(f"{done}; the same command goes on", data)
    if not report.rows:
        warn("there are no rows")
    reporter.clear()
    if report.errors:
        raise IncompleteError(f"{report.errors:,} of {report.rows:,} rows have no result", f"{out / errors} says why", data, 1)
    before = f"; {report.skipped:,} were done before" if report.skipped else ""
    left = f"; {report.left:,} are left, and the same command goes on" if report.left else ""
    finish(data, said=f"Wrote {report.made:,} rows into {out} ({_sound(report)}){before}{left}")


def _sound(report: Report) -> str:
    speed = report.seconds / report.elapsed_s if report.elapsed_s else 0.0
    return f"{report.seconds:,.1f} s of sound" + (f", {speed:.1f} × real time" if speed else "")


def _result(out: Path, report: Report) -> dict[str, Any]:
    counts = {name: getattr(report, name) for name in ("rows", "done", "made", "skipped", "errors", "left")}
    return {"output": str(out), **counts, "audio_s": report.seconds, "elapsed_s": report.elapsed_s}


@contextmanager
def _stopping() -> Iterator[Stop]:
    """Yield whether a signal came that should end the work, so that it ends in order. A second one ends the process at once."""
    came = threading.Event()
    found = {number: signal.getsignal(number) for name in ("SIGINT", "SIGTERM", "SIGHUP") if (number := getattr(signal, name, 0))}
    mine = {number: handler for number, handler in found.items() if handler != signal.SIG_IGN}  # nohup ignores one
    if threading.current_thread() is not threading.main_thread():
        mine = {}

    def end(*_: object) -> None:
        came.set()
        for number in mine:
            signal.signal(number, signal.SIG_DFL)

    for number in mine:
        signal.signal(number, end)
    try:
        yield came.is_set
    finally:
        for number, handler in mine.items():
            signal.signal(number, handler)
