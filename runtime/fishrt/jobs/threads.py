"""The work of a job in this process: a worker computes rows in threads, which commit them."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, Protocol

from ..errors import BundleError, FishrtError, GraphError, OutputError, ProviderError
from .engine import Outcome, Row, Stop, Work, message
from .folder import Commit, Made, output_errors

_EVERY_ROW = (BundleError, GraphError, OutputError, ProviderError)
"""Faults that every row would have."""
_TICK_S = 0.2
"""Seconds between two looks at whether the run should end."""


class Worker(Protocol):
    """What computes rows, once a process."""

    batch: int
    """Rows that it computes together."""

    def compute(self, payload: Any) -> Made:
        """Compute the result of a row. Several threads call it. Raises FishrtError for a fault of the row."""
        ...

    def close(self) -> None:
        """Drop what is in work as soon as possible: `compute` then raises FishrtError."""
        ...


def outcome(worker: Worker, row: Row, commit: Commit) -> Outcome:
    """Compute and commit a row. Raises FishrtError for what would hit every row."""
    try:
        made = worker.compute(row.payload)
        with output_errors(commit.out):
            return Outcome(row, {**made.record, **commit(row.target, row.digest, made)}, made.warnings)
    except _EVERY_ROW:
        raise
    except FishrtError as error:
        return Outcome(row, error=message(error))


def in_threads(worker: Worker) -> Work:
    """Return the work of a worker. One row more than its batch is in work: a file is written while others are computed."""

    def work(rows: Sequence[Row], commit: Commit, stop: Stop) -> Generator[Outcome, None, None]:
        if worker.batch > 1:  # rows of like size together, and none that is long at the end
            rows = sorted(rows, key=lambda row: -row.size)
        todo = iter(rows)
        running: set[Future[Outcome]] = set()
        pool = ThreadPoolExecutor(worker.batch + 1, "fishrt row")
        try:
            while not stop():
                while len(running) <= worker.batch and (row := next(todo, None)) is not None:
                    running.add(pool.submit(outcome, worker, row, commit))
                if not running:
                    return
                ended, running = wait(running, _TICK_S, FIRST_COMPLETED)
                for future in ended:
                    yield future.result()
            worker.close()
            for future in wait(running).done:  # those that were committed before they heard of it
                if future.exception() is None and future.result().error is None:
                    yield future.result()
        finally:
            worker.close()
            pool.shutdown()

    return work
