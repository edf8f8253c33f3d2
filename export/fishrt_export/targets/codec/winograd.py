"""Minimal filtering (Winograd, by Toom and Cook): F(m, taps) gives m outputs of a convolution of few products.

    y = A (G w ⊙ B x),  x: the m + taps − 1 inputs of a tile, w: the taps

A direct convolution takes m · taps products for each pair of channels, this one m + taps − 1.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]

_POINTS = tuple(map(Fraction, ("0", "1", "-1", "2", "-2", "1/2", "-1/2", "3/4", "-4/3")))
"""Points of which F(4, 7) takes all, with infinity. Its error is 2 dB less than with the best of four other choices."""


def transforms(outputs: int, taps: int) -> tuple[Matrix, Matrix, Matrix]:
    """Return A [outputs, n], G [n, taps] and B [n, n], n = outputs + taps − 1.

    The rows of B are scaled by powers of two to numbers near 1, and those of G by their inverse.
    """
    n = outputs + taps - 1
    points = _POINTS[: n - 1]
    assert len(points) == n - 1
    a = [[point**j for point in points] + [Fraction(j == outputs - 1)] for j in range(outputs)]
    g, b = [], []
    for i, point in enumerate(points):
        others = [other for j, other in enumerate(points) if j != i]
        factor = Fraction(1)
        for other in others:
            factor *= point - other
        g.append([point**k / factor for k in range(taps)])
        b.append([*_polynomial(others), Fraction(0)])
    g.append([Fraction(k == taps - 1) for k in range(taps)])
    b.append(_polynomial(points))
    wide = np.array(b, np.float64)
    scale = np.exp2(np.round(np.log2(np.abs(wide).max(axis=1, keepdims=True))))
    return np.array(a, np.float64), np.array(g, np.float64) * scale, wide / scale


def _polynomial(roots: tuple[Fraction, ...] | list[Fraction]) -> list[Fraction]:
    """Return the coefficients of ∏ (x − root), lowest power first."""
    found = [Fraction(1)]
    for root in roots:
        shifted, scaled = [Fraction(0), *found], [*(-root * c for c in found), Fraction(0)]
        found = [a + b for a, b in zip(shifted, scaled, strict=True)]
    return found
