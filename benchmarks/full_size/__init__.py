"""Checkpoints of official size and layout with random weights: what is measured when no real checkpoint is at hand."""

from .checkpoint import count_parameters, write_checkpoint
from .sizes import FAMILIES

__all__ = ["FAMILIES", "count_parameters", "write_checkpoint"]
