"""`static.json` of a bundle: its graphs for CoreML, of fixed sizes, and what ONNX Runtime's usability checker says of them.

`fishrt export --static coreml` writes it, with the graphs. With provider coreml they decode the codes; the language model and the
codec's encoder run on the CPU. What the checker says is an estimate by names of operators; nothing of it was tried on a Mac.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass

from fishrt_engines import Engine, ProviderError, open_engine
from fishrt_engines.coreml import Part, StaticEngine
from fishrt_engines.spec import GraphSpec

from .bundle import AGAIN, Bundle, Parity, read_listed
from .errors import BundleError

log = logging.getLogger(__name__)

STATIC = "static.json"


@dataclass(frozen=True, slots=True)
class Usability:
    """Of one graph, for CoreML's ML programs."""

    partitions: int
    """Parts that CoreML would run; between them the CPU takes over."""
    covered: int
    """Nodes in them."""
    nodes: int
    """All nodes, but for those that only turn weights into another form."""
    verdict: str
    """The checker's, on whether CoreML is worth trying: NO, MAYBE or YES."""
    outside: tuple[str, ...]
    """Operators that CoreML does not have."""


@dataclass(frozen=True, slots=True)
class StaticGraph:
    """codec_decode for calls of one length and one row."""

    frames: int
    front: GraphSpec
    """The part that integers go into, for the CPU. It carries no state."""
    back: GraphSpec
    """The rest: takes the results of `front`, and carries the state of codec_decode."""
    usability: Usability
    """Of `back`."""
    parity: Parity
    """How far it was from the portable graph when it was exported."""


@dataclass(frozen=True, slots=True)
class StaticStep:
    """A graph of the language model, made in the same way for a call of one column. It is not kept: the CPU runs the model."""

    role: str
    cache: int
    """Rows of its cache."""
    usability: Usability
    """Of the part that no integers go into."""


@dataclass(frozen=True, slots=True)
class StaticGraphs:
    """All of it."""

    target: str
    """What they are made for: "coreml"."""
    codec_decode: tuple[StaticGraph, ...]
    steps: tuple[StaticStep, ...]

    def summary(self) -> list[str]:
        """Lines of text."""
        graphs = [(f"codec_decode, {graph.frames} frames", graph.usability) for graph in self.codec_decode]
        steps = [(f"{step.role}, one column (not in the bundle)", step.usability) for step in self.steps]
        return [
            f"{name}: {found.covered} of {found.nodes} nodes in {found.partitions} partitions, {found.verdict}"
            for name, found in (*graphs, *steps)
        ]

    def to_json(self) -> str:
        """The text of `static.json`."""
        return json.dumps(asdict(self), indent=1) + "\n"


def read_static(bundle: Bundle) -> StaticGraphs | None:
    """None for a bundle that lists no `static.json`. Raises BundleError for one that is not valid, or names other files than the
    bundle has.
    """
    found = read_listed(bundle, STATIC, StaticGraphs)
    if found is None:
        return None
    files = [spec.file for graph in found.codec_decode for spec in (graph.front, graph.back)]
    if lost := [name for name in files if name not in bundle.manifest.files]:
        raise BundleError(f"{bundle.file(STATIC)} names files that the bundle does not list: {', '.join(lost)}", hint=AGAIN)
    return found


def static_graphs(bundle: Bundle) -> StaticGraphs:
    """Those of a bundle that has some. Raises ProviderError for another one, and as `read_static`."""
    found = read_static(bundle)
    if found is None:
        raise ProviderError(
            f"{bundle.manifest.name} has no static graphs, which provider 'coreml' needs",
            hint='export with `fishrt export --static coreml CHECKPOINT BUNDLE`, or use provider "cpu"',
        )
    log.info("provider coreml: codec_decode runs on CoreML; the language model and codec_encode run on the CPU")
    return found


def open_codec_decode(bundle: Bundle, static: StaticGraphs, threads: int | None) -> Engine:
    """codec_decode on CoreML. Its graphs are opened when a call of their length comes first."""
    by_frames = {graph.frames: graph for graph in static.codec_decode}

    def open_part(frames: int) -> Part:
        front, back = by_frames[frames].front, by_frames[frames].back
        return Part(
            open_engine(bundle.file(front.file), front, provider="cpu", threads=threads),
            open_engine(bundle.file(back.file), back, provider="coreml", threads=threads),
        )

    return StaticEngine(bundle.manifest.graphs["codec_decode"], "frames", by_frames, open_part)
