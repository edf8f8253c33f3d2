"""The job engine: rows are planned, those that are done are skipped, the others are computed and committed, once each.

    rows ─► plan: done · adopted · bad · pending ─► work: results ─► commit: aside, rename ─► manifest.jsonl, errors.jsonl

A row is done when its file is there and carries its digest, a hash of all that decides the result. The manifest says so for most
rows; any other file is asked itself. So a run may be killed at any instant: the next one goes on with what is missing.

It knows neither what a row is nor who computes it: see `Job` and `Work`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ..errors import FishrtError, OutputError
from .folder import Commit, Entry, Folder, Shard, output_errors, owned_digest, stamp

Known = Mapping[str, Sequence[Entry]]
"""Lines of manifests by id."""
Stop = Callable[[], bool]
"""Whether the run should end."""


@dataclass(frozen=True, slots=True)
class Row:
    """A part of a job with a result of its own."""

    line: int
    """From 1, as the input counts."""
    id: str
    digest: str
    """Of all that decides the result, in hex."""
    target: str
    """Path of the result in the folder, with "/"."""
    size: int
    """Of its work, in any unit: for progress, and to compute rows of like size together."""
    payload: Any
    """What computes it needs; can be sent to another process."""


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be computed."""

    line: int
    id: str | None
    error: str


class Job(Protocol):
    """What a job's rows are."""

    result: str
    """Name of a result in the manifest, such as "audio"."""

    def rows(self, known: Known) -> Iterable[Row | BadRow]:
        """Yield the rows in the order of the input. known: what the manifests say."""
        ...

    def check(self, row: Row) -> None:
        """Check a row that is not done, before any is computed. Raises FishrtError."""
        ...

    @property
    def digest_of(self) -> Callable[[Path], str | None]:
        """Returns the digest that a file carries; None for a file that is not ours. It can be sent to another process."""
        ...

    def describe(self, row: Row, path: Path) -> Mapping[str, Any]:
        """Return what the manifest says of a result that is there, but not in it."""
        ...


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a row ended."""

    row: Row
    record: Mapping[str, Any] = field(default_factory=dict)
    """What the manifest says of it; `seconds` among it."""
    warnings: tuple[str, ...] = ()
    error: str | None = None
    """Why it has no result."""


Work = Callable[[Sequence[Row], Commit, Stop], Generator[Outcome, None, None]]
"""What computes and commits rows, and yields how each ended, in any order; it ends early if it should stop.

Raises FishrtError for what would hit every row, OutputError if a result cannot be written.
"""


@dataclass(slots=True)
class Report:
    """What a run has done: its counts grow while it works."""

    rows: int = 0
    """Rows of the input, or of the shard, without repetitions."""
    skipped: int = 0
    """Rows that were done before."""
    made: int = 0
    """Rows that were computed."""
    errors: int = 0
    """Rows that are in errors.jsonl."""
    left: int = 0
    """Rows that the limit or an interruption left for another run."""
    interrupted: bool = False
    seconds: float = 0.0
    """Seconds of sound of the rows that were computed."""
    elapsed_s: float = 0.0
    """Seconds since the first row began."""
    share: float = 0.0
    """Part of this run's work that is dealt with, by the sizes of its rows: 0 to 1."""

    @property
    def done(self) -> int:
        """Rows that have their results."""
        return self.skipped + self.made


Told = Callable[[Report, Outcome | BadRow | None], object]
"""Hears of a run: its counts, and a row that ended. None: rows are planned."""


def run(
    job: Job,
    out: Path,
    work: Work,
    *,
    shard: Shard | None = None,
    limit: int | None = None,
    tell: Told = lambda report, outcome: None,
    stop: Stop = lambda: False,
) -> Report:
    """Bring a job to its end in a folder, which is made if it is missing. A row's fault never ends the run.

    shard: only its rows. limit: most rows that are computed now. tell: hears of the plan and of every row that ends.
    Raises OutputError if the folder cannot be written or another run has it, what `work` raises, and KeyboardInterrupt if it
    should stop before the first row.
    """
    with Folder.locked(out, shard) as folder:
        plan = _Plan(job, folder, shard, stop, tell)
        if plan.pending:
            folder.begin(*plan.logs())
        report, begun, total = plan.report, time.monotonic(), sum(row.size for row in plan.pending)
        dealt, now = 0, plan.pending[:limit]
        report.left = len(plan.pending)
        try:
            with closing(work(now, folder.commit(job.digest_of), stop)) as outcomes:
                for outcome in outcomes:
                    row = outcome.row
                    if outcome.error is None:
                        folder.log("manifest", plan.add(row, outcome.record), row.target)
                        report.made += 1
                        report.seconds += outcome.record["seconds"]
                    else:
                        bad = BadRow(row.line, row.id, outcome.error)
                        folder.log("errors", plan.add_bad(bad))
                    report.left -= 1
                    dealt += row.size
                    report.elapsed_s, report.share = time.monotonic() - begun, dealt / total if total else 1.0
                    tell(report, outcome)
        except BaseException:
            with suppress(OutputError):  # the disk may be full: the lines that there are suffice
                folder.rewrite(*plan.logs())
            raise
        folder.rewrite(*plan.logs())
        report.interrupted = report.left > len(plan.pending) - len(now)
        return report


class _Plan:
    """The rows of a run: those that are done, those that are bad, and those that are pending."""

    def __init__(self, job: Job, folder: Folder, shard: Shard | None, stop: Stop, tell: Told) -> None:
        self._job, self._folder, self._tell = job, folder, tell
        self.pending: list[Row] = []
        self.report = Report()
        self._entries: list[Entry] = []
        self._bad: list[Entry] = []
        known = folder.known()
        rows: list[Row] = []
        for position, row in enumerate(_unique(job.rows(known))):
            if stop():
                raise KeyboardInterrupt
            if shard is not None and not shard.has(position):
                continue
            self.report.rows += 1
            if isinstance(row, BadRow):
                self._refuse(row)
                continue
            try:
                if self._is_done(row, known.get(row.id, ())):
                    self.report.skipped += 1
                else:
                    rows.append(row)
            except FishrtError as error:
                self._refuse(BadRow(row.line, row.id, message(error)))
        for row in rows:
            if stop():
                raise KeyboardInterrupt
            try:
                job.check(row)
            except FishrtError as error:
                self._refuse(BadRow(row.line, row.id, message(error)))
            else:
                self.pending.append(row)
            tell(self.report, None)

    def _refuse(self, bad: BadRow) -> None:
        self.add_bad(bad)
        self._tell(self.report, bad)

    def _is_done(self, row: Row, known: Sequence[Entry]) -> bool:
        """Return whether a row has its result, which is then in the manifest. Raises FishrtError for a file that is not ours."""
        path = self._folder.path / row.target
        with output_errors(self._folder.path):
            if not path.exists():
                return False
            found = stamp(path)
            for entry in known:
                if {**entry, **found, "digest": row.digest, self._job.result: row.target} == entry:
                    self._entries.append({**entry, "line": row.line})
                    return True
            if owned_digest(path, row.target, self._job.digest_of) != row.digest:
                return False
            self.add(row, {**self._job.describe(row, path), **found})
            return True

    def add(self, row: Row, record: Mapping[str, Any]) -> Entry:
        """Add a row that is done. Return its line of the manifest."""
        entry = {"id": row.id, "line": row.line, self._job.result: row.target, **record, "digest": row.digest}
        self._entries.append(entry)
        return entry

    def add_bad(self, bad: BadRow) -> Entry:
        """Add a row that has no result. Return its line of errors."""
        entry = {"id": bad.id, "line": bad.line, "error": bad.error}
        self._bad.append(entry)
        self.report.errors += 1
        return entry

    def logs(self) -> tuple[list[Entry], list[Entry]]:
        """Return the lines of the manifest and of the errors, in the order of the input."""
        return sorted(self._entries, key=_by_line), sorted(self._bad, key=_by_line)


def _by_line(entry: Entry) -> int:
    return int(entry["line"])


def _unique(rows: Iterable[Row | BadRow]) -> Iterator[Row | BadRow]:
    """Yield each row once: an exact repetition is left out, another row of the same id or place is bad."""
    ids: dict[str, Row] = {}
    places: dict[str, Row] = {}
    for row in rows:
        if isinstance(row, Row):
            same, there = ids.setdefault(row.id, row), places.setdefault(row.target, row)
            if same is not row and (same.digest, same.target) == (row.digest, row.target):
                continue
            if same is not row:
                yield BadRow(
                    row.line, row.id, f"line {same.line} has the id {row.id!r} with other content; give each row its own"
                )
                continue
            if there is not row:
                yield BadRow(row.line, row.id, f"line {there.line} has the same {row.target}; give each row an id of its own")
                continue
        yield row


def message(error: FishrtError) -> str:
    """Return an error as one text, with its remedy."""
    return f"{error}; {error.hint}" if error.hint else str(error)
