"""Turns of jobs that run together on the same models, in one thread.

    turn    a share of the models' work for the jobs ─► the chunks that are due ─► the next turn

Jobs that have no sound yet come first: their chunks are decoded before those of others, and are shorter if several wait.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, Protocol, TypeVar

from ..bundle.memory import memory_errors
from ..codec import CodecDecoder
from ..request import Request
from ..speech import Progress
from .job import ChunkSizes, Job, Task

J = TypeVar("J", bound=Job)


class Turns(ABC, Generic[J]):
    """Jobs, and what the models hold for them. Used by one thread, jobs apart."""

    can_park: bool
    """Whether jobs can be parked: what they have read can be taken out of the models."""

    def __init__(self, decoder: CodecDecoder) -> None:
        self._decoder = decoder
        self.jobs: list[J] = []
        """In the order in which they get a share."""
        self.rows = 0
        """Rows of the last step."""
        self._chunk_s = 0.0
        """Seconds of the last chunk."""

    def add(self, job: J, gain: float, load_s: float = 0.0) -> None:
        """Begin a job, see `Job.begin`, or go on with one that was parked. Raises ValueError if no slot is idle."""
        self.jobs.append(job)
        with ends(job), memory_errors():
            if not job.begun:
                job.begin(self._decoder, gain, load_s)
            if not job.known:
                self._enter(job)

    @property
    def paused(self) -> bool:
        """Whether a turn would do nothing: all jobs wait for their readers."""
        return all(job.paused for job in self.jobs)

    def turn(self) -> Iterator[J]:
        """Take one turn. Yield jobs as soon as they have a new chunk, and those that have ended, which are not in `jobs` then.

        An error of one job ends that job. Raises FishrtError for any other, such as one of the graphs.
        """
        for job in self.jobs:
            if job.closed.is_set():
                job.done = True
        ready = [job for job in self.jobs if not job.done and not job.paused]
        unheard = [job for job in ready if job.heard_until is None]
        if len(unheard) > 1:
            for job in unheard:
                job.hurry()
        self._compute(ready)
        for job in sorted(ready, key=lambda job: job.heard_until or 0.0):  # those without sound, then the first to run dry
            if not job.done and job.due:
                self._decode(job)
                if not job.done:
                    yield job
        ended = [job for job in self.jobs if job.done]
        self.jobs = [job for job in self.jobs if not job.done]
        for job in ended:
            self._leave(job)
            yield job

    def park(self, job: J) -> None:
        """Take out a job that goes on later, when it is added again; what it has read is kept."""
        self.jobs.remove(job)
        self._park(job)

    def _decode(self, job: J) -> None:
        begun = time.perf_counter()
        with ends(job), memory_errors():
            piece = job.piece
            job.decode()
            if job.piece > piece and not job.done and not job.known:
                self._enter(job)
        self._chunk_s = time.perf_counter() - begun

    @abstractmethod
    def _compute(self, ready: Sequence[J]) -> None:
        """Give the jobs that are ready a share of the models' work."""

    @abstractmethod
    def _enter(self, job: J) -> None:
        """Give the models what they need of a piece of text that begins, or goes on after it was parked."""

    @abstractmethod
    def _leave(self, job: J) -> None:
        """Take out of the models what they have of a job that has ended."""

    @abstractmethod
    def _park(self, job: J) -> None:
        """Take it out for later."""


MakeTurns = Callable[[int], Turns[Any]]
"""Most jobs at once → turns for them."""


class Speaker(Protocol):
    """What makes jobs and their turns: a `TTS`."""

    def job(self, request: Request, progress: Callable[[Progress], None] | None, sizes: ChunkSizes) -> Job:
        """Return the job of a request after all checks that need no graph."""
        ...

    def opened(self) -> MakeTurns:
        """Open the graphs that speaking needs. Return what makes turns for its jobs."""
        ...

    def gain(self, task: Task) -> float:
        """Return the factor on all samples of a task."""
        ...


@contextmanager
def ends(job: Job) -> Iterator[None]:
    """Let an error in the block end a job, and nothing else: also one that would end the thread, but for Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        job.fail(error)
