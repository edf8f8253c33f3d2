"""The errors that users see. Each says what is wrong and why; `hint` says what to do about it."""

from __future__ import annotations


class FishrtError(Exception):
    """Base class of every error that a user can fix."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class ProviderError(FishrtError):
    """The asked-for execution provider is unknown, not installed, or cannot run this graph."""


class GraphError(FishrtError):
    """A graph file is damaged, or does not have the tensors that its description names."""
