"""Checkpoints of official size and layout with random weights, for measurements without the real ones."""

from .checkpoint import count_parameters, write_checkpoint
from .sizes import FAMILIES

__all__ = ["FAMILIES", "count_parameters", "write_checkpoint"]
