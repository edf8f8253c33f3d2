"""`quantisation.json` of a bundle: what rounding to integers did to each layer. For people; nothing needs it to speak."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from .bundle import Bundle, read_listed

QUANTISATION = "quantisation.json"


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One matrix of the language model."""

    name: str
    """The role of its graph, a dot, and its name there."""
    precision: str
    """One of bundle.PRECISIONS."""
    block: int | None
    """Inputs that share a scale; None for a layer that was not quantised."""
    error: float
    """Root mean square of the change, divided by that of the weight; 0.0 for a layer that was not quantised."""


@dataclass(frozen=True, slots=True)
class Quantisation:
    """All of them, in the order of the graphs."""

    layers: tuple[LayerReport, ...]

    def summary(self, worst: int = 3) -> list[str]:
        """Lines of text: for each precision how many layers and their errors, then the `worst` ones."""
        quantised = [layer for layer in self.layers if layer.block]
        lines = []
        for precision in sorted({layer.precision for layer in quantised}):
            errors = [layer.error for layer in quantised if layer.precision == precision]
            mean = sum(errors) / len(errors)
            lines.append(f"{precision}: {len(errors)} layers, relative error {mean:.2%} on average, {max(errors):.2%} at most")
        lines += [f"{layer.error:.2%} {layer.name}" for layer in sorted(quantised, key=lambda layer: -layer.error)[:worst]]
        return lines

    def to_json(self) -> str:
        """The text of `quantisation.json`."""
        return json.dumps(asdict(self), indent=1) + "\n"


def read_quantisation(bundle: Bundle) -> Quantisation | None:
    """None for a bundle that lists no `quantisation.json`. Raises BundleError for one that is not valid."""
    return read_listed(bundle, QUANTISATION, Quantisation)
