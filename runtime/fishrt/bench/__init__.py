"""How fast a bundle is on this machine, how much memory it takes, and how near that is to the machine's limit."""

from .measure import BenchRequest, bench

__all__ = ["BenchRequest", "bench"]
