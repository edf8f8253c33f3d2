"""Runs named graphs on named arrays. Knows nothing of speech."""

from .engine import Array, Engine, State
from .errors import FishrtError, GraphError, ProviderError
from .ort.engine import open_engine
from .spec import GraphSpec, StatePair, TensorSpec

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
