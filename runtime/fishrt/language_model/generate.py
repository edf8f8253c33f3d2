"""The loop: prompt ids in, columns of codes out. It knows ids, not text, audio or providers.

    prompt ─► slow AR (all columns) ─┐
                                     ▼                                        ┌───────────────┐
    ┌──────────────► logits, hidden ─► main token ─► code 0 ─► fast AR ─► code 1 ─► … ─► code C−1 ─► column
    └── slow AR (one column) ◄─────────────────────────────────────────────────────────────────────┘

Each column is fed back to the slow AR exactly as drawn. The fast AR takes the slow AR's hidden vector at its position 0 and code
j − 1 at position j, so that it gives the logits of code j there. Where code 0 follows from the main token, one call takes
positions 0 and 1; elsewhere code 0 is drawn like the rest. See `drawing`; on devices all of it is one graph. A turn of the loop
is `Batch.step`; here the batch is one row.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..arrays import Ints
from .batch import Batch, Row


def generate(batch: Batch, row: Row, slot: int | None = None) -> Iterator[Ints]:
    """Yield the spoken columns of a row, int64 [1 + C] each, alone in a batch of one; then `row.stop_reason` is set.

    slot: see `Batch.admit`. Raises the row's error.
    """
    batch.admit(row, slot)
    try:
        while row.goes_on:
            ((_, column),) = batch.step()
            if column is not None:
                yield column
    finally:
        batch.leave(row)
    if row.error:
        raise row.error
