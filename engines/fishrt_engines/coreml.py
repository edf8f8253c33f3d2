"""CoreML through ONNX Runtime: how its sessions are set up, and one graph of open length as several of fixed lengths.

CoreML compiles a graph for one set of sizes, so a graph with an open dimension comes as several, each for another size of it. A
call of any size is cut into theirs, and the state goes along from one to the next:

    11 frames ─► 4 ─► 4 ─► 1 ─► 1 ─► 1        of graphs for 1, 4 and 16 frames

Nothing here has run on a Mac. Options and order of calls are tested with a stand-in for ONNX Runtime's provider; what CoreML
makes of the graphs, how fast it is, and how far from float32 its numbers are, is not known.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .base import Array, Engine, Resident, State
from .errors import GraphError, ProviderError
from .feeds import check_feeds, check_state_dims
from .folders import cache_folder
from .ort_session import Opened, graph_source, session_options
from .providers import import_onnxruntime
from .spec import GraphSpec, TensorSpec

log = logging.getLogger(__name__)

PROVIDER = "CoreMLExecutionProvider"
CACHE_KEY = "COREML_CACHE_KEY"
"""In the metadata of a graph's file: the name under which CoreML's compiled form of it is kept."""


def coreml_options() -> dict[str, str]:
    """Options of ONNX Runtime's CoreML provider. All that matter are given, since defaults have changed between versions.

    Compiled models are kept in our cache folder; without a folder to write to, they are compiled at every start, which a warning
    tells.
    """
    options = {
        "ModelFormat": "MLProgram",
        "MLComputeUnits": "ALL",
        "RequireStaticInputShapes": "1",
        "EnableOnSubgraphs": "0",
        "AllowLowPrecisionAccumulationOnGPU": "0",
    }
    cache = cache_folder()
    if cache is None:
        return options
    folder = cache / "coreml"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        log.warning("compiled CoreML models cannot be kept in %s: %s", folder, error)
        return options
    return {**options, "ModelCacheDirectory": str(folder)}


def open_coreml(path: Path, spec: GraphSpec, *, threads: int) -> Opened:
    """A session of the graph file `path` on CoreML. Raises what ONNX Runtime raises for a graph that it cannot load.

    threads: for what CoreML leaves to the CPU. Raises ProviderError for a graph of open sizes, and where CoreML does not start.
    """
    check_static(spec)
    ort = import_onnxruntime()
    options = session_options(ort, threads)
    session = ort.InferenceSession(
        graph_source(path, options), options, providers=[(PROVIDER, coreml_options()), "CPUExecutionProvider"]
    )
    if PROVIDER not in session.get_providers():
        raise ProviderError(
            f"ONNX Runtime did not start its CoreML provider for {path.name}, and would run it on the CPU",
            hint='use provider "cpu"; `fishrt doctor` tells what is here',
        )
    return Opened(session)


def check_static(spec: GraphSpec) -> None:
    """Raises ProviderError for a graph with open dimensions: CoreML would leave all of it to the CPU, without a word."""
    if open_dims := sorted({d for t in (*spec.inputs, *spec.outputs) for d in t.shape if isinstance(d, str)}):
        raise ProviderError(
            f"provider 'coreml' runs graphs of fixed sizes only, and {spec.file} leaves open: {', '.join(open_dims)}",
            hint='export with `fishrt export --static coreml` and speak from that bundle, or use provider "cpu"',
        )


@dataclass(frozen=True, slots=True)
class Part:
    """The graph for one size: what integers go into, on the CPU, and the rest, which carries the state."""

    front: Engine
    back: Engine

    def run(self, feeds: Mapping[str, Array], state: State) -> dict[str, Array]:
        """As `Engine.run`."""
        return self.back.run(self.front.run(feeds), state)


class StaticState:
    """The state of a `StaticEngine`: that of the part which ran last. See `base.State`."""

    def __init__(self, owner: StaticEngine, size: int) -> None:
        self.owner = owner
        self._states = {size: owner.part(size).back.new_state()}
        self._last = size

    @property
    def dims(self) -> Mapping[str, int]:
        """See `base.State`."""
        return {"batch": 1}

    def of(self, size: int) -> State:
        """For the part of this size, with all that the part before left."""
        if size != self._last:
            state = self._states.setdefault(size, self.owner.part(size).back.new_state())
            for tensor in self.owner.spec.state_tensors:
                state.write(tensor.name, self.read(tensor.name))
            self._last = size
        return self._states[size]

    def read(self, name: str) -> Array:
        """See `base.State`."""
        return self._states[self._last].read(name)

    def write(self, name: str, array: Array) -> None:
        """See `base.State`."""
        self._states[self._last].write(name, array)

    def grow(self, **dims: int) -> None:
        """Raises ValueError: sizes are fixed."""
        raise ValueError(f"{self.owner.spec.file} is of fixed sizes; its state cannot grow to {dims}")


class StaticEngine:
    """A graph whose calls are run by graphs of fixed sizes. See `base.Engine`, and the module.

    All feeds have the open dimension, and all results have one, which grows with it: they are cut and joined there.
    """

    def __init__(self, spec: GraphSpec, dimension: str, sizes: Iterable[int], open_part: Callable[[int], Part]) -> None:
        """spec: of the portable graph, whose other open dimension is "batch", here always 1. sizes: of `dimension`; 1 is among
        them. open_part: opens what is for one of them, when it is first needed.
        """
        self.spec = spec
        self.provider = "coreml"
        self._dimension, self._sizes = dimension, sorted(sizes, reverse=True)
        self._open_part = open_part
        self._parts: dict[int, Part] = {}
        if self._sizes[-1:] != [1] or not spec.states:
            raise GraphError(f"{spec.file} has static graphs of {self._sizes} {dimension}; 1 must be among them")

    def part(self, size: int) -> Part:
        """The graphs for one size."""
        if size not in self._parts:
            self._parts[size] = self._open_part(size)
        return self._parts[size]

    def new_state(self, **dims: int) -> StaticState:
        """See `base.Engine`. Raises ValueError for more rows than one."""
        check_state_dims(self.spec, dims)
        if dims != {"batch": 1}:
            raise ValueError(f"state dimensions are {dims}; the static graphs of {self.spec.file} have batch = 1")
        return StaticState(self, self._sizes[-1])

    def run(
        self, feeds: Mapping[str, Array | Resident], state: State | None = None, resident: Collection[str] = ()
    ) -> dict[str, Any]:
        """See `base.Engine`. Residents are arrays, as on every CPU."""
        if not isinstance(state, StaticState) or state.owner is not self:
            raise ValueError(f"{self.spec.file} needs a state that its own new_state made")
        count = check_feeds(self.spec, feeds, state.dims)[self._dimension]
        found, start = [], 0
        while start < count:
            size = next(size for size in self._sizes if size <= count - start)
            chunk = {t.name: _part(feeds[t.name], t.shape.index(self._dimension), start, size) for t in self.spec.feeds}
            # The next call of the same part overwrites its results.
            results = self.part(size).run(chunk, state.of(size))
            found.append({name: array.copy() for name, array in results.items()})
            start += size
        return {t.name: np.concatenate([part[t.name] for part in found], axis=_open_axis(t)) for t in self.spec.results}


def _part(array: Any, axis: int, start: int, size: int) -> Array:
    return np.ascontiguousarray(np.take(array, range(start, start + size), axis))


def _open_axis(tensor: TensorSpec) -> int:
    """The one that is neither fixed nor the batch."""
    return next(n for n, d in enumerate(tensor.shape) if isinstance(d, str) and d != "batch")
