"""What a scheduler has done."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Stats:
    """Counts of a scheduler: now, and since it began."""

    waiting: int = 0
    active: int = 0
    submitted: int = 0
    finished: int = 0
    """Spoken to the end."""
    cancelled: int = 0
    refused: int = 0
    """Because the queue was full."""
    failed: int = 0
    """Ended by an error, those that waited too long included."""
    steps: int = 0
    rows: int = 0
    """Sum over the steps; rows ÷ steps is the mean batch."""
    busy_s: float = 0.0
    """Seconds in turns."""
