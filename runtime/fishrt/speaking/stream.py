"""Streams of audio chunks, for a thread and for an event loop, and the lengths of their chunks."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager

import numpy as np

from ..codec import apart, joined
from ..errors import FishrtError, UnfinishedError
from ..request import Mode
from ..speech import AudioChunk, PieceInfo, Speech, SpeechInfo, Timings
from .job import ChunkSizes, Job

log = logging.getLogger(__name__)


class SpeechStream(Iterator[AudioChunk]):
    """The chunks of a request. `next` computes a chunk, so that a slow consumer costs no memory."""

    def __init__(self, job: Job, turn: Callable[[], object]) -> None:
        """Make a stream of the chunks of a job. turn: makes the job go on, or waits until it has."""
        self._job, self._turn = job, turn
        self._running = threading.Lock()
        self._ended = False
        self._pieces: list[PieceInfo] = []
        self._frames = self._samples = 0
        self._timings = Timings(0.0, 0.0, 0.0, None)
        self._logged = 0
        self._log_new()

    def __next__(self) -> AudioChunk:
        with self._running:
            try:
                while (chunk := self._next()) is None:
                    self._turn()
                return chunk
            except BaseException:
                self._ended = True
                raise

    def _next(self) -> AudioChunk | None:
        """Return the next chunk; None if there is none yet. Raises the error of the job, StopIteration after the last chunk."""
        if self._ended or self._job.closed.is_set():
            raise StopIteration
        done = self._job.done  # asked first: chunks may come in between
        chunk = self._job.pop()
        if chunk is not None:
            self._count(chunk)
        elif done:
            if self._job.error is not None:
                raise _not_stopping(self._job.error)
            self._log_end()
            raise StopIteration
        return chunk

    def _count(self, chunk: AudioChunk) -> None:
        spent, sums = chunk.timings, self._timings
        self._timings = Timings(
            sums.load_s + spent.load_s,
            sums.model_s + spent.model_s,
            sums.codec_s + spent.codec_s,
            spent.ttfa_s if sums.ttfa_s is None else sums.ttfa_s,
        )
        self._samples += len(chunk.pcm)
        self._frames += chunk.codes.shape[1]
        if chunk.stop_reason is not None:
            self._pieces.append(PieceInfo(chunk.text, self._frames, chunk.stop_reason))
            self._frames = 0

    def _log_end(self) -> None:
        """Log the timings of the request, and whether there were warnings while the text was spoken."""
        info = self.info
        spent = info.timings
        log.info(
            "spoke %d pieces: %.2f s of speech in %.2f s (model %.2f s, codec %.2f s); graphs were opened in %.2f s",
            *(len(info.pieces), info.audio_s, spent.compute_s, spent.model_s, spent.codec_s, spent.load_s),
        )
        self._log_new()

    def _log_new(self) -> None:
        """Log that there are new warnings; their words may be those of a private text."""
        if len(self.warnings) > self._logged:
            log.warning("there are warnings about the speech: see its info.warnings")
            self._logged = len(self.warnings)

    def whole(self) -> Speech:
        """Return all the rest as one speech.

        Raises FishrtError if nothing was said. An error after some chunks is an UnfinishedError, whose `speech` is these.
        """
        chunks: list[AudioChunk] = []
        try:
            chunks.extend(self)
        except FishrtError as error:
            if not sum(map(len, chunks)):
                raise
            raise UnfinishedError(error, self._joined(chunks)) from error
        self.info.check_spoken()
        return self._joined(chunks)

    def _joined(self, chunks: list[AudioChunk]) -> Speech:
        codes, latents = apart(joined([c.codes if c.latents is None else c.latents for c in chunks]))
        return Speech(np.concatenate([c.pcm for c in chunks]), chunks[0].sample_rate, codes, self.info, latents)

    def close(self) -> None:
        """End the request after the current frame. Another thread that waits for a chunk gets none."""
        self._job.close()

    @property
    def info(self) -> SpeechInfo:
        """Describe the chunks yielded so far; a piece counts when its last chunk was yielded."""
        return self._job.describe(tuple(self._pieces), self._samples, self._timings)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Return the possible faults of the speech so far; `info` has them, too."""
        return self._job.warnings(self._pieces)


class AsyncSpeechStream(AsyncIterator[AudioChunk]):
    """The chunks of a request, for an event loop: each is computed in a thread when it is awaited.

    A stream that is closed, or whose wait for a chunk is cancelled, ends after the current frame.
    """

    def __init__(self, begin: Callable[[], SpeechStream]) -> None:
        """Make a stream. begin: starts the request; called in a thread when the first chunk is awaited."""
        self._begin = begin
        self._stream: SpeechStream | None = None
        self._closed = False

    async def __anext__(self) -> AudioChunk:
        import asyncio  # a start without an event loop takes notice of it

        try:
            chunk = await asyncio.to_thread(self._next)
        except asyncio.CancelledError:
            self._close()
            raise
        if chunk is None:
            raise StopAsyncIteration
        return chunk

    async def aclose(self) -> None:
        """End the request."""
        self._close()

    @property
    def info(self) -> SpeechInfo | None:
        """Describe the chunks yielded so far; None before the first is awaited."""
        return None if self._stream is None else self._stream.info

    def _next(self) -> AudioChunk | None:
        if self._stream is None and not self._closed:
            self._stream = self._begin()
        if self._stream is None:
            return None
        if self._closed:  # while the request began
            self._stream.close()
        return next(self._stream, None)

    def _close(self) -> None:
        self._closed = True
        if self._stream is not None:
            self._stream.close()


@contextmanager
def without_warnings() -> Iterator[None]:
    """Let streams log no warnings in the block: the caller takes them from `info`."""
    log.addFilter(_below_warning)
    try:
        yield
    finally:
        log.removeFilter(_below_warning)


def _below_warning(record: logging.LogRecord) -> bool:
    return record.levelno < logging.WARNING


def _not_stopping(error: BaseException) -> BaseException:
    """Return an error, of a function of the caller, in a form that does not look like the end of the chunks."""
    if not isinstance(error, StopIteration | StopAsyncIteration):
        return error
    found = RuntimeError(f"{type(error).__name__} was raised while a text was spoken")
    found.__cause__ = error
    return found


def whole_chunks(least: int, most: int) -> Iterator[int]:
    """Yield the number of frames of each chunk of a speech that nobody hears before its end."""
    return itertools.repeat(most)


def chunk_sizes(mode: Mode) -> ChunkSizes:
    """Return the sizes of the chunks of a stream: `growing_chunks` from half the least size, the least, or four times that."""
    match mode:
        case "fast":
            return lambda least, most: growing_chunks((least + 1) // 2, most)
        case "quality":
            return lambda least, most: growing_chunks(min(4 * least, most), most)
    return growing_chunks


def growing_chunks(least: int, most: int) -> Iterator[int]:
    """Yield the number of frames of each chunk of a stream: four chunks of one size, then of twice the size, up to `most`.

    When a chunk is ready, the sound before it must still be playing. After four chunks of n frames, at a real-time factor r, at
    least n + 3n(1 − r) frames of sound are left; the next chunk of 2n takes 2nr. So playback does not run dry up to r = 0.8.
    """
    size = least
    while size < most:
        yield from itertools.repeat(size, 4)
        size *= 2
    yield from itertools.repeat(most)
