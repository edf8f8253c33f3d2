"""Jobs and turns of a diffusion model: blocks of latents, made in Euler steps, become chunks of sound.

    turn    one Euler step of one job ─► a chunk of each job that has latents ─► the next turn

So a block is heard while the next one is made. A step waits for a chunk without which a stream would run dry. The jobs take their
steps in turn; what a job gives does not depend on the others.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..arrays import Floats
from ..bundle.memory import memory_errors
from ..codec import CodecDecoder
from ..diffusion.denoising import Denoising
from ..diffusion.generate import Utterance
from ..diffusion.text import Pace, tokens
from ..diffusion.voices import VoiceKeys
from ..errors import FishrtError
from ..speaking.job import Job, Task
from ..speaking.turns import Turns, ends
from ..speech import StopReason


@dataclass(frozen=True, slots=True)
class BlockTask(Task):
    """A task for a diffusion model."""

    denoising: Denoising
    """Resolved, with its `later`, and within `max_frames`."""
    voice: Floats | None
    """Latents of all voices, float32 [frames, channels]; None: there is none."""


class BlockJob(Job):
    """A job of a diffusion model, which it does not run: it takes the latents of blocks."""

    task: BlockTask
    utterance: Utterance | None = None
    """The current piece of text; None before its first step."""

    def _set_up(self) -> None:
        task, codec = self.task, self._manifest.codec
        self._made: Floats = np.empty((0, self._manifest.diffusion.channels), np.float32)
        pace = task.denoising.pace or Pace()
        windows_s = [(self._settings(n).frames or 0) / codec.frame_rate for n in range(len(task.pieces))]
        self._expected_s = sum(min(pace.estimate(piece), s) for piece, s in zip(task.pieces, windows_s, strict=True))

    def _settings(self, piece: int) -> Denoising:
        """Return the settings of a piece of text."""
        first = self.task.denoising
        return first if piece == 0 else first.later or first

    def _next_piece(self) -> None:
        self.utterance = None

    @property
    def goes_on(self) -> bool:
        """Whether the piece needs more steps."""
        return not self.known and (self.utterance is None or self.utterance.stop_reason is None)

    def _has_chunk(self) -> bool:
        return len(self._made) > 0 or not self.goes_on

    def _piece_begun(self) -> bool:
        return self.utterance is not None

    @property
    def parked_bytes(self) -> int:
        """See `Job.parked_bytes`."""
        return self.utterance.nbytes if self.utterance else 0

    @property
    def key(self) -> bytes:
        """See `Job.key`."""
        task = self.task
        voice = b"" if task.voice is None else task.voice.tobytes()
        return hashlib.sha256(repr((task.pieces, task.denoising, task.seed)).encode() + voice).digest()

    def step(self, voices: VoiceKeys) -> None:
        """Take one Euler step of the piece; the first one also reads its text and voice. Raises GraphError."""
        if self.utterance is None:
            task = self.task
            voice = None if task.voice is None else voices.of(task.voice)
            text, settings = tokens(task.pieces[self.piece]), self._settings(self.piece)
            self.utterance = Utterance(voices.denoiser, text, voice, settings, task.seed + self.piece)
        latents = self.utterance.advance()
        if latents is not None:
            self._made = np.concatenate([self._made, latents])
            self._frames += len(latents)

    def report(self) -> None:
        """Tell `progress` of a step."""
        assert self.utterance is not None
        self._report(self.utterance.step, self.utterance.steps, self._expected_s)

    def _next_frames(self) -> tuple[Floats, StopReason | None]:
        assert self.utterance is not None
        latents, self._made = self._made[: self._wanted], self._made[self._wanted :]
        return latents, None if len(self._made) else self.utterance.stop_reason


class BlockTurns(Turns[BlockJob]):
    """Jobs that take steps in turn."""

    can_park = True

    def __init__(self, voices: VoiceKeys, decoder: CodecDecoder) -> None:
        """voices: keys and values, and the graphs."""
        super().__init__(decoder)
        self._voices = voices
        self._step_s = 0.0
        """Seconds of the last step."""

    def _compute(self, ready: Sequence[BlockJob]) -> None:
        going = [job for job in ready if job.goes_on]
        self.rows = 0
        if not going or self._would_run_dry(ready):
            return
        job, begun = going[0], time.perf_counter()
        try:
            with memory_errors():
                job.step(self._voices)
        except FishrtError as error:
            job.fail(error)
        else:
            with ends(job):
                job.report()
        self._step_s, self.rows = time.perf_counter() - begun, 1
        job.spend(self._step_s)
        self.jobs.remove(job)
        self.jobs.append(job)

    def _would_run_dry(self, ready: Sequence[BlockJob]) -> bool:
        """Return whether a stream with latents would run dry during a step, so that its next chunk comes first."""
        latest = time.perf_counter() + self._step_s + self._chunk_s
        return any(job.due and (job.heard_until is None or job.heard_until < latest) for job in ready)

    def _enter(self, job: BlockJob) -> None:
        """See `Turns`: a piece is read with its first step."""

    def _leave(self, job: BlockJob) -> None:
        job.utterance = None

    def _park(self, job: BlockJob) -> None:
        """See `Turns`: a job keeps what it has read itself."""
