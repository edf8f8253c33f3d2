"""From logits to ids: repetition penalty, top-p, top-k, temperature, the draw, and repetition-aware sampling, in numpy.

The order of the filters is the models' own and is not the usual one: top-p looks at the logits before the temperature, its
cumulative probability includes the item itself (so the item that crosses the limit is removed), and only then are the survivors
divided by the temperature. A draw is argmax(p / q) with exponential noise q, which equals drawing from p. Noise is passed in, so
that a run can be repeated from a seed or from recorded noise.
"""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from .errors import GraphError, SamplingError
from .features import LanguageModel, RepetitionPenalty, SamplingDefaults, sampling_faults

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn; None means the bundle's default. Raises SamplingError for a value outside its range.

    Attributes:
        temperature: at least 0, below 2. Below 1 the likely tokens become likelier. 0 is greedy: the likeliest token is drawn.
        top_p: above 0, at most 1. Nucleus sampling: only the likeliest tokens within this sum of probabilities are drawn.
        top_k: at least 1. Only this many of the likeliest tokens are drawn. As many as there are tokens, or more, removes none.
        repetition_penalty: above 0, below 2. Above 1, tokens of the last frames become less likely; 1 changes nothing.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None

    def __post_init__(self) -> None:
        temperature = 1.0 if self.temperature is None else self.temperature
        top_p = 1.0 if self.top_p is None else self.top_p
        for found, rule in sampling_faults(temperature, top_p, self.top_k, self.repetition_penalty):
            raise SamplingError(found, hint=rule)

    def resolve(self, defaults: SamplingDefaults) -> Sampling:
        """With a bundle's defaults in place of None. A top_k that is None even then removes no token.

        Temperature 0 becomes a top_k of 1: every drawer then takes the likeliest token, and of equal ones the first, whatever the
        noise. Raises SamplingError for a repetition penalty where the model has none.
        """
        penalty = defaults.repetition_penalty
        temperature = defaults.temperature if self.temperature is None else self.temperature
        top_k = defaults.top_k if self.top_k is None else self.top_k
        if penalty is None and self.repetition_penalty is not None:
            raise SamplingError("this model has no repetition penalty", hint="leave it out")
        return Sampling(
            temperature,
            defaults.top_p if self.top_p is None else self.top_p,
            1 if temperature == 0 else top_k,
            penalty.penalty if penalty and self.repetition_penalty is None else self.repetition_penalty,
        )


class Noise(Protocol):
    """Where the draws get their randomness: float32 [width], positive, exponentially distributed with mean 1.

    The loop asks in this order in every frame: slow (twice for repetition-aware models), then fast for each code that is drawn.
    """

    def slow(self, width: int) -> Floats:
        """Noise for one draw of a main token; entry i belongs to the i-th of `main_ids`."""
        ...

    def fast(self, width: int) -> Floats:
        """Noise for one draw of a code."""
        ...


class SeededNoise:
    """Noise from a numpy Generator: the same seed gives the same noise. It is drawn ahead, for some frames at once."""

    _AHEAD = 1 << 16

    def __init__(self, seed: int) -> None:
        self._generator = np.random.default_rng(seed)
        self._ready = np.empty(0, np.float32)

    def slow(self, width: int) -> Floats:
        """See `Noise`."""
        return self._take(width)

    def fast(self, width: int) -> Floats:
        """See `Noise`."""
        return self._take(width)

    def _take(self, width: int) -> Floats:
        if width > len(self._ready):
            self._ready = np.concatenate([self._ready, self._draw(max(width, self._AHEAD))])
        taken, self._ready = self._ready[:width], self._ready[width:]
        return taken

    def _draw(self, count: int) -> Floats:
        # A uniform 0 would give infinite noise and so forbid the token, even one that is alone.
        uniform = np.maximum(self._generator.random(count), np.finfo(np.float64).tiny)
        return (-np.log(uniform)).astype(np.float32)


def sample(logits: Floats, sampling: Sampling, noise: Floats) -> int:
    """An index into logits, float32 [n], drawn with the settings of a resolved `sampling` and noise, float32 [n].

    -inf forbids an entry. Top-p and top-k leave the first of a ranking, in which the lower index of equal logits comes first; the
    likeliest entry always stays. Raises GraphError for logits of which one is NaN or +inf, or all are -inf.

    All entries race. A winner that the filters remove is struck out with all that rank behind it, and the race is decided anew.
    It ends as if none but those that the filters leave had raced, and needs no sorted ranking, which costs more than the rest.
    """
    assert sampling.temperature is not None
    assert sampling.top_p is not None
    likeliest = int(logits.argmax())  # of NaNs the first
    best = logits[likeliest]
    if not math.isfinite(best):
        raise not_numbers()
    divisor = np.float32(max(sampling.temperature, 1e-5))
    race = np.exp(logits / divisor - best / divisor)
    race /= noise
    winner = int(race.argmax())
    if winner == likeliest:
        return winner
    # The sum is over all entries: what top-k removes still counts for top-p. In float64 the sums are so near to exact that
    # top_p = 1 removes nothing of weight.
    mass = np.exp(logits - best).astype(np.float64)
    limit = sampling.top_p * np.add.reduce(mass)
    while winner != likeliest:
        before = logits > (logit := logits[winner])
        np.greater_equal(logits[:winner], logit, out=before[:winner])
        ranked = sampling.top_k is None or np.count_nonzero(before) < sampling.top_k
        if ranked and np.add.reduce(mass, where=before) + mass[winner] <= limit:
            break
        race = np.where(before, race, 0)  # what ranks behind is not left either
        winner = int(race.argmax())
    return winner


def not_numbers() -> GraphError:
    """The error for logits of which one is NaN or +inf, or all are -inf."""
    return GraphError("a graph gave logits that are not numbers", hint="the weights of the bundle are damaged: export it again")


def audio_ids(model: LanguageModel) -> Ints:
    """The tokens that can be spoken, end token included, ascending: int64 [1 + semantic tokens]."""
    semantic = np.arange(model.semantic_begin_id, model.semantic_end_id + 1, dtype=np.int64)
    return np.union1d(semantic, np.array([model.end_id], np.int64))


def main_ids(model: LanguageModel) -> Ints:
    """The tokens that can be drawn as main tokens, ascending: int64 [n]."""
    return audio_ids(model) if model.main_tokens == "audio" else np.arange(model.vocab_size, dtype=np.int64)


def penalised(logits: Floats, indices: Ints, penalty: float) -> Floats:
    """A copy of the logits, float32 [n], with those at `indices` made less likely; one that is there twice, once."""
    result, chosen = logits.copy(), logits[indices]
    weaker = np.minimum if penalty > 1 else np.maximum  # which of the two it is depends on the logit's sign
    result[indices] = weaker(chosen * penalty, chosen / penalty)
    return result


class PenaltyWindow:
    """The last columns that were drawn, and what they do to the next; see `RepetitionPenalty`."""

    def __init__(self, rules: RepetitionPenalty, penalty: float, num_codebooks: int) -> None:
        self._rules, self.penalty = rules, penalty
        self._columns = np.zeros((1 + num_codebooks, rules.window), np.int64)
        self._count = 0

    def add(self, column: Ints) -> None:
        """A column int64 [1 + num_codebooks]; the oldest makes room for it."""
        self._columns[:, self._count % self._rules.window] = column
        self._count += 1

    def main_places(self, ids: Ints) -> Ints:
        """Where among the tokens `ids`, int64 [n], ascending, those are that are made less likely: int64 [at most the window]."""
        if self._rules.main == "none":
            return np.zeros(0, np.int64)
        # While the window fills, the column that came first counts as the oldest, not the zeros that stand for missing ones.
        oldest = self._count % self._rules.window if self._count >= self._rules.window else 0
        tokens = self._columns[0] if self._rules.main == "row" else self._columns[:, oldest]
        places = ids.searchsorted(tokens)
        found: Ints = places[ids.take(places, mode="clip") == tokens]
        return found

    def main(self, logits: Floats, ids: Ints) -> Floats:
        """Penalised logits float32 [n] of the tokens `ids`, int64 [n], ascending."""
        return penalised(logits, self.main_places(ids), self.penalty)

    def code_places(self) -> Ints:
        """The codes that are made less likely: int64 [num_codebooks, window]."""
        return self._columns[1:]

    def code(self, logits: Floats, codebook: int) -> Floats:
        """Penalised logits float32 [n] of the codes of one codebook."""
        return penalised(logits, self._columns[1 + codebook], self.penalty)


def sample_main(
    logits: Floats,
    ids: Ints,
    sampling: Sampling,
    model: LanguageModel,
    recent: Container[int],
    noise: Sequence[Floats],
) -> int:
    """Draws a main token, with a resolved `sampling`.

    logits: float32 [n], those of `ids`: int64 [n] from `main_ids`. recent: the main tokens that repetition-aware sampling looks
    back on. noise: one array float32 [n], or two for a repetition-aware model: for the draw itself, and for the second draw that
    replaces it when it gives a semantic token in `recent`. The second may give the same again.
    """
    token = int(ids[sample(logits, sampling, noise[0])])
    rules = model.sampling.repetition_aware
    if rules is not None and token in recent and is_semantic(token, model):
        token = int(ids[sample(logits, Sampling(rules.temperature, rules.top_p, sampling.top_k), noise[1])])
    return token


def is_semantic(token: int, model: LanguageModel) -> bool:
    """Whether a main token stands for a frame."""
    return model.semantic_begin_id <= token <= model.semantic_end_id
