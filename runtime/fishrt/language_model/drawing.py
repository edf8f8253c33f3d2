"""Drawing of a column from the slow AR's output: code by code here, or by the frame graph. Both give the same codes."""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from fishrt_engines import Array, Engine

from ..arrays import Floats, Ints
from ..bundle.features import LanguageModel
from ..errors import SamplingError
from .frame import MOST_RANKED, NOT_NUMBERS, TOO_MANY, drawn_codes
from .sampling import Noise, PenaltyWindow, Sampling, main_ids, not_numbers, sample, sample_main


class History:
    """The last frames that repetition rules look back on. The prefill's frame is never one of them."""

    def __init__(self, lm: LanguageModel, sampling: Sampling) -> None:
        aware, penalty, factor = lm.sampling.repetition_aware, lm.sampling.repetition_penalty, sampling.repetition_penalty
        self.recent: deque[int] = deque(maxlen=aware.window if aware else 0)
        self._window = PenaltyWindow(penalty, factor, lm.num_codebooks) if penalty and factor not in (None, 1) else None
        self._begun = False

    @property
    def window(self) -> PenaltyWindow | None:
        """The repetition penalty's window; None: nothing is penalised."""
        return self._window if self._begun else None

    def add(self, column: Ints) -> None:
        """Add the next column, int64 [1 + C]; the first is the prefill's."""
        if self._begun:
            self.recent.append(int(column[0]))
            if self._window:
                self._window.add(column)
        self._begun = True


@dataclass(frozen=True, slots=True)
class Rules:
    """How the columns of one generation are drawn."""

    sampling: Sampling
    """Resolved."""
    least_code: int
    """Codes below are not drawn."""
    silent: int | None
    """The main token whose codes are not heard, so that they are not computed. Their noise is drawn all the same."""


class Drawer(Protocol):
    """A drawer of columns."""

    resident: tuple[str, ...]
    """Names of the slow AR's results that may stay on the device."""

    def draw(self, results: Mapping[str, Any], history: History) -> Ints:
        """Return a column int64 [1 + C] from `logits` and `hidden` of the slow AR. The next draw may overwrite it."""
        ...


class StepDrawer:
    """A drawer that runs the fast AR once for each code, and samples in numpy."""

    resident: tuple[str, ...] = ()

    def __init__(self, fast: Engine, lm: LanguageModel, rules: Rules, noise: Noise) -> None:
        self._fast, self._lm, self._rules, self._noise = fast, lm, rules, noise
        self._ids = main_ids(lm)
        self._head = self._ids if lm.head == "full" and lm.main_tokens == "audio" else slice(None)
        self._state = fast.new_state(batch=1)
        # The number of codes that follow from the main token, and the feeds for each of the others, filled in for each frame.
        self._known = lm.num_codebooks - drawn_codes(lm)
        self._feeds = {codebook: _fast_feeds(codebook, self._known) for codebook in range(self._known, lm.num_codebooks)}

    def draw(self, results: Mapping[str, Any], history: History) -> Ints:
        """See `Drawer`. The graph masks cache entries beyond a position, so nothing is cleared between frames."""
        lm, window = self._lm, history.window
        column = np.empty(1 + lm.num_codebooks, np.int64)
        column[0] = self._draw_main(results["logits"][0, self._head], history.recent, window)
        codes = column[1:]
        if column[0] == self._rules.silent:
            codes[:] = lm.code_offset
            for _ in self._feeds:
                self._noise.fast(lm.fast_candidates)
            return column
        if self._known:
            semantic = min(max(int(column[0]), lm.semantic_begin_id), lm.semantic_end_id) - lm.semantic_begin_id
            codes[0] = min(semantic, lm.codebook_width - 1)
        for codebook, feeds in self._feeds.items():
            feeds["hidden"] = results["hidden"]
            fed = feeds["codes"][0]
            if codebook == self._known:
                fed[1:] = codes[:codebook]
            else:
                fed[0] = codes[codebook - 1]
            logits = self._fast.run(feeds, self._state)["logits"][0, : lm.fast_candidates]
            codes[codebook] = self._draw_code(logits, codebook, window)
        return column

    def _draw_main(self, logits: Floats, recent: Container[int], window: PenaltyWindow | None) -> int:
        draws = 1 if self._lm.sampling.repetition_aware is None else 2
        noise = [self._noise.slow(len(self._ids)) for _ in range(draws)]
        if window:
            logits = window.main(logits, self._ids)
        return sample_main(logits, self._ids, self._rules.sampling, self._lm, recent, noise)

    def _draw_code(self, logits: Floats, codebook: int, window: PenaltyWindow | None) -> int:
        if window:
            logits = window.code(logits, codebook)
        if self._rules.least_code:
            logits = logits.copy()
            logits[: self._rules.least_code] = -np.inf
        return sample(logits, self._rules.sampling, self._noise.fast(len(logits)))


class FrameDrawer:
    """A drawer that runs the frame graph; see `frame`."""

    resident: tuple[str, ...] = ("logits", "hidden")

    def __init__(self, frame: Engine, lm: LanguageModel, rules: Rules, noise: Noise) -> None:
        self._frame, self._noise = frame, noise
        self._ids = main_ids(lm)
        self._feeds = {t.name: np.zeros(t.resolve({"batch": 1}), t.dtype) for t in frame.spec.inputs}
        sampling = rules.sampling
        assert sampling.temperature is not None
        assert sampling.top_p is not None
        settings = {
            "temperature": max(sampling.temperature, 1e-5),
            "top_p": sampling.top_p,
            "top_k": max(len(self._ids), lm.fast_candidates) if sampling.top_k is None else sampling.top_k,
            "least_code": rules.least_code,
            "penalty": 1,
        }
        self._feeds |= {t.name: _setting(settings[t.name], t.dtype) for t in frame.spec.inputs if t.name in settings}
        self._penalty = _setting(sampling.repetition_penalty or 1, "float32")
        """The penalty of all frames except the first."""

    def draw(self, results: Mapping[str, Any], history: History) -> Ints:
        """See `Drawer`. Raises GraphError as `sample` does, and SamplingError for more candidates than the graph ranks."""
        self._fill(history)
        feeds = {**self._feeds, "logits": results["logits"], "hidden": results["hidden"]}
        column: Ints = self._frame.run(feeds)["column"][0]
        if (column == NOT_NUMBERS).any():
            raise not_numbers()
        if (column == TOO_MANY).any():
            raise SamplingError(
                f"more than {MOST_RANKED:,} tokens are within top_p, which {self._frame.provider} does not rank",
                hint=f"give a lower top_p, or a top_k of at most {MOST_RANKED}",
            )
        return column

    def _fill(self, history: History) -> None:
        feeds = self._feeds
        for draws, drawn in (("main_noise", self._noise.slow), ("code_noise", self._noise.fast)):
            for row in feeds[draws][0] if draws in feeds else ():
                row[:] = drawn(len(row))
        if "recent" in feeds:
            feeds["recent"][...] = -1
            feeds["recent"][0, : len(history.recent)] = history.recent
        if history.window:
            feeds["penalty"] = self._penalty
            feeds["penalised_codes"][0] = history.window.code_places()
            if "penalised_main" in feeds:
                places = history.window.main_places(self._ids)
                feeds["penalised_main"][...] = len(self._ids)
                feeds["penalised_main"][0, : len(places)] = places


def _setting(value: float, dtype: str) -> Array:
    """Return a read-only feed [1, 1]: an engine copies such an array to its device only once."""
    array: Array = np.full((1, 1), value, dtype)
    array.flags.writeable = False
    return array


def _fast_feeds(codebook: int, known: int) -> dict[str, Array]:
    """Return the feeds for the logits of one codebook: the positions up to it that were not fed before, and room for their codes.

    Position 0 takes the hidden vector instead of a code; its code stays 0.
    """
    positions = np.arange(0 if codebook == known else codebook, codebook + 1, dtype=np.int64)
    return {"codes": np.zeros((1, len(positions)), np.int64), "position_ids": positions[None], "write_index": positions[:1]}
