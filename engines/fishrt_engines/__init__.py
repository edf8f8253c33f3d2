"""Runs named graphs on named arrays. Knows nothing of speech."""

from .engine import Array, Engine, GraphSpec, State, StatePair, TensorSpec
from .errors import FishrtError, GraphError, ProviderError
from .open import open_engine

__all__ = [
    "Array",
    "Engine",
    "FishrtError",
    "GraphError",
    "GraphSpec",
    "ProviderError",
    "State",
    "StatePair",
    "TensorSpec",
    "open_engine",
]
