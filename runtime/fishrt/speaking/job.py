"""A request while it is spoken: a row of the language model for one piece of text after the other, and chunks of their sound."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ..arrays import Ints
from ..audio.speed import Stretcher
from ..bundle.features import Codec, LanguageModel
from ..bundle.manifest import Manifest
from ..codec import CodecDecoder, clamp_codes
from ..errors import ArgumentError, FishrtError
from ..language_model.batch import DualAR, Parked, Row, StopReason
from ..language_model.context import ContextStore
from ..language_model.sampling import SeededNoise
from ..metrics import rtf
from ..request import Request, Task
from ..speech import AudioChunk, PieceInfo, Progress, SpeechInfo, Timings
from .warnings import piece_warnings

ChunkSizes = Callable[[int, int], Iterator[int]]
"""Least and most frames of a useful chunk → frames of each chunk."""


@dataclass(frozen=True, slots=True)
class Models:
    """Opened models that jobs run on."""

    language_model: DualAR
    decoder: CodecDecoder
    codec: Codec
    contexts: ContextStore


MOST_BUFFERED_S = 10.0
"""Seconds of sound that a job may be ahead of its reader; then it pauses."""


@dataclass(frozen=True, slots=True)
class Spoken:
    """One piece of text, spoken."""

    codes: npt.NDArray[np.int32]
    """[C, frames]"""
    stop_reason: StopReason


class Speaker(Protocol):
    """What makes jobs: a `TTS`."""

    def job(self, request: Request, progress: Callable[[Progress], None] | None, sizes: ChunkSizes) -> Job:
        """Return the job of a request after all checks that need no graph."""
        ...

    def models(self) -> Models:
        """Open the graphs that speaking needs."""
        ...

    def gain(self, task: Task) -> float:
        """Return the factor on all samples of a task."""
        ...


class Job:
    """The state of one request. It runs no language model: it gives rows, takes the columns that are drawn, and decodes them.

    One thread calls `begin`, `take`, `spend` and `decode`; another may call `close` and `pop`.
    """

    row: Row
    """The generation of the current piece of text; none if the codes are known."""
    slot: int | None = None
    """Place of its rows in the batch while it has one, from the first piece to the last."""
    parked: Parked | None = None
    """What its row has read, while it has no slot."""
    known: Sequence[Spoken] = ()
    """What it says, if that was said before: only the codec runs."""

    def __init__(
        self,
        task: Task,
        manifest: Manifest,
        sizes: ChunkSizes,
        accepted: float,
        progress: Callable[[Progress], None] | None = None,
    ) -> None:
        """Make a job that has not begun. accepted: time of the request, of `time.perf_counter`.

        Raises ArgumentError for a `progress` that is no function, AudioError for another speed than 1 if PyAV is not installed.
        """
        if progress is not None and not callable(progress):
            raise ArgumentError(f"progress is of type {type(progress).__name__}; a function is expected")
        self._manifest = manifest
        self._stretcher = Stretcher(manifest.codec.sample_rate, task.speed)
        self.task, self._sizes, self._accepted, self._progress = task, sizes, accepted, progress
        self.closed = threading.Event()
        """Set: nothing more is drawn."""
        self.done = False
        """No chunk follows those that are in the job. With an `error` if that is why."""
        self.error: BaseException | None = None
        self.most_buffered_s = MOST_BUFFERED_S
        self._buffered_s = 0.0
        self.heard_until: float | None = None
        """Time at which all sound so far has been played, if it plays since the first; None before the first."""
        self.begun = False
        self.said: list[Spoken] = []
        """What it has said: one entry for each piece that has ended."""
        self._codes: list[Ints] = []
        self._chunks: deque[AudioChunk] = deque()
        self._drawn: list[Ints] = []
        self.piece = 0
        """Number of the current piece of text, 0-based."""
        self._frames = self._clipped = 0
        self._spent = self._load_s = 0.0

    def begin(self, models: Models, gain: float, load_s: float) -> None:
        """Make the first row. gain: factor on all samples. load_s: seconds that the opening of the models took."""
        self._models, self._gain, self._load_s = models, gain, load_s
        self._lengths = self._sizes(*models.decoder.chunk_frames)
        self._stream, self._noise = models.decoder.stream(self.task.quirks), SeededNoise(self.task.seed)
        self._began, self.begun = time.perf_counter(), True
        self._next_row()

    def _next_row(self) -> None:
        task, self._wanted = self.task, next(self._lengths)
        if self.known:
            return
        self.row = Row(
            self._models.language_model.language_model,
            task.conversation.user(task.pieces[self.piece]),
            task.sampling,
            self._noise,
            head=task.conversation.head.shape[1],
            max_columns=task.max_frames,
            quirks=task.quirks,
        )

    @property
    def paused(self) -> bool:
        """Whether it waits for its reader, who has not taken what there is."""
        return not self.done and self._buffered_s >= self.most_buffered_s

    @property
    def frames_wanted(self) -> int:
        """Frames that must be drawn before a chunk is due."""
        return self._wanted - len(self._drawn)

    @property
    def due(self) -> bool:
        """Whether the columns of a chunk are drawn, so that `decode` comes next."""
        return bool(self.known) or self.frames_wanted == 0 or not self.row.goes_on

    @property
    def between_pieces(self) -> bool:
        """Whether a piece of text has ended, and nothing of the next was read."""
        return self.piece > 0 and not self.known and not self.row.begun

    @property
    def key(self) -> bytes:
        """A hash of all that its codes depend on."""
        task = self.task
        rest = (task.pieces, task.sampling, task.seed, task.max_frames, task.quirks)
        return hashlib.sha256(repr(rest).encode() + task.conversation.head.tobytes()).digest()

    def spend(self, seconds: float) -> None:
        """Count seconds of the language model for the next chunk."""
        self._spent += seconds

    def take(self, column: Ints | None) -> None:
        """Take what the row gave: the column that is spoken next, int64 [1 + C], or None."""
        if column is None:
            return
        self._drawn.append(column)
        self._frames += 1
        if self._progress is not None:
            audio_s, elapsed_s = self._frames / self._models.codec.frame_rate, time.perf_counter() - self._began
            self._progress(Progress(self.piece, len(self.task.pieces), self._frames, audio_s, elapsed_s))

    def decode(self) -> None:
        """Decode the columns that are due into a chunk. After the last of a piece `row` is that of the next, or `done` is set.

        Raises the row's error, and FishrtError for codes that have no sound.
        """
        task, codec, begun = self.task, self._models.codec, time.perf_counter()
        codes, stop_reason = self._known_codes() if self.known else self._drawn_codes()
        ends, frames = stop_reason is not None, codes.shape[1]
        pcm = self._stream.push(codes, last=ends) if frames else self._stream.flush()
        if self._gain != 1:
            pcm = pcm * np.float32(self._gain)
            self._clipped += int((np.abs(pcm) > 1).sum())
            pcm = np.clip(pcm, -1, 1)
        pcm = self._stretcher.push(pcm)
        if ends and self.piece + 1 == len(task.pieces):
            pcm = np.concatenate([pcm, self._stretcher.finish()])
        now = time.perf_counter()
        first = len(pcm) > 0 and self.heard_until is None
        timings = Timings(self._load_s, self._spent, now - begun, now - self._accepted if first else None)
        piece, seconds = task.pieces[self.piece], len(pcm) / codec.sample_rate
        if len(pcm):
            self.heard_until = max(self.heard_until or now, now) + seconds
        self._buffered_s += seconds
        self._chunks.append(AudioChunk(pcm, codec.sample_rate, codes, self.piece, piece, stop_reason, task.seed, timings))
        self._codes.append(codes)
        self._drawn, self._spent, self._load_s = [], 0.0, 0.0
        if stop_reason is None:
            self._wanted = next(self._lengths)
            return
        self.said.append(Spoken(np.concatenate(self._codes, axis=1).astype(np.int32), stop_reason))
        self._codes, self.piece = [], self.piece + 1
        if self.piece < len(task.pieces):
            self._next_row()
            return
        if self._clipped:
            task.warnings.append(f"{self._clipped:,} samples are clipped: use a smaller volume than {task.volume:g}")
        self.done = True

    def _drawn_codes(self) -> tuple[Ints, StopReason | None]:
        """Return the codes of the columns that are due, int64 [C, frames], and why the piece ends, if it does."""
        if self.row.error:
            raise self.row.error
        if self.row.stop_reason is not None:  # later prompts have the columns as drawn; the codec gets codes that it has
            self.task.conversation.assistant(self.row.drawn)
        codes = spoken_codes(self._drawn, self._models.language_model.language_model, self._models.codec)
        return codes, self.row.stop_reason

    def _known_codes(self) -> tuple[Ints, StopReason | None]:
        piece, given = self.known[self.piece], sum(codes.shape[1] for codes in self._codes)
        codes = piece.codes[:, given : given + self._wanted].astype(np.int64)
        self._frames += codes.shape[1]
        return codes, piece.stop_reason if given + codes.shape[1] == piece.codes.shape[1] else None

    def fail(self, error: BaseException) -> None:
        """End the job with an error, after the chunks that it has."""
        self.error, self.done = error, True

    def pop(self) -> AudioChunk | None:
        """Take the next chunk; None if there is none yet."""
        if not self._chunks:
            return None
        chunk = self._chunks.popleft()
        self._buffered_s -= chunk.duration_s
        return chunk

    def describe(self, pieces: tuple[PieceInfo, ...], samples: int, timings: Timings) -> SpeechInfo:
        """Describe chunks: the pieces that have ended, their samples, and the sums of their timings."""
        task, manifest, audio_s = self.task, self._manifest, samples / self._manifest.codec.sample_rate
        return SpeechInfo(
            seed=task.seed,
            sampling=task.sampling,
            voices=task.voices,
            pieces=pieces,
            frames=sum(piece.frames for piece in pieces),
            audio_s=audio_s,
            timings=timings,
            rtf=rtf(timings.compute_s, audio_s) if audio_s else None,
            provider=task.provider,
            bundle=manifest.name,
            bundle_sha256=hashlib.sha256(manifest.to_json().encode()).hexdigest(),
            warnings=(*task.warnings, *piece_warnings(pieces, len(task.pieces))),
        )

    def close(self) -> None:
        """Let nothing more be drawn, and give no more chunks."""
        self.closed.set()


def spoken_codes(columns: Sequence[Ints], lm: LanguageModel, codec: Codec) -> Ints:
    """Return the codes int64 [C, frames] of columns int64 [1 + C], as the codec has them. Raises FishrtError for padding."""
    codes = np.stack(columns, axis=1)[1:] - lm.code_offset if columns else np.zeros((lm.num_codebooks, 0), np.int64)
    if (codes < 0).any():
        raise FishrtError("the model drew padding instead of a code, which has no sound", hint="try another seed")
    return clamp_codes(codes, codec)
