"""Generations that run together: rows, which know no engine, and a batch, which has slots for them in the models' state.

    Row      prompt, settings, noise, limit ─► the columns to read next ─► takes the column that is drawn, and says if it ends
    Batch    slot 0  voice │ text │ speech …        ┐
             slot 1  (idle) voice │ text │ speech   ├─ one call of the slow AR, then one column for each row
             slot 2  voice │ text │ speech …        ┘

A column is a frame with its main token on top: int64 [1 + C]. Columns hold codes + `code_offset`. The prompt of a row is read by
itself, in parts; all that follows is read in one call for all slots up to the last that speaks. In that call an idle slot reads
behind the columns that it holds, so that it keeps them for a row with the same voice.

A row draws with its own noise, so that it gives the same codes whatever runs beside it, except where the kernels of a larger
batch round otherwise: see docs/decisions.md.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from fishrt_engines import Engine, State

from ..arrays import Ints
from ..bundle.features import USUAL, LanguageModel, Quirks
from ..errors import FishrtError, PromptError, SamplingError
from .context import ContextStore, SlowContext, part_end
from .drawing import MOST_RANKED, Drawer, Draws, FrameDrawer, StepDrawer, check_drawn
from .sampling import Noise, Sampling, SeededNoise, is_semantic

StopReason = Literal["end", "max_frames", "max_seq_len"]
"""Reasons of an end: the end token; the limit of frames; no position left in the model's context."""


@dataclass(frozen=True, slots=True)
class DualAR:
    """The two graphs of a language model, and its ids and rules."""

    slow: Engine
    fast: Engine
    """The fast AR, which runs for each code, or the frame graph, which draws a whole column; see `frame`."""
    language_model: LanguageModel
    warm: set[int] = field(default_factory=set, init=False, repr=False, compare=False)
    """Numbers of slots whose calls are captured; see `Batch`."""

    def drawer(self, rows: int) -> Drawer:
        """Return the drawer for this kind of fast engine, for up to `rows` generations at once."""
        return (StepDrawer if self.fast.spec.states else FrameDrawer)(self.fast, self.language_model, rows)


class Row:
    """One generation, without an engine: it says which columns are read next, and takes the one that is drawn."""

    def __init__(
        self,
        lm: LanguageModel,
        prompt: Ints,
        sampling: Sampling,
        noise: Noise,
        *,
        head: int = 0,
        max_columns: int | None = None,
        quirks: Quirks = USUAL,
    ) -> None:
        """Begin the generation that continues a prompt, int64 [1 + C, length].

        sampling: resolved. head: columns at the start of the prompt that other prompts share, voices and system text.
        max_columns: None means until the end token or the end of the context.
        Raises PromptError for a prompt that does not fit the model, SamplingError for max_columns below 1.
        """
        _check_prompt(prompt, lm)
        if max_columns is not None and max_columns < 1:
            raise SamplingError(f"the limit of frames is {max_columns}", hint="it must be at least 1")
        room = lm.max_seq_len - prompt.shape[1]
        self.prompt, self.head = prompt, head
        self.draws = Draws(lm, sampling, noise, quirks)
        self.limit = room if max_columns is None else min(max_columns, room)
        self.stop_reason: StopReason | None = None
        """None: it goes on."""
        self.error: FishrtError | None = None
        """What ended the row, and no other row of its batch."""
        self._limit_reason: StopReason = "max_seq_len" if self.limit == room and max_columns != room else "max_frames"
        self._lm, self._quirks = lm, quirks
        self._drawn: list[Ints] = []

    @property
    def goes_on(self) -> bool:
        """Whether more columns can be drawn."""
        return self.stop_reason is None and self.error is None

    @property
    def begun(self) -> bool:
        """Whether a column was drawn."""
        return bool(self._drawn)

    @property
    def drawn(self) -> Ints:
        """All columns so far as they were drawn, int64 [1 + C, T], the end token's included."""
        return np.stack(self._drawn, axis=1) if self._drawn else self.prompt[:, :0]

    def pending(self) -> Ints:
        """Return the columns to read next, int64 [1 + C, n]: the prompt, then the last column, exactly as drawn."""
        return self._drawn[-1][:, None] if self._drawn else self.prompt

    def accept(self, column: Ints) -> Ints | None:
        """Take the next column, int64 [1 + C], and set `stop_reason` if it is the last.

        Return the column that is spoken next, or None: the end token's is not spoken, or another one that `Quirks.trim` names.
        Raises GraphError and SamplingError for a column that could not be drawn.
        """
        check_drawn(column)
        lm, literal = self._lm, self._quirks.draws
        column = column.copy()
        ends = column[0] == lm.end_id and not (literal and not self._drawn)
        if ends and not literal:
            column[1:] = lm.code_offset  # the codes of the end token are not heard
        if lm.zero_codes_off_audio and not is_semantic(int(column[0]), lm):
            column[1:] = 0
        self.draws.add(column)
        self._drawn.append(column)
        if ends:
            self.stop_reason = "end"
        elif len(self._drawn) == self.limit:
            self.stop_reason = self._limit_reason
        match self._quirks.trim:
            case "last":
                return self._drawn[-2] if len(self._drawn) > 1 else None
            case "first":
                return column if len(self._drawn) > 1 else None
        return column if column[0] != lm.end_id else None


@dataclass(frozen=True, slots=True)
class Parked:
    """What a row has read that goes on later."""

    columns: Ints
    state: State
    """Keys and values of the columns: one row."""
    nbytes: int
    """Bytes of the state."""


class Batch:
    """Slots for rows in the state of a model. Used by one thread at a time."""

    def __init__(self, model: DualAR, slots: int = 1, contexts: ContextStore | None = None) -> None:
        """Make idle slots. contexts: keys and values of known heads.

        The first time that a model is given so many slots, calls whose sizes cost much the first time are made, so that no row
        waits for that.
        """
        self._contexts = ContextStore() if contexts is None else contexts
        self._context = SlowContext(model.slow, model.language_model.num_codebooks, slots)
        self._drawer = model.drawer(slots)
        self._rows: list[Row | None] = [None] * slots
        self._fresh: set[int] = set()
        """Slots whose row has read nothing yet; they hold what another row has read."""
        self._most_rows = model.language_model.max_seq_len if model.slow.traits.few_sizes else None
        """Most rows of the caches; None: as many as the rows may need."""
        if self._most_rows and slots not in model.warm:
            self._warm_up(model.language_model)
            model.warm.add(slots)

    def _warm_up(self, lm: LanguageModel) -> None:
        """Take a step of every size, and draw from few and from many candidates. The slots hold nothing before and after."""
        context, column = self._context, np.zeros((1 + lm.num_codebooks, 1), np.int64)
        draws = [Draws(lm, Sampling(top_k=n).resolve(lm.sampling), SeededNoise(0), USUAL) for n in (1, MOST_RANKED)]
        context.reserve(1, lm.max_seq_len)
        for size in context.batch_sizes:
            results = context.step({size - 1: column}, self._drawer.resident)
            for one in draws:
                self._drawer.draw(results, [one] * size)
        for slot in range(len(self._rows)):
            context.keep(0, slot)

    def admit(self, row: Row, slot: int | None = None, parked: Parked | None = None) -> int:
        """Give a new row a slot, or one that was parked, and return that.

        slot: an idle one; all columns there that begin the prompt are not read again. None: any idle one, if possible one that
        holds the head; nothing else is reused, so that a row gives the same codes whatever ran there before.
        Raises ValueError if no slot is idle.
        """
        idle = [n for n, taken in enumerate(self._rows) if taken is None]
        if not idle or slot not in (None, *idle):
            raise ValueError(f"no idle slot for a row: {len(idle)} of {len(self._rows)} are idle")
        head = row.prompt[:, : row.head]
        if slot is not None and self._context.holds(head, slot):
            self._context.rewind(row.prompt, slot)
        else:
            slot = min(idle, key=lambda n: not self._context.holds(head, n)) if slot is None else slot
            self._fresh.add(slot)
        length = row.prompt.shape[1]
        self._context.reserve(length, self._most_rows or length + row.limit, slot)
        self._rows[slot] = row
        if parked is not None:
            self._context.restore(parked.columns, parked.state, slot)
            self._context.heads[slot] = row.head if parked.columns.shape[1] >= row.head else 0
            self._fresh.discard(slot)
        return slot

    def park(self, row: Row) -> Parked | None:
        """Take a row out that goes on later. Return what it has read; None: nothing."""
        slot, context = self._rows.index(row), self._context
        nothing = slot in self._fresh or not context.length(slot)
        parked = None
        if not nothing:
            state = context.save(slot)
            nbytes = sum(t.nbytes(state.dims) for t in context.engine.spec.state_tensors)
            parked = Parked(context.columns(slot).copy(), state, nbytes)
        self.leave(row)
        self._fresh.discard(slot)
        return parked

    def step(self) -> list[tuple[Row, Ints | None]]:
        """Draw a column for every row, and read the prompts of new rows. See `advance` for the result."""
        rows = [row for row in self._rows if row is not None]
        drawn = self.advance([row for row in rows if row.begun])
        for row in rows:
            while row.goes_on and not row.begun:
                drawn += self.read(row)
        return drawn

    def next_part(self, row: Row) -> tuple[int, int]:
        """Return the first column of the prompt that `read` reads next, and the end. A head that is known is not among them."""
        slot, context = self._rows.index(row), self._context
        if slot in self._fresh:
            self._contexts.restore(context, row.prompt[:, : row.head], slot)
            self._fresh.remove(slot)
        start = context.length(slot)
        return start, part_end(start, row.head, row.prompt.shape[1])

    def read(self, row: Row) -> list[tuple[Row, Ints | None]]:
        """Read the next part of the prompt of a row. After the last part draw its first column; see `advance` for the result."""
        slot, context, (start, end) = self._rows.index(row), self._context, self.next_part(row)
        results = context.read(row.prompt[:, start:end], self._drawer.resident, slot)
        if end == row.head:
            self._contexts.keep(context, end, slot)
        if end < row.prompt.shape[1]:
            return []
        return self._accepted({0: row}, self._drawer.draw(results, [row.draws]), slot)

    def advance(self, rows: Collection[Row]) -> list[tuple[Row, Ints | None]]:
        """Draw the next column of some rows that have begun, in one call. Return each with what its `accept` returned.

        A row that has ended leaves its slot; if what ended it is its own `error`, the others go on.
        """
        going = {n: row for n, row in enumerate(self._rows) if row is not None and row in rows}
        if not going:
            return []
        results = self._context.step({n: row.pending() for n, row in going.items()}, self._drawer.resident)
        draws = [going[n].draws if n in going else None for n in range(results["logits"].shape[0])]
        return self._accepted(going, self._drawer.draw(results, draws))

    def _accepted(self, rows: Mapping[int, Row], columns: Ints, first: int = 0) -> list[tuple[Row, Ints | None]]:
        """Give rows their columns, by their number. first: the slot of column 0."""
        spoken: list[tuple[Row, Ints | None]] = []
        for n, row in rows.items():
            try:
                spoken.append((row, row.accept(columns[n])))
            except FishrtError as error:
                row.error = error
                spoken.append((row, None))
            if not row.goes_on:
                self._rows[first + n] = None
        return spoken

    def leave(self, row: Row) -> None:
        """Take a row out that has not ended. Its slot keeps what it has read."""
        self._rows = [None if taken is row else taken for taken in self._rows]


def _check_prompt(prompt: Ints, lm: LanguageModel) -> None:
    if prompt.dtype != np.int64 or prompt.ndim != 2 or prompt.shape[0] != 1 + lm.num_codebooks or prompt.shape[1] < 1:
        wanted = f"int64 [{1 + lm.num_codebooks}, length of at least 1]"
        raise PromptError(f"the prompt is {prompt.dtype} {list(prompt.shape)}; the model takes {wanted}")
    if prompt.shape[1] >= lm.max_seq_len:
        raise PromptError(
            f"the prompt has {prompt.shape[1]} positions; the model has {lm.max_seq_len} for prompt and speech together",
            hint="shorten the text or the references",
        )
    for rows, limit, what in ((prompt[:1], lm.vocab_size, "token"), (prompt[1:], lm.codebook_width, "code")):
        if rows.min() < 0 or rows.max() >= limit:
            worst = rows.min() if rows.min() < 0 else rows.max()
            raise PromptError(f"the prompt holds the {what} {worst}; the model takes 0 to {limit - 1}")
