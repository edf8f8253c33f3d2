"""Turns of jobs that run together on the same models, in one thread.

    turn    one part of a prompt ─► one column for every row ─► the chunks that are due ─► the next turn

A prompt waits where reading it would let a stream run dry, but not for ever. What a job gives does not depend on the others,
except for the rounding of larger batches; see `language_model/batch.py`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from ..bundle.memory import memory_errors
from ..language_model.batch import Batch
from .job import Job, Models

MOST_HELD = 1
"""Turns in a row in which prompts wait for streams that would run dry. Where all run dry, a longer wait helps none of them."""


class Turns:
    """Jobs and the slots of their rows. Used by one thread, jobs apart."""

    def __init__(self, models: Models, slots: int = 1) -> None:
        self._models = models
        with memory_errors():
            self._batch = Batch(models.language_model, slots, models.contexts)
        self.jobs: list[Job] = []
        """In the order in which their prompts are read."""
        self.rows = 0
        """Rows of the last step."""
        self._held = 0
        # Seconds of a part of a prompt, of a step for all rows, and of a chunk: the last ones.
        self._part_s = self._step_s = self._chunk_s = 0.0

    def add(self, job: Job, gain: float, load_s: float = 0.0) -> None:
        """Begin a job, see `Job.begin`, or go on with one that was parked. Raises ValueError if no slot is idle."""
        self.jobs.append(job)
        with ends(job), memory_errors():
            if not job.begun:
                job.begin(self._models, gain, load_s)
            if not job.known:
                job.slot = self._batch.admit(job.row, parked=job.parked)
                job.parked = None

    @property
    def paused(self) -> bool:
        """Whether a turn would do nothing: all jobs wait for their readers."""
        return all(job.paused for job in self.jobs)

    def turn(self) -> Iterator[Job]:
        """Take one turn. Yield jobs as soon as they have a new chunk, and those that have ended, which are not in `jobs` then.

        An error of one job ends that job. Raises FishrtError for any other, such as one of the graphs.
        """
        for job in self.jobs:
            if job.closed.is_set():
                job.done = True
        ready = [job for job in self.jobs if not job.done and not job.paused]
        reading = [job for job in ready if not job.known and not job.row.begun]
        if reading and self._may_read():
            self._read(reading[0])
        self._step([job for job in ready if not job.done and not job.due and job.row.begun])
        for job in ready:
            if not job.done and job.due:
                self._decode(job)
                if not job.done:
                    yield job
        ended = [job for job in self.jobs if job.done]
        self.jobs = [job for job in self.jobs if not job.done]
        for job in ended:
            self._leave(job)
            yield job

    def _leave(self, job: Job) -> None:
        if job.slot is not None:
            self._batch.leave(job.row)
            job.slot = None

    @property
    def can_park(self) -> bool:
        """Whether jobs can be parked: what they have read can be taken out of the batch."""
        return self._models.language_model.slow.traits.parts_states

    def park(self, job: Job) -> None:
        """Take out a job that goes on later, when it is added again; what it has read is kept."""
        self.jobs.remove(job)
        job.parked = None if job.slot is None else self._batch.park(job.row)
        job.slot = None

    def _may_read(self) -> bool:
        """Return whether no stream would run dry while a part of a prompt is read, or prompts have waited long enough."""
        now, self._held = time.perf_counter(), self._held + 1
        for job in self.jobs:
            if job.heard_until is not None and self._held <= MOST_HELD:
                needed_s = self._part_s + job.frames_wanted * self._step_s + self._chunk_s
                if now < job.heard_until < now + needed_s:  # one that is dry already is not helped by a turn
                    return False
        self._held = 0
        return True

    def _read(self, job: Job) -> None:
        begun = time.perf_counter()
        with memory_errors():
            drawn = self._batch.read(job.row)
        self._part_s = time.perf_counter() - begun
        job.spend(self._part_s)
        with ends(job):
            for _, column in drawn:
                job.take(column)

    def _step(self, jobs: list[Job]) -> None:
        begun, by_row = time.perf_counter(), {id(job.row): job for job in jobs}
        with memory_errors():
            drawn = self._batch.advance([job.row for job in jobs])
        self.rows = len(drawn)
        if drawn:
            self._step_s = time.perf_counter() - begun
        for row, column in drawn:
            job = by_row[id(row)]
            job.spend(self._step_s / len(drawn))
            with ends(job):
                job.take(column)

    def _decode(self, job: Job) -> None:
        begun = time.perf_counter()
        with ends(job), memory_errors():
            next_piece = not job.known and not job.row.goes_on
            job.decode()
            if next_piece and not job.done:
                self._batch.admit(job.row, job.slot)
        self._chunk_s = time.perf_counter() - begun


@contextmanager
def ends(job: Job) -> Iterator[None]:
    """Let an error in the block end a job, and nothing else: also one that would end the thread, but for Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        job.fail(error)
