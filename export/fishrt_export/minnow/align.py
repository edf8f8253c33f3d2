"""Which letter of a sentence is spoken when: phones aligned to letters by Viterbi training.

flite tells the phones of a sentence and their times, but not the letters they come from. Each symbol of the text says a few
phones or none, in order; how likely a symbol is to say so many phones, and which, is counted from the best alignments so far.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SAYS_AT_MOST = {"letter": 3, "digit": 16, "other": 1}
"""Phones that a symbol of each kind may stand for: "x" says two, "7" in "74" says seven, a comma says one silence."""
START = "^"
"""A symbol before each text, for the silence before the first word."""
EVEN_SPREAD = 3.0
"""In symbols: how far off an even pace the first guess may be."""


class Aligner:
    """Learns from sentences, then aligns any of them. `sentences` are pairs of a text and its phones."""

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
        """For each phone, the index of the symbol of `text` that it comes from: int64 [phones], never falling."""
        return np.asarray(np.maximum(self._best(*self._ids(text, phones)) - 1, 0))

    def _ids(self, text: str, phones: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        symbols = np.array([self.symbols[c] for c in START + text.lower()])
        return symbols, np.array([self.phones[p] for p in phones])

    def _set(self, spoken: np.ndarray, counts: np.ndarray, allowed: np.ndarray) -> None:
        self.log_phone = np.log(spoken / spoken.sum(1, keepdims=True))
        with np.errstate(divide="ignore"):
            self.log_count = np.log(np.where(allowed > 0, counts, 0.0) / counts.sum(1, keepdims=True))

    def _best(self, ids: np.ndarray, said: np.ndarray) -> np.ndarray:
        """The likeliest owner of each phone. Raises ValueError where the phones are too many for the text."""
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
