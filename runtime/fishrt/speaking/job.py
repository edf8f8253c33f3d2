"""A request while it is spoken, one piece of text after the other: frames of the model become chunks of sound."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..arrays import Sound
from ..audio.speed import Stretcher
from ..bundle.features import Quirks
from ..bundle.manifest import Manifest
from ..codec import CodecDecoder, apart, frames_of, joined, part
from ..diffusion.denoising import Denoising
from ..errors import ArgumentError
from ..language_model.sampling import Sampling
from ..metrics import rtf
from ..speech import AudioChunk, PieceInfo, Progress, SpeechInfo, StopReason, Timings
from ..voices.voice import Voice
from .warnings import piece_warnings

ChunkSizes = Callable[[int, int], Iterator[int]]
"""Least and most frames of a useful chunk → frames of each chunk."""
MOST_BUFFERED_S = 10.0
"""Seconds of sound that a job may be ahead of its reader; then it pauses."""


@dataclass(frozen=True, slots=True)
class Spoken:
    """One piece of text, spoken."""

    sound: Sound
    """Codes int32 [C, frames], or latents float32 [frames, channels]."""
    stop_reason: StopReason


@dataclass(frozen=True, slots=True)
class Task:
    """A request that was checked for a bundle, with all that it needs; a kind of model may need more."""

    pieces: list[str]
    voices: tuple[str, ...]
    """Names of the voices that speak."""
    sampling: Sampling | None
    """Resolved; None: the model is a diffusion model."""
    denoising: Denoising | None
    """Resolved; None: the model is a language model."""
    seed: int
    max_frames: int
    quirks: Quirks
    volume: float
    speed: float
    levelled: Voice | None
    """The voice that is brought to TARGET_LUFS; None: no change of loudness."""
    provider: str
    bundle_sha256: str
    """Of the bundle's manifest."""
    warnings: list[str]
    """Doubts about the speech, except for pieces that ended early."""


class Job(ABC):
    """The state of one request. It runs no model but the codec's decoder: its turns give it frames, and it decodes them.

    One thread calls `begin`, `spend` and `decode`; another may call `close` and `pop`.
    """

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
        self.begun = self._hurried = False
        self.said: list[Spoken] = []
        """What it has said: one entry for each piece that has ended."""
        self._given: list[Sound] = []
        self._chunks: deque[AudioChunk] = deque()
        self.piece = 0
        """Number of the current piece of text, 0-based."""
        self._frames = self._clipped = 0
        self._spent = self._load_s = 0.0
        self._set_up()

    @abstractmethod
    def _set_up(self) -> None:
        """Make what the kind of model holds beside the task; called once."""

    def begin(self, decoder: CodecDecoder, gain: float, load_s: float) -> None:
        """Begin the first piece. gain: factor on all samples. load_s: seconds that the opening of the models took."""
        self._gain, self._load_s = gain, load_s
        self._chunk_frames = decoder.chunk_frames
        self._lengths = self._sizes(*self._chunk_frames)
        self._stream = decoder.stream(self.task.quirks)
        self._began, self.begun = time.perf_counter(), True
        self._begin_piece()

    def _begin_piece(self) -> None:
        self._wanted = next(self._lengths)
        if not self.known:
            self._next_piece()

    @abstractmethod
    def _next_piece(self) -> None:
        """Make ready for the piece of text `piece`."""

    @abstractmethod
    def _piece_begun(self) -> bool:
        """Return whether the model has begun the piece."""

    @abstractmethod
    def _has_chunk(self) -> bool:
        """Return whether the model has made the frames of a chunk."""

    @abstractmethod
    def _next_frames(self) -> tuple[Sound, StopReason | None]:
        """Return the codes or latents that are due, and why the piece ends, if it does. Raises the model's error."""

    @property
    @abstractmethod
    def key(self) -> bytes:
        """A hash of all that its codes or latents depend on."""

    @property
    @abstractmethod
    def parked_bytes(self) -> int:
        """Bytes of what it has read, while it is parked."""

    @property
    def paused(self) -> bool:
        """Whether it waits for its reader, who has not taken what there is."""
        return not self.done and self._buffered_s >= self.most_buffered_s

    @property
    def due(self) -> bool:
        """Whether the frames of a chunk are there, so that `decode` comes next."""
        return bool(self.known) or self._has_chunk()

    @property
    def between_pieces(self) -> bool:
        """Whether a piece of text has ended, and nothing of the next was read."""
        return self.piece > 0 and not self.known and not self._piece_begun()

    def hurry(self) -> None:
        """Make the first chunks half as long, if there is none yet: others wait for their first sound, too."""
        if not (self._hurried or self._given or self.said):
            least, most = self._chunk_frames
            self._lengths, self._hurried = self._sizes((least + 1) // 2, most), True
            self._wanted = next(self._lengths)

    def spend(self, seconds: float) -> None:
        """Count seconds of the model for the next chunk."""
        self._spent += seconds

    def _report(self, step: int = 0, steps: int = 0, expected_s: float | None = None) -> None:
        """Tell `progress` of the frames that there are, and of the steps of the piece."""
        if self._progress is not None:
            audio_s, elapsed_s = self._frames / self._manifest.codec.frame_rate, time.perf_counter() - self._began
            pieces = len(self.task.pieces)
            self._progress(Progress(self.piece, pieces, self._frames, audio_s, elapsed_s, step, steps, expected_s))

    def decode(self) -> None:
        """Decode the frames that are due into a chunk. After the last of a piece the next one begins, or `done` is set.

        Raises the model's error, and FishrtError for codes that have no sound.
        """
        task, codec, begun = self.task, self._manifest.codec, time.perf_counter()
        sound, stop_reason = self._known_frames() if self.known else self._next_frames()
        ends = stop_reason is not None
        pcm = self._stream.push(sound, last=ends) if frames_of(sound) else self._stream.flush()
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
        codes, latents = apart(sound)
        chunk = AudioChunk(pcm, codec.sample_rate, codes, self.piece, piece, stop_reason, task.seed, timings, latents)
        self._chunks.append(chunk)
        self._given.append(sound)
        self._spent = self._load_s = 0.0
        if stop_reason is None:
            self._wanted = next(self._lengths)
            return
        said = joined(self._given)
        self.said.append(Spoken(said.astype(np.int32) if latents is None else said, stop_reason))
        self._given, self.piece = [], self.piece + 1
        if self.piece < len(task.pieces):
            self._begin_piece()
            return
        if self._clipped:
            task.warnings.append(f"{self._clipped:,} samples are clipped: use a smaller volume than {task.volume:g}")
        self.done = True

    def _known_frames(self) -> tuple[Sound, StopReason | None]:
        piece, given = self.known[self.piece], sum(map(frames_of, self._given))
        end = min(given + self._wanted, frames_of(piece.sound))
        self._frames += end - given
        sound = part(piece.sound, given, end)
        sound = sound.astype(np.int64) if sound.dtype == np.int32 else sound  # codes are kept in less space
        return sound, piece.stop_reason if end == frames_of(piece.sound) else None

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
            bundle_sha256=task.bundle_sha256,
            warnings=self.warnings(pieces),
            denoising=task.denoising,
        )

    def warnings(self, pieces: Sequence[PieceInfo]) -> tuple[str, ...]:
        """Return the possible faults of a speech, of which these pieces have ended."""
        return (*self.task.warnings, *piece_warnings(pieces, len(self.task.pieces)))

    def close(self) -> None:
        """Let nothing more be drawn, and give no more chunks."""
        self.closed.set()
