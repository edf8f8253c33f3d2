"""Jobs and turns of a language model: rows of a batch, whose columns become chunks of sound.

    turn    some prompts ─► one column for every row ─► the chunks that are due ─► the next turn

Prompts are read one after the other, PART columns in a turn, so that nobody waits longer than for a long one. A prompt waits
where reading it would let a stream run dry, but not for ever. What a job gives does not depend on the others, except for the
rounding of larger batches; see `language_model/batch.py`.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..arrays import Ints
from ..bundle.features import Codec, LanguageModel
from ..bundle.memory import memory_errors
from ..codec import CodecDecoder, clamp_codes
from ..errors import FishrtError
from ..language_model.batch import Batch, DualAR, Parked, Row
from ..language_model.context import PART, ContextStore
from ..language_model.prompt import Conversation
from ..language_model.sampling import Sampling, SeededNoise
from ..speaking.job import Job, Task
from ..speaking.turns import Turns, ends
from ..speech import StopReason

MOST_HELD = 1
"""Turns in a row in which prompts wait for streams that would run dry. Where all run dry, a longer wait helps none of them."""


@dataclass(frozen=True, slots=True)
class ColumnTask(Task):
    """A task for a language model."""

    sampling: Sampling
    """Resolved."""
    conversation: Conversation


class ColumnJob(Job):
    """A job of a language model, which it does not run: it gives a row for each piece of text, and takes columns."""

    task: ColumnTask
    row: Row
    """The generation of the current piece of text; none if the codes are known."""
    slot: int | None = None
    """Place of its rows in the batch while it has one, from the first piece to the last."""
    parked: Parked | None = None
    """What its row has read, while it has no slot."""

    def _set_up(self) -> None:
        self._noise = SeededNoise(self.task.seed)
        self._drawn: list[Ints] = []

    def _next_piece(self) -> None:
        task = self.task
        self.row = Row(
            self._manifest.language_model,
            task.conversation.user(task.pieces[self.piece]),
            task.sampling,
            self._noise,
            head=task.conversation.head.shape[1],
            max_columns=task.max_frames,
            quirks=task.quirks,
        )

    @property
    def frames_wanted(self) -> int:
        """Frames that must be drawn before a chunk is due."""
        return self._wanted - len(self._drawn)

    def _has_chunk(self) -> bool:
        return self.frames_wanted <= 0 or not self.row.goes_on

    def _piece_begun(self) -> bool:
        return self.row.begun

    @property
    def parked_bytes(self) -> int:
        """See `Job.parked_bytes`."""
        return self.parked.nbytes if self.parked else 0

    @property
    def key(self) -> bytes:
        """See `Job.key`."""
        task = self.task
        rest = (task.pieces, task.sampling, task.seed, task.max_frames, task.quirks)
        return hashlib.sha256(repr(rest).encode() + task.conversation.head.tobytes()).digest()

    def take(self, column: Ints | None) -> None:
        """Take what the row gave: the column that is spoken next, int64 [1 + C], or None."""
        if column is None:
            return
        self._drawn.append(column)
        self._frames += 1
        self._report()

    def _next_frames(self) -> tuple[Ints, StopReason | None]:
        if self.row.error:
            raise self.row.error
        if self.row.stop_reason is not None:  # later prompts have the columns as drawn; the codec gets codes that it has
            self.task.conversation.assistant(self.row.drawn)
        codes = spoken_codes(self._drawn, self._manifest.language_model, self._manifest.codec)
        self._drawn = []
        return codes, self.row.stop_reason


class ColumnTurns(Turns[ColumnJob]):
    """Jobs and the slots of their rows."""

    def __init__(self, model: DualAR, decoder: CodecDecoder, contexts: ContextStore, slots: int = 1) -> None:
        """Make turns for up to `slots` jobs at once. contexts: keys and values of known heads."""
        super().__init__(decoder)
        with memory_errors():
            self._batch = Batch(model, slots, contexts)
        self.can_park = model.slow.traits.parts_states
        self._held = 0
        # Seconds of a column of a prompt, and of a step for all rows: the last ones.
        self._column_s = self._step_s = 0.0

    def _enter(self, job: ColumnJob) -> None:
        job.slot = self._batch.admit(job.row, job.slot, job.parked)
        job.parked = None

    def _leave(self, job: ColumnJob) -> None:
        if job.slot is not None:
            self._batch.leave(job.row)
            job.slot = None

    def _park(self, job: ColumnJob) -> None:
        job.parked = None if job.slot is None else self._batch.park(job.row)
        job.slot = None

    def _compute(self, ready: Sequence[ColumnJob]) -> None:
        self._read_prompts([job for job in ready if not job.known and not job.row.begun])
        self._step([job for job in ready if not job.done and not job.due and job.row.begun])

    def _read_prompts(self, jobs: Sequence[ColumnJob]) -> None:
        """Read parts of prompts, in all up to PART columns: steps with all rows follow, and not one for each prompt."""
        room = PART
        for job in jobs:
            while job.row.goes_on and not job.row.begun:
                begun = time.perf_counter()
                start, end = self._batch.next_part(job.row)
                job.spend(time.perf_counter() - begun)  # a known head was copied
                if end - start > room or not self._may_read(end - start):
                    return
                room -= end - start
                self._read(job, end - start)

    def _may_read(self, columns: int) -> bool:
        """Return whether no stream would run dry while a part of a prompt is read, or prompts have waited long enough."""
        now, self._held = time.perf_counter(), self._held + 1
        for job in self.jobs:
            if job.heard_until is not None and self._held <= MOST_HELD:
                needed_s = columns * self._column_s + job.frames_wanted * self._step_s + self._chunk_s
                if now < job.heard_until < now + needed_s:  # one that is dry already is not helped by a turn
                    return False
        self._held = 0
        return True

    def _read(self, job: ColumnJob, columns: int) -> None:
        begun = time.perf_counter()
        with memory_errors():
            drawn = self._batch.read(job.row)
        seconds = time.perf_counter() - begun
        self._column_s = seconds / columns
        job.spend(seconds)
        with ends(job):
            for _, column in drawn:
                job.take(column)

    def _step(self, jobs: Sequence[ColumnJob]) -> None:
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


def spoken_codes(columns: Sequence[Ints], lm: LanguageModel, codec: Codec) -> Ints:
    """Return the codes int64 [C, frames] of columns int64 [1 + C], as the codec has them. Raises FishrtError for padding."""
    codes = np.stack(columns, axis=1)[1:] - lm.code_offset if columns else np.zeros((lm.num_codebooks, 0), np.int64)
    if (codes < 0).any():
        raise FishrtError("the model drew padding instead of a code, which has no sound", hint="try another seed")
    return clamp_codes(codes, codec)
