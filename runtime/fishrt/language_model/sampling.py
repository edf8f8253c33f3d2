"""From logits to ids: repetition penalty, top-p, top-k, temperature, the draw, and repetition-aware sampling, in numpy.

The order of the filters is that of the original models, not the usual one. Top-p sees the logits before the temperature, and its
cumulative probability includes the item itself, so it removes the item that crosses the limit. The temperature then divides the
logits that are left. A draw is argmax(p / q) with exponential noise q, which is a draw from p. Noise is passed in, so that a run
can be repeated from a seed or from recorded noise.
"""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..arrays import Floats, Ints
from ..bundle.features import LanguageModel, RepetitionPenalty, SamplingDefaults, sampling_faults
from ..errors import GraphError, SamplingError


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn; None means the bundle's default. Raises SamplingError for a value outside its range.

    Attributes:
        temperature: at least 0, below 2. Below 1 the likely tokens become likelier. 0 is greedy: the likeliest token is drawn.
        top_p: above 0, at most 1. Nucleus sampling: only the likeliest tokens within this sum of probabilities are drawn.
        top_k: at least 1. Only this many of the likeliest tokens are drawn. As many as there are tokens, or more, removes none.
        repetition_penalty: above 0, at most 2. Above 1, tokens of the last frames become less likely; 1 changes nothing.
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
        """Return these settings with a bundle's defaults for those that are None. A top_k of None then removes no token.

        Temperature 0 becomes a top_k of 1: every drawer then takes the likeliest token, and of equal ones the first, whatever the
        noise. Raises SamplingError for a repetition penalty if the model has none.
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
    """A source of noise for the draws: float32 [width], positive, exponentially distributed with mean 1.

    The loop calls it in this order in every frame: slow (twice for repetition-aware models), then fast for each code it draws.
    """

    def slow(self, width: int) -> Floats:
        """Return the noise for one draw of a main token; entry i belongs to the i-th of `main_ids`."""
        ...

    def fast(self, width: int) -> Floats:
        """Return the noise for one draw of a code."""
        ...


class SeededNoise:
    """Noise from a numpy Generator, drawn for several frames at once: the same seed gives the same noise."""

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
    """Draw an index into logits, float32 [n], with a resolved `sampling` and noise, float32 [n].

    -inf forbids an entry. Top-p and top-k keep the first entries of a ranking, in which the lower index of equal logits comes
    first; the likeliest entry always stays. Raises GraphError if a logit is NaN or +inf, or all are -inf.

    The winner is drawn among all entries. If the filters remove it, they also remove all entries that rank after it, and the draw
    is repeated without these. The result is that of a draw after the filters, but needs no sort, which costs more than the rest.
    """
    assert sampling.temperature is not None
    assert sampling.top_p is not None
    likeliest = int(logits.argmax())  # of NaNs the first
    best = logits[likeliest]
    if not math.isfinite(best):
        raise not_numbers()
    divisor = np.float32(max(sampling.temperature, 1e-5))
    race = logits / divisor
    race -= best / divisor
    np.exp(race, out=race)
    race /= noise
    winner = int(race.argmax())
    if winner == likeliest:
        return winner
    # The sum is over all entries: top-p counts those that top-k removes. In float64 its rounding is so small that top_p = 1
    # removes no entry of noticeable probability.
    mass = np.exp(logits - best).astype(np.float64)
    limit = sampling.top_p * np.add.reduce(mass)
    while winner != likeliest:
        before = logits > (logit := logits[winner])
        np.greater_equal(logits[:winner], logit, out=before[:winner])
        ranked = sampling.top_k is None or np.count_nonzero(before) < sampling.top_k
        if ranked and np.add.reduce(mass, where=before) + mass[winner] <= limit:
            break
        race = np.where(before, race, 0)  # the filters remove all that rank after it, too
        winner = int(race.argmax())
    return winner


def not_numbers() -> GraphError:
    """Return the error for logits of which one is NaN or +inf, or all are -inf."""
    return GraphError("a graph gave logits that are not numbers", hint="the weights of the bundle are damaged: export it again")


def audio_ids(model: LanguageModel) -> Ints:
    """Return the semantic tokens and the end token, ascending: int64 [1 + semantic tokens]."""
    semantic = np.arange(model.semantic_begin_id, model.semantic_end_id + 1, dtype=np.int64)
    return np.union1d(semantic, np.array([model.end_id], np.int64))


def main_ids(model: LanguageModel) -> Ints:
    """Return the tokens that can be drawn as main tokens, ascending: int64 [n]."""
    return audio_ids(model) if model.main_tokens == "audio" else np.arange(model.vocab_size, dtype=np.int64)


def penalised(logits: Floats, indices: Ints, penalty: float) -> Floats:
    """Return a copy of the logits, float32 [n], with the penalty applied once to each that `indices` names."""
    result, chosen = logits.copy(), logits[indices]
    weaker = np.minimum if penalty > 1 else np.maximum  # for either sign of the logit
    result[indices] = weaker(chosen * penalty, chosen / penalty)
    return result


class PenaltyWindow:
    """The last columns that were drawn, and the penalty on the next; see `RepetitionPenalty`."""

    def __init__(self, rules: RepetitionPenalty, penalty: float, num_codebooks: int) -> None:
        self._rules, self.penalty = rules, penalty
        self._columns = np.zeros((1 + num_codebooks, rules.window), np.int64)
        self._count = 0

    def add(self, column: Ints) -> None:
        """Add a column int64 [1 + num_codebooks]; it replaces the oldest."""
        self._columns[:, self._count % self._rules.window] = column
        self._count += 1

    def main_places(self, ids: Ints) -> Ints:
        """Return the indices of the penalised tokens in `ids`, int64 [n], ascending: int64, as many as the window or fewer."""
        if self._rules.main == "none":
            return np.zeros(0, np.int64)
        # While the window fills, the first column added is the oldest, not the zeros of the missing ones.
        oldest = self._count % self._rules.window if self._count >= self._rules.window else 0
        tokens = self._columns[0] if self._rules.main == "row" else self._columns[:, oldest]
        places = ids.searchsorted(tokens)
        found: Ints = places[ids.take(places, mode="clip") == tokens]
        return found

    def main(self, logits: Floats, ids: Ints) -> Floats:
        """Return the penalised logits float32 [n] of the tokens `ids`, int64 [n], ascending."""
        return penalised(logits, self.main_places(ids), self.penalty)

    def code_places(self) -> Ints:
        """Return the penalised codes: int64 [num_codebooks, window]."""
        return self._columns[1:]

    def code(self, logits: Floats, codebook: int) -> Floats:
        """Return the penalised logits float32 [n] of the codes of one codebook."""
        return penalised(logits, self._columns[1 + codebook], self.penalty)


def sample_main(
    logits: Floats,
    ids: Ints,
    sampling: Sampling,
    model: LanguageModel,
    recent: Container[int],
    noise: Sequence[Floats],
) -> int:
    """Draw a main token, with a resolved `sampling`.

    logits: float32 [n], those of `ids`: int64 [n] from `main_ids`. recent: main tokens in the window of repetition-aware
    sampling. noise: one array float32 [n], or two for a repetition-aware model: for the draw, and for a second draw that replaces
    a semantic token in `recent`. The second draw may give the same token.
    """
    token = int(ids[sample(logits, sampling, noise[0])])
    rules = model.sampling.repetition_aware
    if rules is not None and token in recent and is_semantic(token, model):
        token = int(ids[sample(logits, Sampling(rules.temperature, rules.top_p, sampling.top_k), noise[1])])
    return token


def is_semantic(token: int, model: LanguageModel) -> bool:
    """Return whether a main token stands for a frame."""
    return model.semantic_begin_id <= token <= model.semantic_end_id
