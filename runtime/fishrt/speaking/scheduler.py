"""Many requests at once: one thread owns the models and takes turns for all jobs that are active; the others wait.

    submit ─► waiting ─► active: a slot of the batch ─► chunks ─► the reader of each request
                 ▲            │ a reader that does not read pauses its own job
                 └─ full: BusyError

The next job is that of the highest priority, then the one that has waited longest. While others wait, a job gives up its slot if
nobody reads it, and between two pieces of its text; it keeps what it has read, and goes on later. It knows no HTTP.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import threading
import time
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Self

from ..errors import ArgumentError, BusyError, FishrtError, TimeLimitError
from ..request import Request, check_type
from ..speech import AudioChunk, Progress, Speech
from .job import MOST_BUFFERED_S, ChunkSizes, Job
from .known import KNOWN_BYTES, KnownSpeech
from .stats import Stats
from .stream import SpeechStream, chunk_sizes, whole_chunks
from .turns import MakeTurns, Speaker, Turns

log = logging.getLogger(__name__)

_IDLE_S = 0.1
"""Seconds between two looks at time limits while nothing can be done."""
_MOST_RETRY_S = 30
PARKED_BYTES = 1_000_000_000
"""Bytes of what parked jobs have read, beyond which no other job is parked."""


@dataclass(slots=True, eq=False)
class _Entry:
    job: Job
    gain: float
    seeded: bool
    """The same request gives the same codes again."""
    priority: int
    number: int
    """Its turn among those of its priority."""
    submitted: float
    latest: float | None
    """Time at which it gives up waiting."""
    news: Callable[[], object]
    """Tells the reader that there is a chunk, or that there will be none."""
    begun: float | None = None
    """Time at which it first got a slot."""
    piece: int = 0
    """Its piece of text when it last got one."""


class Scheduler:
    """Requests that share one model. Thread-safe."""

    def __init__(
        self, speaker: Speaker, *, max_active: int = 8, max_queue: int | None = 64, known_bytes: int = KNOWN_BYTES
    ) -> None:
        """Make a scheduler; its thread begins with the first request.

        max_active: requests that are spoken together. max_queue: most requests that wait; None means any number. known_bytes:
        most bytes of codes that are kept, so that a request with the same seed, text, voice and sampling runs the codec only.
        """
        self._speaker, self._slots, self._max_queue = speaker, max_active, max_queue
        self._changed = threading.Condition()
        self._waiting: list[_Entry] = []
        self._active: dict[Job, _Entry] = {}
        self._stats = Stats()
        self._known = KnownSpeech(known_bytes)
        self._make_turns: MakeTurns
        self._thread: threading.Thread | None = None
        self._closing = False
        self._numbers = itertools.count()
        self._job_s: float | None = None
        self.fault: BaseException | None = None
        """The error that ended all active jobs, if nothing has been spoken since."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """End what still runs, and the thread."""
        self.close()

    def submit(
        self,
        request: Request,
        *,
        priority: int = 0,
        timeout_s: float | None = None,
        progress: Callable[[Progress], None] | None = None,
        sizes: ChunkSizes | None = None,
        most_buffered_s: float = MOST_BUFFERED_S,
    ) -> ScheduledStream:
        """Queue a request. Return its chunks, which come while it is spoken.

        The caller's thread checks it, encodes its voice and opens the graphs, where that was not done before.

        priority: a higher one is begun first. timeout_s: seconds that it may wait until it is begun; then its stream raises
        TimeLimitError. progress: called in the scheduler's thread after every frame. sizes: None means those of the mode.
        most_buffered_s: seconds of sound that it may be ahead of its reader. A stream that is dropped ends its request.
        Raises BusyError if too many wait, FishrtError if the scheduler is closed, and the errors of `TTS.stream`.
        """
        check_type("priority", priority, Integral, "a whole number")
        if timeout_s is not None and not (isinstance(timeout_s, Real) and timeout_s >= 0):
            raise ArgumentError(f"timeout_s is {timeout_s!r}", hint="it must be a number of seconds of at least 0, or None")
        self._check_room()  # before work that would be in vain
        job = self._speaker.job(request, progress, sizes or chunk_sizes(request.mode))
        job.most_buffered_s = most_buffered_s
        if request.seed is not None:
            job.known = self._known.find(job.key)
        make_turns, gain = self._speaker.opened(), self._speaker.gain(job.task)
        now = time.perf_counter()
        with self._changed:
            self._check_room()
            self._stats.submitted += 1
            self._make_turns = make_turns
            entry = _Entry(
                *(job, gain, request.seed is not None, priority, next(self._numbers), now),
                latest=None if timeout_s is None else now + timeout_s,
                news=lambda: None,
            )
            stream = ScheduledStream(job, self._wake, entry)
            self._waiting.append(entry)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="fishrt scheduler", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        return stream

    def speak_many(self, requests: Iterable[Request]) -> Iterator[Speech]:
        """Speak requests together, and yield their speeches in order; see `TTS.speak_many`."""
        ahead: deque[ScheduledStream] = deque()
        try:
            coming = iter(requests)
            while True:
                while len(ahead) == self._slots:
                    yield ahead.popleft().whole()
                try:
                    ahead.append(self.submit(next(coming), sizes=whole_chunks, most_buffered_s=math.inf))
                except Exception as error:
                    while ahead:
                        yield ahead.popleft().whole()
                    if isinstance(error, StopIteration):
                        return
                    raise
        finally:
            for stream in ahead:
                stream.close()

    @property
    def stats(self) -> Stats:
        """Return a copy of the counts."""
        with self._changed:
            self._forget_closed()
            counts = {name: getattr(self._stats, name) for name in Stats.__slots__}
            return Stats(**counts | {"waiting": len(self._waiting), "active": len(self._active)})

    def close(self, drain_s: float | None = 0.0) -> None:
        """Take no more requests. Let those that there are go on for at most `drain_s` seconds, then end them, and the thread.

        drain_s: None lets them go on to their ends, and returns at once.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            if drain_s is None:
                return
            self._changed.wait_for(lambda: not self._waiting and not self._active, drain_s)
            for entry in (*self._waiting, *self._active.values()):
                entry.job.fail(FishrtError("the scheduler was closed before all was spoken"))
                entry.news()
            self._waiting.clear()
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _check_room(self) -> None:
        """Raise FishrtError if the scheduler is closed, BusyError if too many wait."""
        with self._changed:
            if self._closing:
                raise FishrtError("the scheduler is closed", hint="load the bundle again with TTS.load")
            self._forget_closed()
            waiting = sum(entry.begun is None for entry in self._waiting)
            if self._max_queue is not None and len(self._active) + waiting >= self._slots + self._max_queue:
                self._stats.refused += 1
                raise BusyError(waiting, self._retry_s())

    def _wake(self) -> None:
        with self._changed:
            self._forget_closed()
            self._changed.notify_all()

    def _forget_closed(self) -> None:
        """Take the closed requests out of those that wait."""
        closed = [entry for entry in self._waiting if entry.job.closed.is_set()]
        self._waiting = [entry for entry in self._waiting if entry not in closed]
        self._stats.cancelled += len(closed)

    def _retry_s(self) -> int:
        """Return after how many seconds there should be room: a slot's share of a job's time, of those that ended or of these."""
        now = time.perf_counter()
        spoken_s = sum(now - entry.begun for entry in self._active.values() if entry.begun is not None) / self._slots
        return max(1, min(_MOST_RETRY_S, round(max(self._job_s or 1.0, spoken_s) / self._slots)))

    def _run(self) -> None:
        turns: Turns[Any] | None = None
        while True:
            with self._changed:
                while not self._waiting and not self._active:
                    if self._closing:
                        return
                    self._changed.wait()
            try:
                with self._changed:
                    if turns is not None:
                        self._make_room(turns)
                    begin = self._next()
                turns = turns or self._make_turns(self._slots)
                for entry in begin:
                    turns.add(entry.job, entry.gain)
                began = time.perf_counter()
                for job in turns.turn():
                    self._tell(self._active[job])
                self._stats.steps += bool(turns.rows)
                self._stats.rows += turns.rows
                self._stats.busy_s += time.perf_counter() - began
            except BaseException as error:  # of the models: it ends all jobs that share them, and the next begin anew
                log.exception("the models failed")
                self.fault, turns = error, None
                for entry in list(self._active.values()):
                    entry.job.fail(error)
                    self._tell(entry)
            with self._changed:
                full = len(self._active) == self._slots
                if turns and turns.paused and (full or not self._ready()):
                    self._changed.wait(_IDLE_S)

    def _next(self) -> list[_Entry]:
        """Return the entries that get a slot now, and end those that waited too long."""
        now = time.perf_counter()
        self._forget_closed()
        late = [entry for entry in self._waiting if entry.begun is None and entry.latest is not None and entry.latest < now]
        for entry in late:
            self._waiting.remove(entry)
            self._stats.failed += 1
            entry.job.fail(TimeLimitError(now - entry.submitted, self._retry_s()))
            entry.news()
        begin = self._ready()[: self._slots - len(self._active)]
        self._waiting = [entry for entry in self._waiting if entry not in begin]
        for entry in begin:
            entry.begun, entry.piece = entry.begun or now, entry.job.piece
            self._active[entry.job] = entry
        return begin

    def _ready(self) -> list[_Entry]:
        """Return the entries that wait for a slot, in their order; not those that were parked and wait for their readers."""
        return sorted(
            (entry for entry in self._waiting if not entry.job.paused), key=lambda entry: (-entry.priority, entry.number)
        )

    def _make_room(self, turns: Turns[Any]) -> None:
        """Park jobs that nobody reads, and those between two pieces, while others wait."""
        for entry in list(self._active.values()):
            job, ready = entry.job, self._ready()
            parked = sum(entry.job.parked_bytes for entry in self._waiting)
            if len(self._active) < self._slots or not ready or not turns.can_park or parked >= PARKED_BYTES:
                return
            if job.paused or (job.between_pieces and job.piece > entry.piece and ready[0].priority >= entry.priority):
                turns.park(job)
                del self._active[job]
                entry.number = next(self._numbers)
                self._waiting.append(entry)

    def _tell(self, entry: _Entry) -> None:
        """Tell the reader of a job of what is new, and count the job if it has ended."""
        if entry.job.done:
            self._end(entry)
        entry.news()

    def _end(self, entry: _Entry) -> None:
        with self._changed:
            del self._active[entry.job]
            assert entry.begun is not None
            seconds = time.perf_counter() - entry.begun
            self._job_s = seconds if self._job_s is None else 0.8 * self._job_s + 0.2 * seconds
            if entry.job.closed.is_set():
                self._stats.cancelled += 1
            elif entry.job.error is not None:
                self._stats.failed += 1
            else:
                self._stats.finished += 1
                self.fault = None
                if entry.seeded:
                    self._known.keep(entry.job.key, entry.job.said)
            self._changed.notify_all()


class ScheduledStream(SpeechStream, AsyncIterator[AudioChunk]):
    """The chunks of a request that a scheduler speaks, for a thread or for an event loop.

    A reader that takes none pauses its request when some seconds of sound are waiting for it.
    """

    def __init__(self, job: Job, wake: Callable[[], None], entry: _Entry) -> None:
        """Make a stream of a job. wake: tells the scheduler that the reader took a chunk, or has gone."""
        unread = threading.Event()

        def wait() -> None:  # without `self`: the stream is dropped as soon as nobody has it
            unread.wait()
            unread.clear()

        super().__init__(job, wait)
        self._wake, self._entry, self._unread = wake, entry, unread
        self._listener: Callable[[], None] | None = None
        myself = weakref.WeakMethod(self._tell)
        entry.news = lambda: (tell := myself()) and tell()

    def __del__(self) -> None:
        self._job.close()  # nobody reads it; the scheduler's thread sees that

    @property
    def queued_s(self) -> float:
        """Seconds that the request has waited, until now or until it was begun."""
        begun = self._entry.begun
        return (time.perf_counter() if begun is None else begun) - self._entry.submitted

    def _tell(self) -> None:
        self._unread.set()
        if (listener := self._listener) is not None:
            listener()

    def _next(self) -> AudioChunk | None:
        chunk = super()._next()
        if chunk is not None:
            self._wake()
        return chunk

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> AudioChunk:
        """Return the next chunk. If its wait is cancelled, the request ends. Raises as `next`; RuntimeError for two at once."""
        if self._listener is not None:
            raise RuntimeError("another task already waits for the next chunk")
        loop, news = asyncio.get_running_loop(), asyncio.Event()
        self._listener = lambda: _in_loop(loop, news.set)
        try:
            while (chunk := self._next()) is None:
                await news.wait()
                news.clear()
        except StopIteration:
            raise StopAsyncIteration from None
        except BaseException:
            self._ended = True
            self.close()
            raise
        finally:
            self._listener = None
        return chunk

    def close(self) -> None:
        """End the request: within a frame if it is spoken, at once if it waits."""
        super().close()
        self._tell()
        self._wake()

    async def aclose(self) -> None:
        """End the request, as `close` does."""
        self.close()


def _in_loop(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    with suppress(RuntimeError):  # the loop was closed, and nobody waits
        loop.call_soon_threadsafe(call)
