"""ONNX Runtime engine: a session, state updated in place, and input and output buffers bound once for each set of shapes.

The token loop calls `run` about ten times a frame with the same few shapes, so the overhead of a call must be small.
A state therefore keeps a `_Plan` for each recent combination of input shapes: tensors of those shapes in the session's memory,
bound together with the state. A later call with the same shapes copies its feeds into them and runs.

    feeds ──copy──► plan's tensors ─► session ─► plan's tensors ──► results (overwritten by the next call with these shapes)
                          state ─►            ─► the same state, written in place

The same tensor is bound as a state's input and output. A graph must therefore not read a state input after it has written that
state's output. A TensorScatter whose result feeds the attention meets this condition, and then copies nothing.

On a device, results are copied to the host, or stay there for another engine. A captured plan (a CUDA graph) needs fixed
addresses: feeds that are already on the device are therefore copied into the plan's own tensors, too, which costs microseconds.
The first call of such a plan runs the graph several times; see `Opened.run_options` for the graphs that permit this.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..engine import (
    Array,
    ColumnInputs,
    GraphSpec,
    Resident,
    State,
    Traits,
    check_feeds,
    check_growth,
    check_state_dims,
    check_written,
    is_constant,
    names,
)
from ..errors import GraphError
from .session import Opened, is_memory_error, out_of_memory
from .tensors import HostMemory, HostTensor, Place, Tensor

log = logging.getLogger(__name__)

_PLANS_KEPT = 4
"""Plans that a state keeps beside captured ones, which ONNX Runtime never frees; least recently used first out."""
_IDLE_KEPT = 4
"""Released states of a device that wait for the next of their size, with their captured calls. Growth releases two or three."""
_CAPTURES_TRIED = 2
"""Attempts to capture a call: another program may have disturbed the first."""
_NOT_CAPTURED = -1
"""ONNX Runtime's graph id for a run that is neither captured nor replayed."""


@dataclass(eq=False)
class _Plan:
    """Bound tensors for one combination of shapes."""

    binding: Any
    feeds: list[tuple[str, Tensor]]
    results: list[tuple[str, Tensor]]
    host_results: dict[str, Array]
    """The results of every call, if they are arrays on the host."""
    allocated: list[tuple[int, str]]
    """Outputs (position in the binding, name) whose size the inputs do not determine: ONNX Runtime allocates them in each run."""
    rows: Array | None
    """`ColumnInputs.rows`, int32 [], if it is an input. All rows of the cache, unless a call sets another number."""
    graph: int
    """Id of the captured graph, or _NOT_CAPTURED."""
    constants: dict[str, Any]
    """Constant feeds that are already on the device."""
    tries: int = 1
    """Attempts to capture it so far."""


class _Carried:
    """The places of a state's tensors, and the plans bound to them."""

    def __init__(self, dims: Mapping[str, int], places: Mapping[str, Place]) -> None:
        self.dims, self.places = dict(dims), dict(places)
        self.plans: OrderedDict[tuple[tuple[int, ...], ...], _Plan] = OrderedDict()
        self._parts: dict[tuple[int, int], _Carried] = {}

    def part(self, first: int, count: int) -> _Carried:
        """Return the same for some rows of the batch. Their plans are kept, too."""
        if (first, count) not in self._parts:
            places = {name: place.part(first, count) for name, place in self.places.items()}
            self._parts[first, count] = _Carried({**self.dims, "batch": count}, places)
        return self._parts[first, count]

    @property
    def captured(self) -> bool:
        """Whether a call is captured."""
        own = any(plan.graph != _NOT_CAPTURED for plan in self.plans.values())
        return own or any(part.captured for part in self._parts.values())


class _Held:
    """The memory of a state, returned to its engine when the state and its rows are deleted."""

    def __init__(self, owner: OrtEngine, tensors: dict[str, Tensor], carried: _Carried) -> None:
        self.owner, self.tensors, self.carried = owner, tensors, carried

    def __del__(self) -> None:
        self.owner.take_back(self.tensors, self.carried)


class OrtState:
    """State tensors, or rows of them, that ONNX Runtime reads and writes in place. See `engine.State`."""

    def __init__(self, held: _Held, rows: tuple[int, int] | None = None) -> None:
        """rows: the first, and their count; None: all."""
        self.owner, self._held, self._rows = held.owner, held, rows

    @property
    def carried(self) -> _Carried:
        """The places of the tensors, and the plans bound to them."""
        return self._held.carried if self._rows is None else self._held.carried.part(*self._rows)

    @property
    def dims(self) -> Mapping[str, int]:
        """See `engine.State.dims`."""
        return self.carried.dims

    def tensor(self, name: str) -> Tensor:
        """Return one state tensor, by its input name."""
        whole = self._held.tensors[name]
        return whole if self._rows is None else whole.part(*self._rows)

    def row(self, n: int) -> OrtState:
        """See `engine.State.row`. Raises ValueError for a row that there is not."""
        return self._part(n, 1)

    def rows(self, count: int) -> OrtState:
        """See `engine.State.rows`. Raises ValueError for rows that there are not."""
        return self._part(0, count)

    def _part(self, first: int, count: int) -> OrtState:
        if not 0 <= first < first + count <= self.dims["batch"]:
            raise ValueError(f"rows {first} to {first + count - 1} are not among the {self.dims['batch']} of the state")
        return self if count == self.dims["batch"] else OrtState(self._held, ((self._rows or (0, 0))[0] + first, count))

    def copy_rows(self, source: State, row: int, length: int) -> None:
        """See `engine.State.copy_rows`. Raises ValueError for a state of another engine, or sizes that do not fit."""
        into = self.row(row)
        if not isinstance(source, OrtState) or source.owner is not self.owner or source.dims["batch"] != 1:
            raise ValueError(f"rows of {self.owner.spec.file} are copied from a state of one row of the same engine")
        dims = {name: 1 if name == "batch" else length for name in self.dims}
        if any(size > min(source.dims[name], self.dims[name]) for name, size in dims.items()):
            raise ValueError(f"{length} positions do not fit: from {dict(source.dims)} to {dict(into.dims)}")
        with self.owner.allocating(f"a copy of {length} positions"):
            for t in self.owner.spec.state_tensors:
                into.tensor(t.name).lead(source.tensor(t.name), t.resolve(dims))

    def read(self, name: str) -> Array:
        """See `engine.State.read`."""
        return self.tensor(name).numpy()

    def write(self, name: str, array: Array) -> None:
        """See `engine.State.write`. Raises ValueError for an array that does not fit."""
        into = self.tensor(name)
        check_written(name, into.dtype.name, into.shape, array)
        with self.owner.allocating(f"{array.nbytes / 1e6:,.0f} MB of {name}"):
            into.lead(array)

    def grow(self, **dims: int) -> None:
        """See `engine.State.grow`. Raises ValueError for a dimension that is unknown or would shrink, and for rows of a state."""
        check_growth(self.dims, dims)
        if self._rows is not None:
            raise ValueError("rows of a state do not grow by themselves")
        held, larger = self._held, self.owner.new_state(**{**self.dims, **dims})._held
        with self.owner.allocating("a larger state"):
            for name, tensor in held.tensors.items():
                larger.tensors[name].lead(tensor)
        # `larger` takes the old tensors, and returns them to the owner when it is deleted.
        held.tensors, larger.tensors = larger.tensors, held.tensors
        held.carried, larger.carried = larger.carried, held.carried


class OrtEngine:
    """One graph in one ONNX Runtime session. See `engine.Engine`."""

    def __init__(self, opened: Opened, spec: GraphSpec, provider: str) -> None:
        self.spec = spec
        self.provider = provider
        self._session, self._memory, self._columns = opened.session, opened.memory, spec.columns
        self._options = opened.run_options
        self._captures = opened.run_options is not None
        self._dtypes = {t.name: np.dtype(t.dtype) for t in spec.feeds}
        self._result_names = [t.name for t in spec.results]
        self._stateless = _Carried({}, {})
        self._graph_ids = itertools.count(1)
        self._idle: deque[tuple[dict[str, Tensor], _Carried]] = deque(maxlen=_IDLE_KEPT)
        self._dropped: list[int] = []
        """Ids of captured graphs whose plans were deleted."""
        self._on_device = not isinstance(self._memory, HostMemory)
        self.traits = Traits(few_sizes=self._captures)

    def new_state(self, **dims: int) -> OrtState:
        """See `engine.Engine.new_state`. Raises ValueError if `dims` does not name exactly the state's symbolic dimensions."""
        check_state_dims(self.spec, dims)
        for idle in list(self._idle):
            if idle[1].dims == dims:
                with contextlib.suppress(ValueError):  # another thread has taken it
                    self._idle.remove(idle)
                    with self._memory.lock:
                        for tensor in idle[0].values():
                            tensor.clear()
                    return OrtState(_Held(self, *idle))
        nbytes = sum(t.nbytes(dims) for t in self.spec.state_tensors)
        sizes = ", ".join(f"{name} = {size}" for name, size in dims.items())
        with self.allocating(f"the state of {self.spec.file} at {sizes} ({nbytes / 1e6:,.0f} MB)"):
            made = {
                t.name: self._memory.zeros(t.resolve(dims), t.as_read if self._on_device else t.dtype, t.dtype)
                for t in self.spec.state_tensors
            }
        return OrtState(_Held(self, made, _Carried(dims, {name: tensor.place for name, tensor in made.items()})))

    def take_back(self, tensors: dict[str, Tensor], carried: _Carried) -> None:
        """Keep the tensors and captured calls of a deleted state for the next one of its size.

        A capture takes longer than many calls, and ONNX Runtime frees none before the session ends.
        """
        if carried.captured:
            self._idle.append((tensors, carried))

    def run(
        self, feeds: Mapping[str, Array | Resident], state: State | None = None, resident: Collection[str] = ()
    ) -> dict[str, Any]:
        """See `engine.Engine.run`. Results of a call with a state live in tensors that its next call may overwrite.

        A result whose size the inputs do not determine is an array, even if it is named in `resident`.
        """
        if resident and (unknown := set(resident) - set(self._result_names)):
            raise ValueError(f"{names(unknown)} cannot stay on the device; the results are {names(self._result_names)}")
        if self.spec.states and (not isinstance(state, OrtState) or state.owner is not self):
            raise ValueError(f"{self.spec.file} needs a state that its own new_state made")
        if not self.spec.states and state is not None:
            raise ValueError(f"{self.spec.file} carries no state, but one was given")
        carried = state.carried if isinstance(state, OrtState) else None
        with self._memory.lock:
            return self._run(feeds, carried, resident)

    @contextlib.contextmanager
    def allocating(self, what: str) -> Iterator[None]:
        """Hold the device, and raise FishrtError for the various errors of numpy and ONNX Runtime for too little memory."""
        with self._memory.lock:
            try:
                yield
            except Exception as error:  # ONNX Runtime's exceptions have no common base
                if not is_memory_error(error):
                    raise
                raise out_of_memory(what, self.provider) from None

    def _run(self, feeds: Mapping[str, Any], carried: _Carried | None, resident: Collection[str]) -> dict[str, Any]:
        if carried is not None:
            if self._columns is not None and self._must_part(feeds, self._columns):
                return self._row_by_row(feeds, carried, resident)
            return self._run_bound(feeds, carried, resident)
        if self._options is not None or resident or any(self._memory.holds(feed) for feed in feeds.values()):
            return self._run_bound(feeds, self._stateless, resident)
        self._check(feeds, {})
        return dict(zip(self._result_names, self._call(self._session.run, self._result_names, dict(feeds)), strict=True))

    def _run_bound(self, feeds: Mapping[str, Any], carried: _Carried, resident: Collection[str]) -> dict[str, Any]:
        plan = self._plan(feeds, carried)
        for name, tensor in plan.feeds:
            feed = feeds[name]
            if feed is not plan.constants.get(name):
                tensor.put(feed)
                if self._on_device and is_constant(feed):
                    plan.constants[name] = feed
                else:
                    plan.constants.pop(name, None)
        for _, name in plan.allocated:
            plan.binding.bind_output(name, self._memory.device)
        if plan.rows is not None and self._columns is not None:
            length = feeds[self._columns.position_ids].shape[1]
            if length > 1:
                plan.rows[...] = np.max(_array(feeds[self._columns.write_index])) + length
        if self._options is None:
            self._call(self._session.run_with_iobinding, plan.binding)
        else:
            self._launch(plan, self._options)
        results = dict(plan.host_results) or {name: t.result(resident=name in resident) for name, t in plan.results}
        if plan.allocated:
            outputs = plan.binding.get_outputs()
            results |= {name: outputs[n].numpy() for n, name in plan.allocated}
        return results

    def _launch(self, plan: _Plan, options: Callable[[int], Any]) -> None:
        run = self._session.run_with_iobinding
        if plan.graph != _NOT_CAPTURED:
            try:
                run(plan.binding, options(plan.graph))
                return
            except Exception as error:  # ONNX Runtime's exceptions have no common base
                if is_memory_error(error):
                    raise out_of_memory(f"a run of {self.spec.file}", self.provider) from None
                if plan.tries < _CAPTURES_TRIED:
                    self._dropped.append(plan.graph)
                    plan.tries, plan.graph = plan.tries + 1, next(self._graph_ids)
                    self._launch(plan, options)
                    return
                log.warning("%s runs node by node, which is slower: it cannot be captured (%s)", self.spec.file, error)
                self._captures, plan.graph = False, _NOT_CAPTURED
        self._call(run, plan.binding, options(_NOT_CAPTURED))

    def _must_part(self, feeds: Mapping[str, Any], columns: ColumnInputs) -> bool:
        """Return whether GroupQueryAttention refuses this call: several columns for several rows that already have some."""
        positions, index = feeds.get(columns.position_ids), feeds.get(columns.write_index)
        return positions is not None and index is not None and min(positions.shape) > 1 and bool(_array(index).any())

    def _row_by_row(self, feeds: Mapping[str, Any], carried: _Carried, resident: Collection[str]) -> dict[str, Any]:
        """Run each row of the batch alone, on its part of the state. The batch is the first axis of all tensors."""
        self._check(feeds, carried.dims)
        arrays = {name: _array(feed) for name, feed in feeds.items()}
        parts = []
        for n in range(carried.dims["batch"]):
            only = {name: np.ascontiguousarray(array[n : n + 1]) for name, array in arrays.items()}
            parts.append(self._run_bound(only, carried.part(n, 1), ()))
        whole = {name: np.concatenate([part[name] for part in parts]) for name in self._result_names}
        return {name: self._memory.upload(array) if name in resident else array for name, array in whole.items()}

    def _plan(self, feeds: Mapping[str, Any], carried: _Carried) -> _Plan:
        """Return the plan for the shapes of `feeds`. Shapes are checked once, for a new plan; types in every call."""
        try:
            given = [feeds[name] for name in self._dtypes]
            shapes = tuple([feed.shape for feed in given])
            as_before = len(feeds) == len(shapes) and all(map(self._takes, given, self._dtypes.values()))
            plan = carried.plans.get(shapes) if as_before else None
        except (KeyError, AttributeError):
            plan = None
        if plan is None:
            dims = self._check(feeds, carried.dims)
            with self.allocating(f"a call of {self.spec.file}"):
                plan = carried.plans[shapes] = self._bind(dims, carried)
            for passing in [key for key, kept in carried.plans.items() if kept.graph == _NOT_CAPTURED][:-_PLANS_KEPT]:
                del carried.plans[passing]
        carried.plans.move_to_end(shapes)
        return plan

    def _bind(self, dims: Mapping[str, int], carried: _Carried) -> _Plan:
        while self._dropped:  # ONNX Runtime 1.31 nevertheless keeps a CUDA graph until its session ends
            self._session.release_captured_graph(self._dropped.pop())
        binding = self._session.io_binding()
        feeds = [(t.name, self._memory.zeros(t.resolve(dims), t.dtype, t.dtype)) for t in self.spec.feeds]
        results, allocated = [], []
        for name, tensor in feeds:
            tensor.place.bind_input(binding, name)
        for n, t in enumerate(self.spec.results):
            if all(isinstance(d, int) or d in dims for d in t.shape):
                results.append((t.name, self._memory.zeros(t.resolve(dims), t.dtype, t.dtype)))
                results[-1][1].place.bind_output(binding, t.name)
            else:
                binding.bind_output(t.name)  # reserves its position
                allocated.append((n, t.name))
        for pair in self.spec.states:
            carried.places[pair.input].bind_input(binding, pair.input)
            carried.places[pair.input].bind_output(binding, pair.output)
        rows, step = None, True
        if self._columns is not None:
            step = dict(feeds)[self._columns.position_ids].shape[1] == 1
            if self._columns.rows is not None and self._columns.cache is not None:
                rows = np.array(carried.places[self._columns.cache].shape[2], np.int32)
                HostTensor(rows).place.bind_input(binding, self._columns.rows)
        host_results = {} if self._on_device else {name: tensor.result(resident=False) for name, tensor in results}
        plan = _Plan(binding, feeds, results, host_results, allocated, rows, _NOT_CAPTURED, {})
        if self._captures and step:
            plan.graph = next(self._graph_ids)
            weakref.finalize(plan, self._dropped.append, plan.graph).atexit = False
        return plan

    def _takes(self, feed: Any, dtype: np.dtype[Any]) -> bool:
        return (isinstance(feed, np.ndarray) or self._memory.holds(feed)) and feed.dtype == dtype

    def _check(self, feeds: Mapping[str, Any], known: Mapping[str, int]) -> dict[str, int]:
        """Call `check_feeds`, and check that this engine can read each feed. Raises ValueError otherwise."""
        dims = check_feeds(self.spec, feeds, known)
        if foreign := [name for name, dtype in self._dtypes.items() if not self._takes(feeds[name], dtype)]:
            raise ValueError(f"{names(foreign)} of {self.spec.file} must be arrays, or results that stayed on the same device")
        return dims

    def _call(self, run: Any, *arguments: Any) -> Any:
        try:
            return run(*arguments)
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            if is_memory_error(error):
                raise out_of_memory(f"a run of {self.spec.file}", self.provider) from None
            raise GraphError(f"{self.spec.file} failed: {error}") from error


def _array(feed: Any) -> Any:
    return feed if isinstance(feed, np.ndarray) else feed.numpy()
