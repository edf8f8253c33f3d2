"""The loop: prompt ids in, frames of codes out. It knows ids, not text, audio or providers.

    prompt ─► slow AR (all columns) ─┐
                                     ▼                                        ┌───────────────┐
    ┌──────────────► logits, hidden ─► main token ─► code 0 ─► fast AR ─► code 1 ─► … ─► code C−1 ─► column
    └── slow AR (one column) ◄─────────────────────────────────────────────────────────────────────┘

A column is a frame with its main token on top: int64 [1 + C]. Each is fed back to the slow AR exactly as drawn. The fast AR takes
the slow AR's hidden vector at its position 0 and code j − 1 at position j, so that it gives the logits of code j there. Where
code 0 follows from the main token, one call takes positions 0 and 1; elsewhere code 0 is drawn like the rest. See `drawing`; on
devices all of it is one graph.
Columns hold codes + `code_offset`, frames the codes themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fishrt_engines import Engine

from ..arrays import Ints
from ..bundle.features import LanguageModel
from ..errors import FishrtError, PromptError, SamplingError
from .context import SlowContext
from .drawing import Drawer, FrameDrawer, History, Rules, StepDrawer
from .sampling import Noise, Sampling, is_semantic

StopReason = Literal["end", "max_frames", "max_seq_len"]
"""Reasons of an end: the end token; the limit of frames; no position left in the model's context."""


@dataclass(frozen=True, slots=True)
class DualAR:
    """The two graphs of a language model, and its ids and rules."""

    slow: Engine
    fast: Engine
    """The fast AR, which runs for each code, or the frame graph, which draws a whole column; see `frame`."""
    language_model: LanguageModel

    def drawer(self, rules: Rules, noise: Noise) -> Drawer:
        """Return the drawer for this kind of fast engine."""
        kind = StepDrawer if self.fast.spec.states else FrameDrawer
        return kind(self.fast, self.language_model, rules, noise)


class Columns(Iterator[Ints]):
    """The columns of one generation as they are drawn, int64 [1 + C] each, the end token's included.

    `stop_reason` is None until the columns are exhausted. With `upstream_compat`, an end token in the first column does not stop
    the generation, and padding may be drawn instead of a code.
    """

    def __init__(
        self,
        model: DualAR,
        prompt: Ints,
        sampling: Sampling,
        noise: Noise,
        *,
        max_columns: int | None = None,
        upstream_compat: bool = False,
        context: SlowContext | None = None,
    ) -> None:
        """Begin a generation. context: columns that the slow AR has read already; a common prefix with the prompt is reused.

        Raises PromptError for a prompt that does not fit the model, SamplingError for max_columns below 1.
        """
        self.stop_reason: StopReason | None = None
        self._lm = lm = model.language_model
        _check_prompt(prompt, lm)
        length = prompt.shape[1]
        if max_columns is not None and max_columns < 1:
            raise SamplingError(f"the limit of frames is {max_columns}", hint="it must be at least 1")
        room = lm.max_seq_len - length
        self._limit = room if max_columns is None else min(max_columns, room)
        self._limit_reason: StopReason = "max_seq_len" if self._limit == room and max_columns != room else "max_frames"
        self._upstream_compat = upstream_compat
        self._count = 0
        self._history = History(lm, sampling)
        rules = Rules(sampling, 0 if upstream_compat else lm.code_offset, None if upstream_compat else lm.end_id)
        self._drawer = model.drawer(rules, noise)
        self._context = SlowContext(model.slow, lm.num_codebooks) if context is None else context
        self._context.reserve(length, length + self._limit)
        self._next_input = self._context.rewind(prompt)

    def __next__(self) -> Ints:
        if self.stop_reason is not None:
            raise StopIteration
        lm = self._lm
        results = self._context.read(self._next_input, self._drawer.resident)
        column = self._drawer.draw(results, self._history).copy()
        ends = column[0] == lm.end_id and (self._count > 0 or not self._upstream_compat)
        if ends and not self._upstream_compat:
            column[1:] = lm.code_offset  # the codes of the end token are not heard
        if lm.zero_codes_off_audio and not is_semantic(int(column[0]), lm):
            column[1:] = 0
        self._history.add(column)
        self._count += 1
        self._next_input = column[:, None]
        if ends:
            self.stop_reason = "end"
        elif self._count == self._limit:
            self.stop_reason = self._limit_reason
        return column


class Generation(Iterator[Ints]):
    """The frames of one generation as raw codes, int64 [C] each. `stop_reason` is None until they are exhausted."""

    def __init__(self, columns: Columns, model: LanguageModel, *, upstream_compat: bool) -> None:
        self._columns, self._model = columns, model
        self._drawn: list[Ints] = []
        self._spoken = self._trimmed(model.upstream_trim if upstream_compat else None)

    @property
    def stop_reason(self) -> StopReason | None:
        """Why the generation ended; None: it has not."""
        return self._columns.stop_reason

    @property
    def drawn(self) -> Ints:
        """All columns so far as they were drawn, int64 [1 + C, T], the end token's included."""
        return np.stack(self._drawn, axis=1) if self._drawn else np.zeros((1 + self._model.num_codebooks, 0), np.int64)

    def __next__(self) -> Ints:
        frame = next(self._spoken)[1:] - self._model.code_offset
        if frame.min() < 0:
            raise FishrtError("the model drew padding instead of a code, which has no sound", hint="try another seed")
        return frame

    def _trimmed(self, trim: str | None) -> Iterator[Ints]:
        """Yield the columns that are spoken: all but the end token's, or all but the one that the original drops."""
        for column in self._columns:
            self._drawn.append(column)
            if trim == "last":
                if len(self._drawn) > 1:
                    yield self._drawn[-2]
            elif len(self._drawn) > 1 if trim == "first" else column[0] != self._model.end_id:
                yield column


def generate_frames(
    model: DualAR,
    prompt: Ints,
    sampling: Sampling,
    noise: Noise,
    *,
    max_frames: int | None = None,
    upstream_compat: bool = False,
    context: SlowContext | None = None,
) -> Generation:
    """Return the frames that continue a prompt, int64 [1 + C, length], without the end token's.

    sampling: resolved. max_frames: None means until the end token or the end of the context. The cache never exceeds the prompt
    and this limit. context: see `Columns`. upstream_compat: the behaviour of the original to the letter. An end token in the
    first column does not stop, padding may be drawn, and the column that `upstream_trim` names is left out whatever it is, so
    that a limit yields one frame less.
    Raises PromptError for a prompt that does not fit the model, SamplingError for max_frames below 1. The iterator raises
    FishrtError for a frame with padding instead of a code.
    """
    columns = Columns(model, prompt, sampling, noise, max_columns=max_frames, upstream_compat=upstream_compat, context=context)
    return Generation(columns, model.language_model, upstream_compat=upstream_compat)


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
