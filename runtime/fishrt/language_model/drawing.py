"""Drawing of columns from the slow AR's output: code by code here, or by the frame graph. Both give the same codes."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from fishrt_engines import Array, Engine, GraphSpec, TensorSpec
from fishrt_engines.engine import Dim

from ..arrays import Floats, Ints
from ..bundle.features import LanguageModel, Quirks
from ..errors import GraphError, SamplingError
from .sampling import Noise, PenaltyWindow, Sampling, main_ids, not_numbers, sample, sample_main

NOT_NUMBERS, TOO_MANY = -1, -2
"""A logit is NaN or +inf, or all are -inf; more than MOST_RANKED tokens are within top_p and top_k."""
MOST_RANKED = 3839
"""Most of the likeliest tokens that the frame graph ranks: TensorRT sorts no more."""
FEW_RANKED = 64
"""Tokens that it ranks if no row has a larger top_k, as the official settings: sorting and adding up more takes longer."""


class Draws:
    """All that the draws of one generation depend on: settings, noise, and the last frames, for the repetition rules."""

    def __init__(self, lm: LanguageModel, sampling: Sampling, noise: Noise, quirks: Quirks) -> None:
        """sampling: resolved."""
        self.sampling, self.noise = sampling, noise
        self.least_code = 0 if quirks.draws else lm.code_offset
        """Codes below are not drawn."""
        self.silent = None if quirks.draws else lm.end_id
        """The main token whose codes are not heard, so that they are not computed. Their noise is drawn all the same."""
        aware, penalty, factor = lm.sampling.repetition_aware, lm.sampling.repetition_penalty, sampling.repetition_penalty
        self.recent: deque[int] = deque(maxlen=aware.window if aware else 0)
        self._window = PenaltyWindow(penalty, factor, lm.num_codebooks) if penalty and factor not in (None, 1) else None
        self._begun = False

    @property
    def window(self) -> PenaltyWindow | None:
        """The repetition penalty's window; None: nothing is penalised. The prefill's frame is in no window."""
        return self._window if self._begun else None

    def add(self, column: Ints) -> None:
        """Add the next column, int64 [1 + C]; the first is the prefill's."""
        if self._begun:
            self.recent.append(int(column[0]))
            if self._window:
                self._window.add(column)
        self._begun = True


class Drawer(Protocol):
    """A drawer of columns, for several generations at once."""

    resident: tuple[str, ...]
    """Names of the slow AR's results that may stay on the device."""

    def draw(self, results: Mapping[str, Any], rows: Sequence[Draws | None]) -> Ints:
        """Return the columns int64 [b, 1 + C] that follow `logits` and `hidden` of the slow AR, [b, …].

        rows: b generations; None: a row of the batch in which nothing is drawn, whose column means nothing. A column that cannot
        be drawn holds NOT_NUMBERS or TOO_MANY: `check_drawn`. The next draw may overwrite the result.
        """
        ...


class StepDrawer:
    """A drawer that runs the fast AR once for each code, and samples in numpy."""

    resident: tuple[str, ...] = ()

    def __init__(self, fast: Engine, lm: LanguageModel, rows: int) -> None:
        """rows: most generations at once."""
        self._fast, self._lm = fast, lm
        self._ids = main_ids(lm)
        self._head = self._ids if lm.head == "full" and lm.main_tokens == "audio" else slice(None)
        self._state = fast.new_state(batch=rows)
        # The number of codes that follow from the main token, and the calls for the others, by the rows that are heard.
        self._known = lm.num_codebooks - drawn_codes(lm)
        self._calls = [
            [_fast_call(codebook, self._known, count) for codebook in range(self._known, lm.num_codebooks)]
            for count in range(1 + rows)
        ]

    def draw(self, results: Mapping[str, Any], rows: Sequence[Draws | None]) -> Ints:
        """See `Drawer`. The graph masks cache entries beyond a position, so nothing is cleared between frames."""
        lm = self._lm
        columns = np.full((len(rows), 1 + lm.num_codebooks), lm.code_offset, np.int64)
        heard: list[tuple[int, Draws]] = []
        for n, row in enumerate(rows):
            if row is None:
                continue
            columns[n, 0] = token = self._draw_main(results["logits"][n, self._head], row)
            if token != row.silent:
                heard.append((n, row))
                continue
            for _ in self._calls[0]:
                row.noise.fast(lm.fast_candidates)
        if heard:
            places = slice(None) if len(heard) == len(rows) else [n for n, _ in heard]
            columns[places, 1:] = self._draw_codes(results["hidden"][places], columns[places, 0], [row for _, row in heard])
        return columns

    def _draw_codes(self, hidden: Floats, tokens: Ints, rows: Sequence[Draws]) -> Ints:
        """Return the codes int64 [b, C] of frames with these main tokens, int64 [b]."""
        lm, state = self._lm, self._state.rows(len(rows))
        codes = np.empty((lm.num_codebooks, len(rows)), np.int64)
        if self._known:
            for n, token in enumerate(tokens.tolist()):
                semantic = min(max(token, lm.semantic_begin_id), lm.semantic_end_id) - lm.semantic_begin_id
                codes[0, n] = min(semantic, lm.codebook_width - 1)
        for codebook, (feeds, last) in enumerate(self._calls[len(rows)], self._known):
            feeds["hidden"] = hidden
            if codebook:
                last[:] = codes[codebook - 1]
            logits = self._fast.run(feeds, state)["logits"]
            for n, row in enumerate(rows):
                codes[codebook, n] = self._draw_code(logits[n, : lm.fast_candidates], codebook, row)
        return codes.T

    def _draw_main(self, logits: Floats, row: Draws) -> int:
        draws = 1 if self._lm.sampling.repetition_aware is None else 2
        noise = [row.noise.slow(len(self._ids)) for _ in range(draws)]
        if window := row.window:
            logits = window.main(logits, self._ids)
        try:
            return sample_main(logits, self._ids, row.sampling, self._lm, row.recent, noise)
        except GraphError:
            return NOT_NUMBERS

    def _draw_code(self, logits: Floats, codebook: int, row: Draws) -> int:
        if window := row.window:
            logits = window.code(logits, codebook)
        if row.least_code:
            logits = logits.copy()
            logits[: row.least_code] = -np.inf
        noise = row.noise.fast(len(logits))
        try:
            return sample(logits, row.sampling, noise)
        except GraphError:
            return NOT_NUMBERS


class FrameDrawer:
    """A drawer that runs the frame graph; see `frame_spec`."""

    resident: tuple[str, ...] = ("logits", "hidden")

    def __init__(self, frame: Engine, lm: LanguageModel, rows: int) -> None:
        """rows: most generations at once."""
        self._frame, self._lm = frame, lm
        self._ids = main_ids(lm)
        self._feeds = {t.name: np.zeros(t.resolve({"batch": rows}), t.dtype) for t in frame.spec.inputs if "batch" in t.shape}
        self._settings: dict[str, Array] = {}
        self._settings_of: list[tuple[Draws | None, bool]] = []

    def draw(self, results: Mapping[str, Any], rows: Sequence[Draws | None]) -> Ints:
        """See `Drawer`."""
        for n, row in enumerate(rows):
            if row is not None:
                self._fill(n, row)
        feeds: dict[str, Any] = {name: feed[: len(rows)] for name, feed in self._feeds.items()}
        feeds |= self._set(rows) | {"logits": results["logits"], "hidden": results["hidden"]}
        columns: Ints = self._frame.run(feeds)["column"]
        return columns

    def _fill(self, n: int, row: Draws) -> None:
        feeds = self._feeds
        for draws, drawn in (("main_noise", row.noise.slow), ("code_noise", row.noise.fast)):
            for values in feeds[draws][n] if draws in feeds else ():
                values[:] = drawn(len(values))
        if "recent" in feeds:
            feeds["recent"][n] = -1
            feeds["recent"][n, : len(row.recent)] = row.recent
        if row.window:
            feeds["penalised_codes"][n] = row.window.code_places()
            if "penalised_main" in feeds:
                places = row.window.main_places(self._ids)
                feeds["penalised_main"][n] = len(self._ids)
                feeds["penalised_main"][n, : len(places)] = places

    def _set(self, rows: Sequence[Draws | None]) -> dict[str, Array]:
        """Return the settings, [b, 1] each, and `ranks`. They change with the rows, and with a row's first frame, unpenalised.

        They are read-only: an engine copies such an array to its device only once.
        """
        settings_of = [(row, row is not None and row.window is not None) for row in rows]
        if settings_of != self._settings_of:
            self._settings_of = settings_of
            settings = [_settings(row, len(self._ids), self._lm) for row in rows]
            self._settings = ranks(self._lm, int(max(values["top_k"] for values in settings)))
            for t in self._frame.spec.inputs:
                if t.name in settings[0]:
                    self._settings[t.name] = np.array([[values[t.name]] for values in settings], t.dtype)
                    self._settings[t.name].flags.writeable = False
        return self._settings


def check_drawn(column: Ints) -> None:
    """Check that a column could be drawn. Raises GraphError for NOT_NUMBERS in it, SamplingError for TOO_MANY."""
    if column.min() >= 0:
        return
    if (column == NOT_NUMBERS).any():
        raise not_numbers()
    raise SamplingError(
        f"more than {MOST_RANKED:,} tokens are within top_p, which the graph of a frame does not rank",
        hint=f"give a lower top_p, or a top_k of at most {MOST_RANKED}",
    )


def _settings(row: Draws | None, tokens: int, lm: LanguageModel) -> dict[str, float]:
    """Return the settings of a row, by the name of the frame graph's input."""
    if row is None:
        return {"temperature": 1, "top_p": 1, "top_k": 1, "least_code": 0, "penalty": 1}
    sampling = row.sampling
    assert sampling.temperature is not None
    assert sampling.top_p is not None
    return {
        "temperature": max(sampling.temperature, 1e-5),
        "top_p": sampling.top_p,
        "top_k": max(tokens, lm.fast_candidates) if sampling.top_k is None else sampling.top_k,
        "least_code": row.least_code,
        "penalty": row.window.penalty if row.window else 1,
    }


def ranks(lm: LanguageModel, top_k: int) -> dict[str, Array]:
    """Return the frame graph's feeds that say how many candidates of a draw are ranked, for rows of up to this top_k."""
    most = FEW_RANKED if top_k <= FEW_RANKED else MOST_RANKED
    made: dict[str, Array] = {
        "main_ranks": np.arange(min(len(main_ids(lm)), most)),
        "code_ranks": np.arange(min(lm.fast_candidates, most)),
    }
    for array in made.values():
        array.flags.writeable = False
    return made


def _fast_call(codebook: int, known: int, rows: int) -> tuple[dict[str, Array], Array]:
    """Return the feeds for the logits of one codebook: the positions up to it that were not fed before, and room for their codes.

    Also return the room of the last position, [rows]. Position 0 takes the hidden vector instead of a code; its code stays 0.
    """
    positions = np.tile(np.arange(0 if codebook == known else codebook, codebook + 1, dtype=np.int64), (rows, 1))
    codes = np.zeros_like(positions)
    return {"codes": codes, "position_ids": positions, "write_index": positions[:, 0].copy()}, codes[:, -1]


def frame_spec(slow: GraphSpec, fast: GraphSpec, lm: LanguageModel) -> GraphSpec:
    """Return the inputs and outputs of the frame graph, which has no state.

    main_noise, code_noise: noise for each draw of a main token (two draws with repetition-aware sampling) and of each code.
    main_ranks, code_ranks: 0, 1, …; as many candidates of a draw are ranked. A top_k may be larger, but then not be reached.
    recent: main tokens that repetition-aware sampling draws again; -1 stands for none. penalised_main, penalised_codes: indices
    of logits, maybe repeated; one past the last stands for none. least_code: codes below it are not drawn.
    """
    n = len(main_ids(lm))
    aware, penalty = lm.sampling.repetition_aware, lm.sampling.repetition_penalty
    by_name = {t.name: t for t in (*slow.outputs, *fast.inputs)}
    feeds: list[tuple[str, str, tuple[Dim, ...]]] = [
        ("logits", "float32", by_name["logits"].shape),
        ("hidden", "float32", by_name["hidden"].shape),
        ("main_noise", "float32", ("batch", 2 if aware else 1, n)),
        ("code_noise", "float32", ("batch", drawn_codes(lm), lm.fast_candidates)),
        ("temperature", "float32", ("batch", 1)),
        ("top_p", "float32", ("batch", 1)),
        ("top_k", "int64", ("batch", 1)),
        ("main_ranks", "int64", ("main_ranked",)),
        ("code_ranks", "int64", ("code_ranked",)),
    ]
    if aware:
        feeds.append(("recent", "int64", ("batch", aware.window)))
    if penalty:
        feeds.append(("penalty", "float32", ("batch", 1)))
        feeds.append(("penalised_codes", "int64", ("batch", lm.num_codebooks, penalty.window)))
    if penalty and penalty.main != "none":
        tokens = penalty.window if penalty.main == "row" else 1 + lm.num_codebooks
        feeds.append(("penalised_main", "int64", ("batch", tokens)))
    if lm.code_offset:
        feeds.append(("least_code", "int64", ("batch", 1)))
    return GraphSpec(
        file="frame.onnx",
        inputs=tuple(TensorSpec(*feed) for feed in feeds if 0 not in feed[2]),
        outputs=(TensorSpec("column", "int64", ("batch", 1 + lm.num_codebooks)),),
    )


def drawn_codes(lm: LanguageModel) -> int:
    """Return how many codes of a frame the fast AR draws: all, or all but the first."""
    return lm.num_codebooks - (lm.code_zero == "main")
