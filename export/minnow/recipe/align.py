"""Alignment of phones to letters by Viterbi training.

flite prints the phones of a sentence and their times, but not their letters. Each symbol of the text stands for a few phones or
none, in order. The probabilities of their number and of each phone are counted from the best alignments so far.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SAYS_AT_MOST = {"letter": 3, "digit": 16, "other": 1}
"""Most phones of a symbol of each kind: "x" has two, "7" in "74" has seven, a comma has one silence."""
START = "^"
"""A symbol before each text, for the silence before the first word."""
EVEN_SPREAD = 3.0
"""Standard deviation of the first guess from an even pace, in symbols."""


class Aligner:
    """An aligner that is trained on `sentences`, pairs of a text and its phones, and then aligns any of them."""

    def __init__(self, sentences: Sequence[tuple[str, Sequence[str]]], *, rounds: int) -> None:
        self.symbols = {s: n for n, s in enumerate(sorted({c for text, _ in sentences for c in START + text.lower()}))}
        self.phones = {p: n for n, p in enumerate(sorted({p for _, phones in sentences for p in phones}))}
        widest = max(SAYS_AT_MOST.values()) + 1
        allowed = np.zeros((len(self.symbols), widest))
        for symbol, n in self.symbols.items():
            allowed[n, : SAYS_AT_MOST["letter" if symbol.isalpha() else "digit" if symbol.isdigit() else "other"] + 1] = 1.0
        spoken = np.full((len(self.symbols), len(self.phones)), 0.1)
        for text, phones in sentences:
            ids, said = self._ids(text, phones)
            distance = np.arange(len(ids))[:, None] / len(ids) - (np.arange(len(said)) + 0.5) / len(said)
            np.add.at(spoken, (ids[:, None], said[None]), np.exp(-0.5 * (distance * len(ids) / EVEN_SPREAD) ** 2))
        counts = allowed.copy()
        for _ in range(rounds):
            self._set(spoken, counts, allowed)
            spoken, counts = np.full_like(spoken, 0.1), 0.1 * allowed
            for text, phones in sentences:
                ids, said = self._ids(text, phones)
                owner = self._best(ids, said)
                np.add.at(spoken, (ids[owner], said), 1.0)
                np.add.at(counts, (ids, np.bincount(owner, minlength=len(ids))), 1.0)
        self._set(spoken, counts, allowed)

    def __call__(self, text: str, phones: Sequence[str]) -> np.ndarray:
        """Return for each phone the index of its symbol in `text`: int64 [phones], never decreasing."""
        return np.asarray(np.maximum(self._best(*self._ids(text, phones)) - 1, 0))

    def _ids(self, text: str, phones: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        symbols = np.array([self.symbols[c] for c in START + text.lower()])
        return symbols, np.array([self.phones[p] for p in phones])

    def _set(self, spoken: np.ndarray, counts: np.ndarray, allowed: np.ndarray) -> None:
        self.log_phone = np.log(spoken / spoken.sum(1, keepdims=True))
        with np.errstate(divide="ignore"):
            self.log_count = np.log(np.where(allowed > 0, counts, 0.0) / counts.sum(1, keepdims=True))

    def _best(self, ids: np.ndarray, said: np.ndarray) -> np.ndarray:
        """Return the likeliest symbol of each phone. Raises ValueError for more phones than the text can have."""
        scores = np.full(len(said) + 1, -np.inf)
        scores[0] = 0.0
        taken: list[np.ndarray] = []
        for symbol in ids:
            options = self.log_count[symbol][: int(np.isfinite(self.log_count[symbol]).sum())]
            total = np.concatenate(([0.0], np.cumsum(self.log_phone[symbol][said])))
            table = np.full((len(options), len(scores)), -np.inf)
            for count, chance in enumerate(options[: len(scores)]):
                table[count, count:] = (scores - total)[: len(scores) - count] + chance
            taken.append(table.argmax(0))
            scores = table.max(0) + total
        if not np.isfinite(scores[-1]):
            raise ValueError(f"{len(said)} phones are too many for {len(ids)} symbols")
        owner, end = np.zeros(len(said), dtype=np.int64), len(said)
        for n in range(len(ids) - 1, -1, -1):
            begin = end - taken[n][end]
            owner[begin:end] = n
            end = begin
        return owner
