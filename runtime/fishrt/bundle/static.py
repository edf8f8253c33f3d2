"""`static.json` of a bundle: its graphs of fixed sizes for CoreML, and the verdict of ONNX Runtime's usability checker on them.

`fishrt export --static coreml` writes it, with the graphs. With provider coreml they decode the codes; the language model and the
codec's encoder run on the CPU. The checker estimates from the names of operators; nothing was run on a Mac.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass

from fishrt_engines import Engine, ProviderError, open_engine
from fishrt_engines.engine import GraphSpec
from fishrt_engines.ort.coreml import Part, StaticEngine

from ..errors import BundleError
from .folder import AGAIN, Bundle, Parity, read_listed

log = logging.getLogger(__name__)

STATIC = "static.json"


@dataclass(frozen=True, slots=True)
class Usability:
    """The usability checker's result for one graph as a CoreML ML program."""

    partitions: int
    """Number of parts that CoreML would run; the CPU runs the nodes between them."""
    covered: int
    """Number of nodes in these parts."""
    nodes: int
    """Number of all nodes, except those that only convert weights."""
    verdict: str
    """Whether CoreML is worth trying, by the checker: NO, MAYBE or YES."""
    outside: tuple[str, ...]
    """Operators that CoreML does not have."""


@dataclass(frozen=True, slots=True)
class StaticGraph:
    """The graph codec_decode for calls of one length and a batch of one."""

    frames: int
    front: GraphSpec
    """The part with integer inputs, which runs on the CPU. It has no state."""
    back: GraphSpec
    """The rest, which runs on CoreML: its inputs are the results of `front`, and it has the state of codec_decode."""
    usability: Usability
    """Usability of `back`."""
    parity: Parity
    """Error against the portable graph, measured by the export."""


@dataclass(frozen=True, slots=True)
class StaticStep:
    """The check of a language model's graph for a call of one column. The graph itself is not kept: the CPU runs the model."""

    role: str
    cache: int
    """Rows of its cache."""
    usability: Usability
    """Usability of the part without integer inputs."""


@dataclass(frozen=True, slots=True)
class StaticGraphs:
    """The content of `static.json`."""

    target: str
    """Provider of the graphs: "coreml"."""
    codec_decode: tuple[StaticGraph, ...]
    steps: tuple[StaticStep, ...]

    def summary(self) -> list[str]:
        """Return lines of text."""
        graphs = [(f"codec_decode, {graph.frames} frames", graph.usability) for graph in self.codec_decode]
        steps = [(f"{step.role}, one column (not in the bundle)", step.usability) for step in self.steps]
        return [
            f"{name}: {found.covered} of {found.nodes} nodes in {found.partitions} partitions, {found.verdict}"
            for name, found in (*graphs, *steps)
        ]

    def to_json(self) -> str:
        """Return the text of `static.json`."""
        return json.dumps(asdict(self), indent=1) + "\n"


def read_static(bundle: Bundle) -> StaticGraphs | None:
    """Read `static.json`; return None for a bundle that does not list it.

    Raises BundleError for an invalid one, or one that names files that the bundle does not list.
    """
    found = read_listed(bundle, STATIC, StaticGraphs)
    if found is None:
        return None
    files = [spec.file for graph in found.codec_decode for spec in (graph.front, graph.back)]
    if lost := [name for name in files if name not in bundle.manifest.files]:
        raise BundleError(f"{bundle.file(STATIC)} names files that the bundle does not list: {', '.join(lost)}", hint=AGAIN)
    return found


def static_graphs(bundle: Bundle) -> StaticGraphs:
    """Return the static graphs of a bundle. Raises ProviderError if it has none, and BundleError as `read_static`."""
    found = read_static(bundle)
    if found is None:
        raise ProviderError(
            f"{bundle.manifest.name} has no static graphs, which provider 'coreml' needs",
            hint='export with `fishrt export --static coreml CHECKPOINT BUNDLE`, or use provider "cpu"',
        )
    log.info("provider coreml: codec_decode runs on CoreML; the language model and codec_encode run on the CPU")
    return found


def open_codec_decode(bundle: Bundle, static: StaticGraphs, threads: int | None) -> Engine:
    """Return codec_decode on CoreML. The graph of a length is opened when the first call of this length comes."""
    by_frames = {graph.frames: graph for graph in static.codec_decode}

    def open_part(frames: int) -> Part:
        front, back = by_frames[frames].front, by_frames[frames].back
        return Part(
            open_engine(bundle.file(front.file), front, provider="cpu", threads=threads),
            open_engine(bundle.file(back.file), back, provider="coreml", threads=threads),
        )

    return StaticEngine(bundle.manifest.graphs["codec_decode"], "frames", by_frames, open_part)
