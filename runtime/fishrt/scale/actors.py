"""The work of a job on Ray: actors compute and commit rows, on this machine or on a cluster.

    rows ─► a window for each actor ─► outcomes, as they come        an actor died ─► its rows go back in front

Plain actors, and not Ray Data: that repeats a row without end whose worker dies each time. A row in flight when its actor died
runs alone the next time, so that a row that kills its worker is found out and takes no other along.
"""

from __future__ import annotations

import secrets
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import FishrtError
from ..jobs.engine import Outcome, Row, Stop, Work, message
from ..jobs.folder import Commit, output_errors
from ..jobs.threads import Worker, outcome
from .instance import connected

_TICK_S = 0.2
"""Seconds between two looks at whether the run should end."""
_END_S = 5.0
"""Seconds that rows in work may take to end when the run should."""
_MOST_DEATHS = 3
"""Deaths of its worker after which a row is an error."""
_SILENT_S = 600.0
"""Seconds without any worker after which the run ends: it may take that long to load a bundle the first time."""

MakeWorker = Callable[[], Worker]
"""Makes the worker of a process; can be sent there."""


class _Actor:
    """A worker in a process of Ray. Faults of every row are returned and not raised: Ray changes what is raised."""

    def __init__(self, make: MakeWorker) -> None:
        self._fault: str | None = None
        try:
            self._worker = make()
        except FishrtError as error:
            self._fault = message(error)

    def ready(self, token: Path) -> str | None:
        """Return what hinders the worker, or None. token: a file that the driver has made in the output folder."""
        if token.exists():
            return self._fault
        return f"{token.parent} is not the same folder on each machine: workers see another one, or none"

    def compute(self, row: Row, commit: Commit) -> Outcome | str:
        """Compute and commit a row. Return how it ended, or what would hit every row."""
        try:
            return outcome(self._worker, row, commit)
        except FishrtError as error:
            return message(error)

    def close(self) -> None:
        """See `jobs.threads.Worker`."""
        self._worker.close()


def on_ray(make: MakeWorker, workers: int, *, batch: int = 1, threads: int = 1, address: str | None = None) -> Work:
    """Return the work of actors, each of which has one row more in flight than its batch.

    threads: CPUs of each. address: of a running cluster; None starts Ray on this machine, in the main thread only, and ends it.
    The work raises FishrtError if Ray is not installed, cannot be reached or has too few CPUs.
    """

    def work(rows: Sequence[Row], commit: Commit, stop: Stop) -> Generator[Outcome, None, None]:
        if not rows:
            return
        commit = replace(commit, out=commit.out.absolute())
        token = commit.out / f".{secrets.token_hex(8)}{commit.mark}.tmp"  # removed with unfinished files, if this is killed
        with output_errors(commit.out):
            token.touch()
        try:
            with connected(address, workers * threads) as ray:
                actor = ray.remote(_Actor).options(
                    num_cpus=threads, max_restarts=-1, max_task_retries=0, max_concurrency=batch + 2
                )
                pool = _Pool(ray, [actor.remote(make) for _ in range(workers)], batch + 1, token, commit)
                try:
                    yield from pool.run(rows, stop)
                except ray.exceptions.RayError as error:
                    raise FishrtError(f"Ray has failed: {error}", hint="the same command goes on") from error
                finally:
                    pool.end()
        finally:
            token.unlink(missing_ok=True)

    return work


class _Pool:
    """Actors, and the rows that each has in flight."""

    def __init__(self, ray: Any, actors: Sequence[Any], window: int, token: Path, commit: Commit) -> None:
        self._ray, self._actors, self._window, self._token, self._commit = ray, actors, window, token, commit
        self._todo: deque[Row] = deque()
        self._flying: dict[Any, tuple[Any, Row]] = {}
        """Rows in work by the reference of their result."""
        self._asked: dict[Any, Any] = {}
        """Actors that were asked whether they are ready, by the reference of the answer."""
        self._deaths: Counter[int] = Counter()
        """How often the worker of a row died, by its line."""

    def run(self, rows: Sequence[Row], stop: Stop) -> Generator[Outcome, None, None]:
        """Compute rows. Yield how each ended. Raises FishrtError for what would hit every row."""
        self._todo.extend(sorted(rows, key=lambda row: -row.size) if self._window > 2 else rows)
        for actor in self._actors:
            self._ask(actor)
        heard = time.monotonic()
        while self._todo or self._flying:
            if stop():
                yield from self._last()
                return
            if not self._flying and time.monotonic() - heard > _SILENT_S:
                raise FishrtError(f"no worker was ready within {_SILENT_S:.0f} s", hint="the logs of Ray say more")
            ended, _ = self._ray.wait([*self._flying, *self._asked], timeout=_TICK_S)
            for found in ended:
                heard = time.monotonic()
                yield from self._heard(found)

    def end(self) -> None:
        """End the actors, those of a cluster too."""
        with suppress(self._ray.exceptions.RayError):
            for actor in self._actors:
                self._ray.kill(actor)

    def _ask(self, actor: Any) -> None:
        if actor not in self._asked.values():
            self._asked[actor.ready.options(max_task_retries=-1).remote(self._token)] = actor  # waits until it is started again

    def _heard(self, found: Any) -> Generator[Outcome, None, None]:
        """Take a result or an answer, and give its actor more rows."""
        actor, row = (self._asked.pop(found), None) if found in self._asked else self._flying.pop(found)
        try:
            result = self._ray.get(found)
        except self._ray.exceptions.RayActorError as error:
            if row is None:
                raise FishrtError(f"a worker cannot start: {error}", hint="the same command goes on") from error
            self._deaths[row.line] += 1
            if self._deaths[row.line] == _MOST_DEATHS:
                yield Outcome(row, error=f"its worker died {_MOST_DEATHS} times")
            else:
                self._todo.appendleft(row)
            self._ask(actor)
            return
        if isinstance(result, str):
            raise FishrtError(result, hint="the same command goes on when this is mended")
        if row is not None:
            yield result
        if actor not in self._asked.values():
            self._feed(actor)

    def _feed(self, actor: Any) -> None:
        """Give an actor rows until its window is full. A row whose worker died runs alone."""
        there = [row for owner, row in self._flying.values() if owner is actor]
        while self._todo and len(there) < self._window:
            if there and (self._deaths[self._todo[0].line] or self._deaths[there[0].line]):
                return
            there.append(self._todo.popleft())
            self._flying[actor.compute.remote(there[-1], self._commit)] = actor, there[-1]

    def _last(self) -> Generator[Outcome, None, None]:
        """Let the actors drop what they have in work. Yield what was committed before they heard of it."""
        for actor in self._actors:
            actor.close.remote()
        ended, _ = self._ray.wait(list(self._flying), num_returns=len(self._flying), timeout=_END_S) if self._flying else ([], [])
        for found in ended:
            try:
                result = self._ray.get(found)
            except self._ray.exceptions.RayActorError:
                continue
            if isinstance(result, Outcome) and result.error is None:
                yield result
