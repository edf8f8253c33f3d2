"""The loop: prompt ids in, frames of codes out. It knows ids, not text, audio or providers.

    prompt ─► slow AR (all columns) ─┐
                                     ▼                                        ┌───────────────┐
    ┌──────────────► logits, hidden ─► main token ─► code 0 ─► fast AR ─► code 1 ─► … ─► code C−1 ─► column
    └── slow AR (one column) ◄─────────────────────────────────────────────────────────────────────┘

A column is a frame with its main token on top: int64 [1 + C]. Each is fed back to the slow AR exactly as drawn. The fast AR takes
the slow AR's hidden vector at its position 0 and code j − 1 at position j, so that it gives the logits of code j there. Code 0
follows from the main token, so positions 0 and 1 are known together and go in one call.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fishrt_engines import Array, Engine

from .bundle import LanguageModel
from .errors import PromptError, SamplingError
from .sampling import Floats, Ints, Noise, Sampling, audio_ids, draw, probabilities, sample_main

StopReason = Literal["end", "max_frames", "max_seq_len"]
"""The end token; as many frames as asked for; no position left in the model's context."""


FIRST_FRAMES = 256
"""Frames for which the slow AR's cache has room at first; it doubles when it is full. How much is said is not known before, and a
step costs time for every row of the cache, used or not."""


@dataclass(frozen=True, slots=True)
class DualAR:
    """The two graphs of a language model and the ids and rules that go with them."""

    slow: Engine
    fast: Engine
    language_model: LanguageModel


class Columns(Iterator[Ints]):
    """The columns of one generation as they are drawn, the one of the end token included: int64 [1 + C] each.

    `stop_reason` is None until the columns are exhausted. A prefill column (the first) that is the end token ends the generation
    only if `first_may_end`.
    """

    def __init__(
        self,
        model: DualAR,
        prompt: Ints,
        sampling: Sampling,
        noise: Noise,
        *,
        max_columns: int | None = None,
        first_may_end: bool = True,
    ) -> None:
        """Raises PromptError for a prompt that does not fit the model, SamplingError for max_columns below 1."""
        self.stop_reason: StopReason | None = None
        self._model, self._sampling, self._noise = model, sampling, noise
        lm = model.language_model
        _check_prompt(prompt, lm)
        length = prompt.shape[1]
        if max_columns is not None and max_columns < 1:
            raise SamplingError(f"the limit of frames is {max_columns}", hint="it must be at least 1")
        room = lm.max_seq_len - length
        self._limit = room if max_columns is None else min(max_columns, room)
        self._limit_reason: StopReason = "max_seq_len" if self._limit == room and max_columns != room else "max_frames"
        self._first_may_end = first_may_end
        self._count = 0
        self._ids = audio_ids(lm)
        self._head = slice(None) if lm.head == "audio" else self._ids
        self._most_rows = length + self._limit
        self._slow_state = model.slow.new_state(batch=1, cache=min(length + FIRST_FRAMES, self._most_rows))
        self._fast_state = model.fast.new_state(batch=1)
        self._position = 0
        self._next_input: Ints = np.ascontiguousarray(prompt[None])
        # Main tokens of the last frames; the prefill's never enters.
        rules = lm.sampling.repetition_aware
        self._recent: deque[int] = deque(maxlen=rules.window if rules else 0)

    def __next__(self) -> Ints:
        if self.stop_reason is not None:
            raise StopIteration
        lm = self._model.language_model
        results = self._slow_call(self._next_input)
        main = self._draw_main(results["logits"][0])
        column = np.empty(1 + lm.num_codebooks, np.int64)
        column[0] = main
        column[1:] = self._draw_codes(main, results["hidden"])
        if self._count > 0:
            self._recent.append(main)
        self._count += 1
        self._next_input = column[None, :, None]
        if main == lm.end_id and (self._count > 1 or self._first_may_end):
            self.stop_reason = "end"
        elif self._count == self._limit:
            self.stop_reason = self._limit_reason
        return column

    def _slow_call(self, columns: Ints) -> Mapping[str, Array]:
        """Feeds columns int64 [1, 1 + C, length] at the positions after those that were fed before."""
        start, length = self._position, columns.shape[2]
        self._position += length
        if self._position > (rows := self._slow_state.dims["cache"]):
            self._slow_state.grow(cache=min(2 * rows, self._most_rows))
        feeds = {
            "prompt": columns,
            "position_ids": np.arange(start, start + length, dtype=np.int64)[None],
            "write_index": np.array([start], np.int64),
            "last_index": np.array([length - 1], np.int64),
        }
        return self._model.slow.run(feeds, self._slow_state)

    def _draw_main(self, logits: Array) -> int:
        lm = self._model.language_model
        draws = 1 if lm.sampling.repetition_aware is None else 2
        noise = [self._noise.slow(len(self._ids)) for _ in range(draws)]
        return sample_main(_floats(logits)[self._head], self._ids, self._sampling, lm, self._recent, noise)

    def _draw_codes(self, main: int, hidden: Array) -> list[int]:
        """All codes of a frame. Entries of the fast cache beyond a position are masked, so nothing is cleared between frames."""
        lm = self._model.language_model
        codes = [min(max(main - lm.semantic_begin_id, 0), lm.codebook_width - 1)]
        if lm.num_codebooks > 1:
            codes.append(self._draw_code([0, codes[0]], 0, hidden))
        for position in range(2, lm.num_codebooks):
            codes.append(self._draw_code([codes[-1]], position, hidden))
        return codes

    def _draw_code(self, codes: list[int], position: int, hidden: Array) -> int:
        """Feeds codes at `position` and after; position 0 takes `hidden` in place of its code."""
        feeds = {
            "hidden": hidden,
            "codes": np.array([codes], np.int64),
            "position_ids": np.arange(position, position + len(codes), dtype=np.int64)[None],
            "write_index": np.array([position], np.int64),
        }
        logits = _floats(self._model.fast.run(feeds, self._fast_state)["logits"][0])
        return draw(probabilities(logits, self._sampling), self._noise.fast(len(logits)))


class Generation(Iterator[Ints]):
    """Frames of codes, int64 [C] each. `stop_reason` is None until they are exhausted."""

    def __init__(self, columns: Columns, *, end_id: int, drop_last: bool) -> None:
        self._columns = columns
        self._frames = _all_but_last(columns) if drop_last else (c for c in columns if c[0] != end_id)

    @property
    def stop_reason(self) -> StopReason | None:
        """Why it ended."""
        return self._columns.stop_reason

    def __next__(self) -> Ints:
        return next(self._frames)[1:]


def generate_frames(
    model: DualAR, prompt: Ints, sampling: Sampling, noise: Noise, *, max_frames: int | None = None, upstream_compat: bool = False
) -> Generation:
    """Speaks a prompt, int64 [1 + C, length], frame by frame.

    sampling: resolved. max_frames: None means until the end token or the end of the context. The cache never exceeds the prompt
    and this limit.
    The column of the end token is not yielded. With `upstream_compat` the literal upstream behaviour: an end token in the first
    column does not stop, and the last column is left out whatever stopped the loop, so that a limit yields one frame less.
    Raises PromptError for a prompt that does not fit the model, SamplingError for max_frames below 1.
    """
    columns = Columns(model, prompt, sampling, noise, max_columns=max_frames, first_may_end=not upstream_compat)
    return Generation(columns, end_id=model.language_model.end_id, drop_last=upstream_compat)


def _all_but_last(columns: Iterator[Ints]) -> Iterator[Ints]:
    held: Ints | None = None
    for column in columns:
        if held is not None:
            yield held
        held = column


def _floats(array: Array) -> Floats:
    """What the graphs' contract says of logits, said to the type checker."""
    assert array.dtype == np.float32
    return array  # type: ignore[return-value]


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
