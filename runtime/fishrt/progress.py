"""Callbacks by which long work reports how much of it is done."""

from collections.abc import Callable

Progress = Callable[[str, float], None]
"""Receives the name of the current stage and the completed part of the whole work, 0..1."""
PartDone = Callable[[float], None]
"""Receives the completed part of one stage, 0..1."""
