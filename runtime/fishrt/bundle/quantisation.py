"""The rounding errors of quantised layers, and of all of them together. They are for people; speaking does not need them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

ROWS = "int8-rows"
"""The precision of weights in 8 bits that a CPU multiplies by activations rounded by rows. The DequantizeLinear of such weights
has a mark of this name."""
OFFSETS = "offsets"
"""The mark of the Add behind a product with integers that have an offset for each group of inputs."""
LEVELS = ("nf4", "fp4")
"""Precisions that only checkpoints come in, and that a bundle keeps: weights of four bits that name numbers of a table."""
USUAL = {"int8": 0.02, ROWS: 0.03, "int4": 0.13}
"""Largest usual error by precision: normally distributed weights have 0.6 %, 1.1 % and 12 %."""
_LISTED = 3


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One matrix of the language model."""

    name: str
    """Role of the graph, a dot, and the layer's name in the graph."""
    precision: str
    """One of manifest.PRECISIONS or of LEVELS."""
    block: int | None
    """Number of inputs that share a scale; None for a layer that was not quantised."""
    error: float
    """Root mean square of the rounding error ÷ that of the weight; 0.0 for a layer that was not quantised."""
    reason: str = ""
    """Why it was not quantised; empty if it was, or in a bundle of an earlier version."""

    @property
    def role(self) -> str:
        """Role of the layer's graph."""
        return self.name.partition(".")[0]

    @property
    def is_unusual(self) -> bool:
        """Whether the error is larger than usual."""
        return self.error > USUAL.get(self.precision, 1.0)


@dataclass(frozen=True, slots=True)
class Quantisation:
    """Reports of all layers, in the order of the graphs."""

    layers: tuple[LayerReport, ...]

    def summary(self) -> list[str]:
        """Return lines of text: for each precision its layers and errors, then the layers that were not quantised."""
        quantised = [layer for layer in self.layers if layer.block]
        lines = []
        for precision in sorted({layer.precision for layer in quantised}):
            chosen = [layer for layer in quantised if layer.precision == precision]
            worst, mean = max(chosen, key=lambda layer: layer.error), sum(layer.error for layer in chosen) / len(chosen)
            lines.append(
                f"{precision}: {len(chosen)} of {len(self.layers)} layers, error {mean:.1%} on average, "
                f"{worst.error:.1%} at most ({worst.name})"
            )
            if unusual := sorted((layer for layer in chosen if layer.is_unusual), key=lambda layer: -layer.error):
                names = ", ".join(layer.name for layer in unusual[:_LISTED])
                more = f" and {len(unusual) - _LISTED} more" if len(unusual) > _LISTED else ""
                better = "int8" if precision == "int4" else "fp16"
                lines.append(f"  more than the usual {USUAL[precision]:.0%}: {names}{more}; --keep NAME={better} helps")
            elif precision in USUAL:
                lines[-1] += f", within the usual {USUAL[precision]:.0%}"
        kept = Counter((layer.precision, layer.reason) for layer in self.layers if not layer.block)
        lines += [
            f"left in {precision}: {count} of {len(self.layers)} layers" + (f", {reason}" if reason else "")
            for (precision, reason), count in sorted(kept.items())
        ]
        return lines

    def precisions(self, role: str) -> str:
        """Return how the layers of a graph are stored, the most frequent first, such as "int4 (24 layers), fp16 (2)"."""
        counts = Counter(layer.precision for layer in self.layers if layer.role == role).most_common()
        return ", ".join(f"{precision} ({count}{'' if n else ' layers'})" for n, (precision, count) in enumerate(counts))


@dataclass(frozen=True, slots=True)
class UtteranceError:
    """Error of the latents of a short utterance of a diffusion model: of all its graphs together, measured by the export."""

    error: float
    """Root mean square of the difference from the latents with the checkpoint's weights in float32 ÷ that of these."""
    frames: int
    steps: int
    provider: str

    def summary(self) -> str:
        """Return the error in words."""
        return f"{self.error:.1%} off those of the checkpoint's weights ({self.frames} frames, {self.steps} steps)"
