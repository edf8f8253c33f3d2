"""ONNX Runtime: a session, state that stays where it is, and input and output buffers bound once for each set of shapes.

The token loop calls `run` about ten times a frame with the same few shapes, so a call must cost little beside the graph itself.
A state therefore keeps, for each combination of input shapes that it has met, a `_Plan`: arrays of those shapes, shared with
ONNX Runtime and bound together with the state. A later call with the same shapes copies its feeds into the arrays and runs.

    feeds ──copy──► plan arrays ─► session ─► plan arrays ──► results (overwritten by the next call with these shapes)
                          state ─►         ─► the same state, written in place

The same buffer is bound as a state's input and output. A graph must therefore not read a state input after it has written that
state's output; a TensorScatter whose result feeds the attention is of that kind, and then copies nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .base import Array, Engine, State
from .errors import FishrtError, GraphError, ProviderError
from .ort_session import Opened, open_session
from .providers import default_threads, import_onnxruntime, resolve_provider
from .spec import GraphSpec, TensorSpec
from .specialise import ColumnInputs

_DTYPES = {"tensor(float)": "float32", "tensor(double)": "float64", "tensor(float16)": "float16", "tensor(bool)": "bool"}
_DTYPES |= {f"tensor({sign}int{bits})": f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}
_PLANS_KEPT = 4
"""Sets of shapes a state remembers. A loop has two or three; a prefill's is never met again and is the first to go."""


def open_engine(
    path: Path,
    spec: GraphSpec,
    *,
    provider: str = "auto",
    threads: int | None = None,
    specialise: bool = False,
    identity: str | None = None,
) -> Engine:
    """Loads the graph file `path` and checks that it is what `spec` says.

    provider: "auto" or one of the names in `providers.PROVIDERS`. threads: None means the physical cores.
    specialise: run what is fastest here in place of the operators in the file; see `specialise.py`. Quantised weights are then
    multiplied in integers, and calls must write consecutive columns at their own positions.
    identity: a hash that stands for graph and weights; what was specialised is kept on disk under it, see `graph_cache`.
    Raises ProviderError for a provider that is unknown or not here, GraphError for a file that is missing, damaged or different.
    """
    name = resolve_provider(provider)
    if threads is not None and threads < 1:
        raise ProviderError(f"threads is {threads}; at least 1 is needed", hint="leave it out to use the physical cores")
    if not path.is_file():
        raise GraphError(f"there is no graph file {path}")
    try:
        opened = open_session(path, threads=threads or default_threads(), specialised=specialise, identity=identity)
    except Exception as error:  # ONNX Runtime's exceptions have no common base
        if _is_memory_error(error):
            raise _out_of_memory(f"the weights of {path.name}") from None
        raise GraphError(f"{path} cannot be loaded: {error}", hint="copy or export the bundle again") from None
    differences = [*_inconsistencies(spec), *_differences(spec, opened.session)]
    if differences:
        raise GraphError(f"{path} is not the graph that was described: " + "; ".join(differences), hint="export it again")
    return OrtEngine(import_onnxruntime(), opened, spec, name)


@dataclass(frozen=True, slots=True)
class _Plan:
    """Bound buffers for one combination of shapes."""

    binding: Any
    feeds: tuple[tuple[str, Array], ...]
    results: dict[str, Array]
    allocated: tuple[tuple[int, str], ...]
    """Outputs (position in the binding, name) of a size that no input tells: ONNX Runtime allocates them anew in each run."""


class OrtState:
    """State tensors in numpy arrays that ONNX Runtime reads and writes in place. See `base.State`."""

    def __init__(self, owner: OrtEngine, dims: Mapping[str, int], arrays: dict[str, Array]) -> None:
        self.owner = owner
        self.dims = dict(dims)
        self.arrays = arrays
        self.plans: OrderedDict[tuple[tuple[int, ...], ...], _Plan] = OrderedDict()

    def read(self, name: str) -> Array:
        """A copy of one state tensor, by its input name."""
        return self.arrays[name].copy()

    def write(self, name: str, array: Array) -> None:
        """See `base.State.write`. Raises ValueError for an array that does not fit."""
        into = self.arrays[name]
        if (
            array.dtype != into.dtype
            or array.ndim != into.ndim
            or any(a > b for a, b in zip(array.shape, into.shape, strict=True))
        ):
            raise ValueError(f"{name} is {into.dtype} {list(into.shape)}; {array.dtype} {list(array.shape)} does not fit into it")
        into[tuple(map(slice, array.shape))] = array

    def grow(self, **dims: int) -> None:
        """See `base.State.grow`. Raises ValueError for a dimension that is unknown or would shrink."""
        if bad := [f"{name} = {size}" for name, size in dims.items() if size < self.dims.get(name, size + 1)]:
            raise ValueError(f"state dimensions cannot become {', '.join(bad)}; they are {self.dims}")
        larger = self.owner.new_state(**{**self.dims, **dims})
        for name, array in self.arrays.items():
            larger.arrays[name][tuple(map(slice, array.shape))] = array
        self.dims, self.arrays = larger.dims, larger.arrays
        self.plans.clear()


class OrtEngine:
    """One graph in one ONNX Runtime session. See `base.Engine`."""

    def __init__(self, ort: Any, opened: Opened, spec: GraphSpec, provider: str) -> None:
        self.spec = spec
        self.provider = provider
        self._ort = ort
        self._session = opened.session
        self._columns = opened.columns
        self._feeds = spec.feeds
        self._dtypes = {t.name: np.dtype(t.dtype) for t in spec.feeds}
        self._results = spec.results
        self._result_names = [t.name for t in spec.results]

    def new_state(self, **dims: int) -> OrtState:
        """State of zeros. `dims` gives every symbolic dimension of the state tensors; ValueError for any other set of names."""
        wanted = {d for t in self.spec.state_tensors for d in t.shape if isinstance(d, str)}
        if dims.keys() != wanted:
            raise ValueError(f"state dimensions are {_names(dims)}; {self.spec.file} needs {_names(wanted)}")
        if small := [f"{name} = {size}" for name, size in dims.items() if size < 1]:
            raise ValueError(f"state dimensions must be at least 1: {', '.join(small)}")
        try:
            arrays = {t.name: np.zeros(t.resolve(dims), t.dtype) for t in self.spec.state_tensors}
        except (MemoryError, ValueError):  # numpy says ValueError for a size beyond the address space
            sizes = ", ".join(f"{name} = {size}" for name, size in dims.items())
            raise _out_of_memory(f"the state of {self.spec.file} at {sizes}") from None
        return OrtState(self, dims, arrays)

    def run(self, feeds: Mapping[str, Array], state: State | None = None) -> dict[str, Array]:
        """See `base.Engine.run`. Results of a call with a state live in buffers that its next call may overwrite."""
        if not self.spec.states:
            if state is not None:
                raise ValueError(f"{self.spec.file} carries no state, but one was given")
            self._check(feeds, {})
            return dict(zip(self._result_names, self._call(self._session.run, self._result_names, dict(feeds)), strict=True))
        if not isinstance(state, OrtState) or state.owner is not self:
            raise ValueError(f"{self.spec.file} needs a state that its own new_state made")
        if self._columns is not None and self._must_part(feeds, self._columns):
            return self._row_by_row(feeds, state)
        plan = self._plan(feeds, state)
        for name, buffer in plan.feeds:
            buffer[...] = feeds[name]
        for _, name in plan.allocated:
            plan.binding.bind_output(name)
        self._call(self._session.run_with_iobinding, plan.binding)
        results = dict(plan.results)
        if plan.allocated:
            outputs = plan.binding.get_outputs()
            results |= {name: outputs[n].numpy() for n, name in plan.allocated}
        return results

    def _must_part(self, feeds: Mapping[str, Array], columns: ColumnInputs) -> bool:
        """Whether this call is one that GroupQueryAttention refuses: several rows of several columns each, after others."""
        positions, index = feeds.get(columns.position_ids), feeds.get(columns.write_index)
        return positions is not None and index is not None and min(positions.shape) > 1 and bool(index.any())

    def _row_by_row(self, feeds: Mapping[str, Array], state: OrtState) -> dict[str, Array]:
        """Each row of the batch by itself, on its part of the state. All feeds, states and results begin with the batch."""
        self._check(feeds, state.dims)
        parts = []
        for row in range(state.dims["batch"]):
            only = slice(row, row + 1)
            alone = OrtState(self, {**state.dims, "batch": 1}, {name: array[only] for name, array in state.arrays.items()})
            results = self.run({name: np.ascontiguousarray(array[only]) for name, array in feeds.items()}, alone)
            parts.append({name: array.copy() for name, array in results.items()})
        return {name: np.concatenate([part[name] for part in parts]) for name in self._result_names}

    def _plan(self, feeds: Mapping[str, Array], state: OrtState) -> _Plan:
        """The plan for the shapes of `feeds`. Shapes that were met before were checked then; dtypes are checked always."""
        try:
            shapes = tuple([feeds[name].shape for name in self._dtypes])
            as_before = all(feeds[name].dtype == dtype for name, dtype in self._dtypes.items()) and len(feeds) == len(shapes)
            plan = state.plans.get(shapes) if as_before else None
        except (KeyError, AttributeError):
            plan = None
        if plan is None:
            dims = self._check(feeds, state.dims)
            plan = state.plans[shapes] = self._bind(dims, state)
            if len(state.plans) > _PLANS_KEPT:
                state.plans.popitem(last=False)
        state.plans.move_to_end(shapes)
        return plan

    def _bind(self, dims: Mapping[str, int], state: OrtState) -> _Plan:
        binding = self._session.io_binding()
        share = self._ort.OrtValue.ortvalue_from_numpy
        feeds = {t.name: np.zeros(t.resolve(dims), t.dtype) for t in self._feeds}
        results, allocated = {}, []
        for name, array in feeds.items():
            binding.bind_ortvalue_input(name, share(array))
        for n, t in enumerate(self._results):
            if all(isinstance(d, int) or d in dims for d in t.shape):
                results[t.name] = np.zeros(t.resolve(dims), t.dtype)
                binding.bind_ortvalue_output(t.name, share(results[t.name]))
            else:
                binding.bind_output(t.name)  # gives it its position
                allocated.append((n, t.name))
        for pair in self.spec.states:
            value = share(state.arrays[pair.input])
            binding.bind_ortvalue_input(pair.input, value)
            binding.bind_ortvalue_output(pair.output, value)
        return _Plan(binding, tuple(feeds.items()), results, tuple(allocated))

    def _check(self, feeds: Mapping[str, Array], known: Mapping[str, int]) -> dict[str, int]:
        """The size of every symbolic dimension of the feeds and the state. Raises ValueError for feeds that do not fit."""
        wanted = [t.name for t in self._feeds]
        if feeds.keys() != set(wanted):
            raise ValueError(f"feeds are {_names(feeds)}; {self.spec.file} needs {_names(wanted)}")
        dims = dict(known)
        for t in self._feeds:
            array = feeds[t.name]
            if not isinstance(array, np.ndarray) or array.dtype != t.dtype:
                raise ValueError(f"{t.name} is {getattr(array, 'dtype', type(array).__name__)}; {self.spec.file} needs {t.dtype}")
            fits = array.ndim == len(t.shape) and array.size > 0
            if fits:
                sizes = zip(t.shape, array.shape, strict=True)
                fits = all((d if isinstance(d, int) else dims.setdefault(d, size)) == size for d, size in sizes)
            if not fits:
                where = ", ".join(f"{name} = {size}" for name, size in dims.items())
                shape = ", ".join(str(d) for d in t.shape)
                raise ValueError(
                    f"{t.name} has shape {list(array.shape)}; {self.spec.file} needs [{shape}] with {where or 'sizes > 0'}"
                )
        return dims

    def _call(self, run: Any, *arguments: Any) -> Any:
        try:
            return run(*arguments)
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            if _is_memory_error(error):
                raise _out_of_memory(f"a run of {self.spec.file}") from None
            raise GraphError(f"{self.spec.file} failed: {error}") from error


def _inconsistencies(spec: GraphSpec) -> list[str]:
    """What is wrong with the description itself."""
    inputs, outputs = ({t.name: t for t in tensors} for tensors in (spec.inputs, spec.outputs))
    wrong = []
    for pair in spec.states:
        before, after = inputs.get(pair.input), outputs.get(pair.output)
        if before is None or after is None:
            wrong.append(f"the state {pair.input} → {pair.output} names a tensor that is not listed")
        elif (before.dtype, before.shape) != (after.dtype, after.shape):
            wrong.append(f"the state {pair.input} → {pair.output} changes its dtype or shape")
    return wrong


def _differences(spec: GraphSpec, session: Any) -> list[str]:
    """How the file's tensors differ from the described ones.

    The names of symbolic dimensions are not compared, since ONNX Runtime renames those that it computes; sizes are.
    """
    found = []
    for kind, described, nodes in (
        ("input", spec.inputs, session.get_inputs()),
        ("output", spec.outputs, session.get_outputs()),
    ):
        in_file = {node.name: node for node in nodes}
        by_name = {t.name: t for t in described}
        found += [f"{kind} {name} is missing" for name in by_name if name not in in_file]
        found += [f"{kind} {name} is not described" for name in in_file if name not in by_name]
        for name in by_name.keys() & in_file.keys():
            found += _tensor_differences(f"{kind} {name}", by_name[name], in_file[name].type, in_file[name].shape)
    return sorted(found)


def _tensor_differences(what: str, described: TensorSpec, file_type: str, file_shape: Sequence[int | str | None]) -> list[str]:
    dtype = _DTYPES.get(file_type, file_type)
    if dtype != described.dtype:
        return [f"{what} is {dtype} instead of {described.dtype}"]
    same = len(file_shape) == len(described.shape) and all(
        in_file == wanted or not isinstance(in_file, int) for in_file, wanted in zip(file_shape, described.shape, strict=True)
    )
    return [] if same else [f"{what} has shape {list(file_shape)} instead of {list(described.shape)}"]


def _names(names: Mapping[str, object] | Sequence[str] | set[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def _is_memory_error(error: Exception) -> bool:
    """ONNX Runtime reports memory that it cannot get as a RuntimeException with one of these texts."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or "bad_alloc" in text or "failed to allocate" in text or "bad allocation" in text


def _out_of_memory(what: str) -> FishrtError:
    return FishrtError(f"not enough memory for {what}", hint="use smaller inputs, or a machine with more memory")
