"""Generations in a batch of one."""

from __future__ import annotations

from typing import Any

import numpy as np

from fishrt.bundle.features import USUAL, LanguageModel, Quirks
from fishrt.language_model.batch import Batch, DualAR, Row
from fishrt.language_model.drawing import Draws
from fishrt.language_model.generate import generate
from fishrt.language_model.sampling import Sampling, SeededNoise


def draws_of(lm: LanguageModel, sampling: Sampling, seed: int) -> Draws:
    """Return the draws of a generation that computes the codes of the end token, too, as the frame graph does."""
    draws = Draws(lm, sampling, SeededNoise(seed), USUAL)
    draws.silent = None
    return draws


def row_of(
    model: DualAR, prompt: np.ndarray, sampling: Any, noise: Any, limit: int | None = None, *, upstream: bool = False
) -> Row:
    quirks = Quirks.of(model.language_model) if upstream else USUAL
    return Row(model.language_model, prompt, sampling, noise, max_columns=limit, quirks=quirks)


def spoken(model: DualAR, row: Row) -> list[np.ndarray]:
    """Run a row to its end. Return the codes of each spoken frame; `row.drawn` has all columns."""
    return [column[1:] - model.language_model.code_offset for column in generate(Batch(model), row)]


def frames_of(model: DualAR, *arguments: Any, **options: Any) -> list[np.ndarray]:
    """Return the codes of each frame that a row of these arguments speaks; see `row_of`."""
    return spoken(model, row_of(model, *arguments, **options))


def columns_of(model: DualAR, *arguments: Any, **options: Any) -> list[np.ndarray]:
    """Return all columns that a row of these arguments draws; see `row_of`."""
    row = row_of(model, *arguments, **options)
    spoken(model, row)
    return list(row.drawn.T)
