"""Plans, the engines that TensorRT has built, in the cache: see `cache`.

    folders.cache_folder() / plans / hash of the key / engine.plan, entry.json

A plan holds one graph with its weights, and runs only with one version of TensorRT on one model of GPU. The entry's key says all
of that, and is compared before a plan is loaded. A plan that does not fit is neither used nor rebuilt.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .. import cache
from ..engine import GraphSpec, StatePair, TensorSpec
from ..errors import FishrtError, ProviderError
from ..folders import cache_folder
from .device import Device

PLAN = "engine.plan"
LOWERING = 2
"""Version of the lowering, which `fishrt_export.targets.tensorrt` does; part of a plan's key."""
PRECISIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""Precisions by name, and their element types."""
_MEMORY_CLASS = 4 << 30
"""Bytes to which a device's memory is rounded: one model of GPU exists with different memory sizes."""
LARGER = "give less at once, or build a plan for more positions or a larger batch"

Range = tuple[int, int, int]
"""Smallest, usual and largest size of a symbolic dimension."""


@dataclass(frozen=True, slots=True)
class Profile:
    """A range of sizes that a plan is optimised for. A plan may have several."""

    name: str
    dims: Mapping[str, Range]
    """Ranges by name of the dimension."""

    def holds(self, dims: Mapping[str, int]) -> bool:
        """Return whether these sizes are in its ranges."""
        return all(least <= dims[name] <= most for name, (least, _, most) in self.dims.items() if name in dims)


@dataclass(frozen=True, slots=True)
class LoweringOptions:
    """The options with which a portable graph is prepared for TensorRT."""

    max_len: int | None
    """Rows of KV caches whose number the graph leaves open."""
    precision: str
    """A key of PRECISIONS."""
    fp32_attention: bool
    """Whether attention is computed in float32 nevertheless. Recommended with fp16."""
    primitive_attention: bool
    """Whether attention is taken apart at once, without trying the forms that need a fused kernel."""


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine and software that a plan is tied to."""

    tensorrt: str
    gpu: str
    compute_capability: str
    memory_class: int
    """Bytes of the device's memory, rounded."""
    system: str
    lowering: int
    """Version of fishrt's lowering."""


@dataclass(frozen=True, slots=True)
class ColumnWrites:
    """The names that place a call's writes to its caches. TensorRT does not check the bounds itself."""

    write_index: str
    """The input with the first written row of each sequence: int64 [batch]."""
    length: str
    """The dimension of a call's rows."""
    cache: str
    """One of the caches, an input: [batch, heads, rows, head_dim]."""


@dataclass(frozen=True, slots=True)
class PlanKey:
    """All that a plan depends on."""

    graph: str
    """A hash of the portable graph and its weights."""
    machine: Machine
    lowering: LoweringOptions
    workspace: int | None
    """Largest workspace of kernels in bytes; None: all the device's memory."""
    profiles: tuple[Profile, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """A complete plan on disk, and its description."""

    path: Path
    key: PlanKey
    spec: GraphSpec
    """Description of the lowered graph: its state may have other dtypes, and its cache length is fixed."""
    writes: ColumnWrites | None
    attention: str
    """The form of attention with which TensorRT could build it: fused, decomposable or primitive."""

    def is_shorter_than(self, other: Plan) -> bool:
        """Return whether it differs from another plan of its graph in shorter caches only."""
        mine, its = self.key.lowering, other.key.lowering
        alike = replace(mine, max_len=None) == replace(its, max_len=None) and self.key.workspace == other.key.workspace
        return alike and (mine.max_len or 0) < (its.max_len or 0)

    def profile_for(self, dims: Mapping[str, int]) -> int:
        """Return the index of the profile for a call of these sizes. Raises FishrtError if there is none."""
        profiles = self.key.profiles
        found = next((n for n, profile in enumerate(profiles) if profile.holds(dims)), None)
        if found is None:
            takes = [", ".join(f"{name} of {low} to {high}" for name, (low, _, high) in p.dims.items()) for p in profiles]
            given = ", ".join(f"{name} of {dims[name]}" for name in profiles[0].dims if name in dims)
            raise FishrtError(
                f"the TensorRT plan of {self.spec.file} takes {'; or '.join(takes)}; this call has {given}", hint=LARGER
            )
        return found


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """The graph and the options of one build."""

    path: Path
    """The file of the portable graph."""
    spec: GraphSpec
    """Its description, with its identity."""
    lowering: LoweringOptions
    profiles: tuple[Profile, ...]
    workspace: int | None = None
    """Largest workspace of kernels in bytes; None: all the device's memory."""


def plan_folder() -> Path:
    """Return the folder of plans. Raises FishrtError where there is no folder for caches."""
    folder = cache_folder()
    if folder is None:
        raise FishrtError("there is no folder for TensorRT plans: this user has no home", hint="set FISHRT_CACHE to a folder")
    return folder / "plans"


def machine_of(version: str, device: Device) -> Machine:
    """Return this machine with this version of TensorRT."""
    _, total = device.memory()
    major, minor = device.compute_capability
    rounded = round(total / _MEMORY_CLASS) * _MEMORY_CLASS
    return Machine(version, device.name, f"{major}.{minor}", rounded, f"{platform.system()} {platform.machine()}", LOWERING)


def find_plans(path: Path, spec: GraphSpec, machine: Machine) -> list[Plan]:
    """Return the plans for a graph on this machine: the one that was built or requested last, then shorter ones, longest first.

    Shorter ones differ in the length of caches only. path: of the graph file, for messages: the graph is known by its identity.
    Raises ValueError without identity; ProviderError, with the reasons, if no plan fits.
    """
    if not spec.identity:
        raise ValueError(f"the plan of {spec.file} is found by the identity of the graph, and its description has none")
    found: list[Plan] = []
    why = []
    for folder in cache.entries(plan_folder()):
        try:
            entry = cache.read(folder)
            plan = _plan(entry)
        except (OSError, ValueError, KeyError, TypeError) as error:
            why.append(f"{folder} is damaged ({error})")
            continue
        if plan.key.graph != spec.identity:
            continue
        if differences := list(_differences(plan.key.machine, machine)):
            why.append(f"the one in {folder} {'; '.join(differences)}")
        elif fault := entry.fault():
            why.append(f"the one in {folder} {fault}")
        elif not found or plan.is_shorter_than(found[0]):
            found.append(plan)
    if not found:
        raise ProviderError(f"there is no TensorRT plan of {path.name} for this machine" + (f": {'; '.join(why)}" if why else ""))
    return sorted(found, key=lambda plan: plan.key.lowering.max_len or 0, reverse=True)


def kept_plan(key: PlanKey) -> Plan | None:
    """Return the plan of exactly this key, which becomes the newest; None if it is missing or damaged."""
    entry = cache.find(plan_folder(), asdict(key))
    if entry is None:
        return None
    try:
        return _plan(entry)
    except (ValueError, KeyError, TypeError) as error:
        cache.discard(entry.folder, f"is damaged ({error})")
        return None


def keep_plan(key: PlanKey, spec: GraphSpec, writes: ColumnWrites | None, attention: str, serialized: Any) -> Plan:
    """Write a plan. serialized: a buffer. Raises FishrtError, and leaves no files, if it cannot be written."""

    def write(folder: Path) -> Any:
        with (folder / PLAN).open("wb") as file:
            file.write(memoryview(serialized))
        return {"spec": asdict(spec), "writes": writes and asdict(writes), "attention": attention}

    try:
        entry = cache.keep(plan_folder(), asdict(key), write)
    except OSError as error:
        raise FishrtError(
            f"the plan cannot be written to {plan_folder()}: {error.strerror or error}",
            hint="make room there, or set FISHRT_CACHE to another folder",
        ) from None
    return Plan(entry.folder / PLAN, key, spec, writes, attention)


def _plan(entry: cache.Entry) -> Plan:
    """Return the plan of an entry. Raises ValueError, KeyError or TypeError for a description that is none of a plan."""
    key, writes = entry.key, entry.facts["writes"]
    profiles = tuple(
        Profile(p["name"], {d: (int(a), int(b), int(c)) for d, (a, b, c) in p["dims"].items()}) for p in key["profiles"]
    )
    machine, lowering = Machine(**key["machine"]), LoweringOptions(**key["lowering"])
    parsed = PlanKey(key["graph"], machine, lowering, key["workspace"], profiles)
    described, placed = _spec(entry.facts["spec"]), None if writes is None else ColumnWrites(**writes)
    return Plan(entry.folder / PLAN, parsed, described, placed, entry.facts["attention"])


def _spec(data: Mapping[str, Any]) -> GraphSpec:
    tensors = [tuple(TensorSpec(t["name"], t["dtype"], tuple(t["shape"])) for t in data[kind]) for kind in ("inputs", "outputs")]
    states = tuple(StatePair(**pair) for pair in data["states"])
    return GraphSpec(data["file"], tensors[0], tensors[1], states, identity=data["identity"])


def _differences(built: Machine, here: Machine) -> Iterator[str]:
    """Yield the reasons why a plan cannot be used here."""
    if built.tensorrt != here.tensorrt:
        yield f"was built by TensorRT {built.tensorrt}, and this is {here.tensorrt}"
    if (built.gpu, built.compute_capability) != (here.gpu, here.compute_capability):
        ours = f"{here.gpu} (compute capability {here.compute_capability})"
        yield f"was built on {built.gpu} (compute capability {built.compute_capability}), and this is {ours}"
    elif built.memory_class != here.memory_class:
        yield f"was built on a device with {built.memory_class >> 30} GiB, and this has {here.memory_class >> 30}"
    if built.system != here.system:
        yield f"was built on {built.system}, and this is {here.system}"
    if built.lowering != here.lowering:
        yield "was built by another version of fishrt, which prepared graphs otherwise"
