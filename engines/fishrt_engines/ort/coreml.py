"""CoreML through ONNX Runtime: options of sessions, and calls of any length by graphs of fixed lengths.

CoreML compiles a graph for one set of sizes, so a graph with an open dimension is exported several times, for several sizes. A
call of any size is cut into these sizes, and the state is passed from one part to the next:

    11 frames ─► 4 ─► 4 ─► 1 ─► 1 ─► 1        of graphs for 1, 4 and 16 frames

This has not run on a Mac. Tests check the options and the order of calls with a fake of ONNX Runtime's provider; speed and
numerical error on CoreML are unknown.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from ..engine import Array, Engine, GraphSpec, OneRow, Resident, State, TensorSpec, Traits, check_feeds, check_state_dims
from ..errors import GraphError, ProviderError
from ..folders import cache_folder
from ..providers import import_onnxruntime
from .session import Opened, graph_source, session_options

log = logging.getLogger(__name__)

PROVIDER = "CoreMLExecutionProvider"
CACHE_KEY = "COREML_CACHE_KEY"
"""Metadata key in a graph's file: the name of CoreML's compiled form in the cache."""


def coreml_options() -> dict[str, str]:
    """Return the options of ONNX Runtime's CoreML provider: all that matter, since defaults have changed between versions.

    Compiled models are kept in the cache folder. Without a folder to write to, a warning is logged, and they are compiled at
    every start.
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
        log.warning("compiled CoreML models cannot be written to %s, and are made again at every start: %s", folder, error)
        return options
    return {**options, "ModelCacheDirectory": str(folder)}


def open_coreml(path: Path, spec: GraphSpec, *, threads: int) -> Opened:
    """Open a session of the graph file `path` on CoreML. ONNX Runtime's errors for a graph that it cannot load go through.

    threads: for nodes that CoreML leaves to the CPU. Raises ProviderError for a graph of open sizes, or if CoreML does not start.
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
            hint='use provider "cpu"',
        )
    return Opened(session)


def check_static(spec: GraphSpec) -> None:
    """Check that a graph has fixed sizes: CoreML would silently leave others to the CPU. Raises ProviderError otherwise."""
    if open_dims := sorted({d for t in (*spec.inputs, *spec.outputs) for d in t.shape if isinstance(d, str)}):
        raise ProviderError(
            f"provider 'coreml' runs only graphs of fixed sizes; {spec.file} has the open dimensions {', '.join(open_dims)}",
            hint='give it graphs of fixed sizes, or use provider "cpu"',
        )


@dataclass(frozen=True, slots=True)
class Part:
    """The two graphs for one size: the one that takes integers, on the CPU, and the rest, which carries the state."""

    front: Engine
    back: Engine

    def run(self, feeds: Mapping[str, Array], state: State) -> dict[str, Array]:
        """See `engine.Engine.run`."""
        given = {**feeds, **self.front.run({tensor.name: feeds[tensor.name] for tensor in self.front.spec.feeds})}
        return self.back.run({tensor.name: given[tensor.name] for tensor in self.back.spec.feeds}, state)


class StaticState(OneRow):
    """The state of a `StaticEngine`: the state of the part that ran last. See `engine.State`."""

    dims: Mapping[str, int] = MappingProxyType({"batch": 1})

    def __init__(self, owner: StaticEngine, size: int) -> None:
        self.owner = owner
        self._states = {size: owner.part(size).back.new_state()}
        self._last = size

    def of(self, size: int) -> State:
        """Return the state for the part of this size, with the values of the part that ran last."""
        if size != self._last:
            state = self._states.setdefault(size, self.owner.part(size).back.new_state())
            for tensor in self.owner.spec.state_tensors:
                state.write(tensor.name, self.read(tensor.name))
            self._last = size
        return self._states[size]

    def read(self, name: str) -> Array:
        """See `engine.State`."""
        return self._states[self._last].read(name)

    def write(self, name: str, array: Array) -> None:
        """See `engine.State`."""
        self._states[self._last].write(name, array)

    def grow(self, **dims: int) -> None:
        """Raises ValueError: sizes are fixed."""
        raise ValueError(f"{self.owner.spec.file} has fixed sizes; its state cannot grow to {dims}")


class StaticEngine:
    """An engine that runs each call by graphs of fixed sizes. See `engine.Engine`, and the module.

    Feeds are cut along the open dimension. Results are joined along theirs, which must be proportional to it.
    """

    def __init__(self, spec: GraphSpec, dimension: str, sizes: Iterable[int], open_part: Callable[[int], Part]) -> None:
        """Open no part yet; `open_part(size)` opens one at its first use.

        spec: of the portable graph. Its only other open dimension is "batch", here always 1. sizes: of `dimension`, with 1.
        Raises GraphError for other sizes, or without state.
        """
        self.spec = spec
        self.provider, self.traits = "coreml", Traits(parts_states=False)
        self._dimension, self._sizes = dimension, sorted(sizes, reverse=True)
        self._open_part = open_part
        self._parts: dict[int, Part] = {}
        if self._sizes[-1:] != [1] or not spec.states:
            raise GraphError(f"{spec.file} has static graphs of {self._sizes} {dimension}; 1 must be among them")

    def part(self, size: int) -> Part:
        """Return the graphs for one size."""
        if size not in self._parts:
            self._parts[size] = self._open_part(size)
        return self._parts[size]

    def new_state(self, **dims: int) -> StaticState:
        """See `engine.Engine`. Raises ValueError for a batch other than 1."""
        check_state_dims(self.spec, dims)
        if dims != {"batch": 1}:
            raise ValueError(f"state dimensions are {dims}; the static graphs of {self.spec.file} have batch = 1")
        return StaticState(self, self._sizes[-1])

    def run(
        self, feeds: Mapping[str, Array | Resident], state: State | None = None, resident: Collection[str] = ()
    ) -> dict[str, Any]:
        """See `engine.Engine`. Resident results are arrays, as on the CPU."""
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
    """Return the axis that is neither fixed nor the batch."""
    return next(n for n, d in enumerate(tensor.shape) if isinstance(d, str) and d != "batch")
