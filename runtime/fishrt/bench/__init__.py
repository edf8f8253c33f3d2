"""Measurements of a bundle on this machine: its speed, its memory, and its share of the machine's memory bandwidth."""

from .measure import BenchRequest, bench

__all__ = ["BenchRequest", "bench"]
