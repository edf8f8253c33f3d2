"""From logits to ids: top-p, top-k, temperature, the draw, and repetition-aware sampling. Pure functions over numpy arrays.

The order of the filters is the models' own and is not the usual one: top-p looks at the logits before the temperature, its
cumulative probability includes the item itself (so the item that crosses the limit is removed), and only then are the survivors
divided by the temperature. A draw is argmax(p / q) with exponential noise q, which equals drawing from p. Noise is passed in, so
that a run can be repeated from a seed or from recorded noise.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from .bundle import LanguageModel, SamplingDefaults, sampling_faults
from .errors import GraphError, SamplingError

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn; None means the bundle's default. Raises SamplingError for a value outside its range."""

    temperature: float | None = None
    """0 < temperature < 2. Below 1 the likely tokens become likelier; towards 0 only the likeliest is drawn."""
    top_p: float | None = None
    """0 < top_p <= 1. Only the likeliest tokens that together stay within this probability are drawn."""
    top_k: int | None = None
    """At least 1. Only so many of the likeliest tokens are drawn. As many as there are tokens, or more, removes none."""

    def __post_init__(self) -> None:
        temperature = 1.0 if self.temperature is None else self.temperature
        top_p = 1.0 if self.top_p is None else self.top_p
        for found, rule in sampling_faults(temperature, top_p, self.top_k):
            raise SamplingError(found, hint=rule)

    def resolve(self, defaults: SamplingDefaults) -> Sampling:
        """With a bundle's defaults in place of None. A top_k that is None even then removes no token."""
        return Sampling(
            defaults.temperature if self.temperature is None else self.temperature,
            defaults.top_p if self.top_p is None else self.top_p,
            defaults.top_k if self.top_k is None else self.top_k,
        )


class Noise(Protocol):
    """Where the draws get their randomness: float32 [width], positive, exponentially distributed with mean 1.

    The loop asks in this order in every frame: slow (twice for repetition-aware models), then fast for each later codebook.
    """

    def slow(self, width: int) -> Floats:
        """Noise for one draw of a main token; entry i belongs to the i-th of `audio_ids`."""
        ...

    def fast(self, width: int) -> Floats:
        """Noise for one draw of a code."""
        ...


class SeededNoise:
    """Noise from a numpy Generator: the same seed gives the same noise."""

    def __init__(self, seed: int) -> None:
        self._generator = np.random.default_rng(seed)

    def slow(self, width: int) -> Floats:
        """See `Noise`."""
        return self._draw(width)

    def fast(self, width: int) -> Floats:
        """See `Noise`."""
        return self._draw(width)

    def _draw(self, width: int) -> Floats:
        # A uniform 0 would give infinite noise and so forbid the token, even one that is alone.
        uniform = np.maximum(self._generator.random(width), np.finfo(np.float64).tiny)
        return (-np.log(uniform)).astype(np.float32)


def filter_probs(logits: Floats, temperature: float, top_p: float, top_k: int | None) -> Floats:
    """Probabilities after top-p (on the logits as they are), top-k and temperature: float32 [n], 0 where removed.

    logits: float32 [n]; -inf forbids an entry. Of equal logits the lower index ranks first. The likeliest entry always stays.
    Raises GraphError for logits of which one is NaN or +inf, or all are -inf.
    """
    width = len(logits)
    kept = _ranked(logits, min(top_k or width, width))
    top = logits[kept[0]]
    with np.errstate(invalid="ignore"):  # the check below says it in words
        total = np.exp(logits - top).sum(dtype=np.float64)
    if not np.isfinite(total):
        raise GraphError(
            "a graph gave logits that are not numbers", hint="the weights of the bundle are damaged: export it again"
        )
    # The sum above is over all entries: what top-k removes still counts for top-p. In float64 the sums are so near to exact that
    # top_p = 1 removes nothing of weight.
    within = np.cumsum(np.exp(logits[kept] - top), dtype=np.float64) <= top_p * total
    within[0] = True
    kept = kept[within]
    scaled = logits[kept] / np.float32(max(temperature, 1e-5))
    weights = np.exp(scaled - scaled[0])
    probs = np.zeros(width, np.float32)
    probs[kept] = weights / weights.sum()
    return probs


def probabilities(logits: Floats, sampling: Sampling) -> Floats:
    """`filter_probs` with the settings of a resolved `sampling`."""
    assert sampling.temperature is not None
    assert sampling.top_p is not None
    return filter_probs(logits, sampling.temperature, sampling.top_p, sampling.top_k)


def _ranked(logits: Floats, count: int) -> npt.NDArray[np.intp]:
    """Indices of the `count` largest logits, largest first, equal ones by index. Sorts only what can be among them."""
    width = len(logits)
    if count == width:
        return np.argsort(-logits, kind="stable")
    smallest = np.partition(logits, width - count)[width - count]
    candidates = np.flatnonzero(logits >= smallest)
    return candidates[np.argsort(-logits[candidates], kind="stable")[:count]]


def draw(probs: Floats, noise: Floats) -> int:
    """The index drawn from `probs` float32 [n] with exponential noise float32 [n]; of equal ones the lowest."""
    return int(np.argmax(probs / noise))


def audio_ids(model: LanguageModel) -> Ints:
    """The tokens that can be spoken, end token included, ascending: int64 [1 + semantic tokens]."""
    semantic = np.arange(model.semantic_begin_id, model.semantic_end_id + 1, dtype=np.int64)
    return np.union1d(semantic, np.array([model.end_id], np.int64))


def sample_main(
    logits: Floats,
    ids: Ints,
    sampling: Sampling,
    model: LanguageModel,
    recent: Container[int],
    noise: Sequence[Floats],
) -> int:
    """Draws a main token, with a resolved `sampling`.

    logits: float32 [n], those of `ids`: int64 [n] from `audio_ids`. recent: the main tokens that repetition-aware sampling looks
    back on. noise: one array float32 [n], or two for a repetition-aware model: for the draw itself, and for the second draw that
    replaces it when it gives a semantic token in `recent`. The second may give the same again.
    """
    token = int(ids[draw(probabilities(logits, sampling), noise[0])])
    rules = model.sampling.repetition_aware
    if rules is not None and token in recent and _is_semantic(token, model):
        token = int(ids[draw(filter_probs(logits, rules.temperature, rules.top_p, sampling.top_k), noise[1])])
    return token


def _is_semantic(token: int, model: LanguageModel) -> bool:
    return model.semantic_begin_id <= token <= model.semantic_end_id
