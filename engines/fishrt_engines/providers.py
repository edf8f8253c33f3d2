"""What this machine can run graphs on, which of it "auto" takes, and the text of `fishrt doctor`.

An asked-for provider is used or refused, never replaced: only "auto" may choose, and it logs what it chose.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import platform
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType

from .errors import ProviderError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Provider:
    """One way to run a graph."""

    name: str
    extra: str
    """The pip extra of fishrt that installs its libraries."""
    ort_name: str | None
    """What ONNX Runtime calls it; None for an engine of its own."""
    supported: bool
    """Whether this version of fishrt runs graphs with it."""
    platform: str | None = None
    """The only `sys.platform` that it exists on; None for all."""

    @property
    def exists_here(self) -> bool:
        """Whether it could be installed on this machine."""
        return self.platform in (None, sys.platform)


_PROVIDERS = (
    Provider("cpu", "cpu", "CPUExecutionProvider", supported=True),
    Provider("cuda", "cuda", "CUDAExecutionProvider", supported=False),
    Provider("trt", "trt", None, supported=False),
    Provider("coreml", "cpu", "CoreMLExecutionProvider", supported=False, platform="darwin"),
)
PROVIDERS = {provider.name: provider for provider in _PROVIDERS}
"""By the name that a user gives, in the order of `fishrt doctor`."""


def resolve_provider(name: str) -> str:
    """The provider that will run: `name` itself, or the choice that "auto" makes. Raises ProviderError."""
    if name == "auto":
        log.info('provider "auto" chose "cpu"; this machine has: %s', ", ".join(installed_providers()) or "none")
        name = "cpu"
    provider = PROVIDERS.get(name)
    if provider is None:
        raise ProviderError(f"unknown provider {name!r}", hint=f"known providers: auto, {', '.join(PROVIDERS)}")
    if name == "cpu":
        import_onnxruntime()
    elif not provider.exists_here:
        raise ProviderError(f"provider {name!r} exists on macOS only", hint='use provider "cpu"')
    elif name not in installed_providers():
        raise ProviderError(
            f"provider {name!r} is not available: its libraries are not installed here, and this version runs on cpu only",
            hint=f'pip install "fishrt[{provider.extra}]" brings them; until a version uses them, take provider "cpu"',
        )
    elif not provider.supported:
        raise ProviderError(
            f"provider {name!r} is installed, but this version of fishrt runs on cpu only",
            hint='use provider "cpu", or a later version of fishrt',
        )
    return name


def installed_providers() -> list[str]:
    """The known providers whose libraries are installed, by name."""
    try:
        present = set(import_onnxruntime().get_available_providers())
    except ProviderError:
        present = set()
    if importlib.util.find_spec("tensorrt"):
        present.add(None)
    return [p.name for p in _PROVIDERS if p.ort_name in present]


def import_onnxruntime() -> ModuleType:
    """The onnxruntime module. Raises ProviderError naming the extra where it is missing or broken."""
    try:
        import onnxruntime
    except ImportError as error:
        raise ProviderError(f"ONNX Runtime cannot be loaded: {error}", hint='pip install "fishrt[cpu]"') from None
    return onnxruntime  # type: ignore[no-any-return]


def default_threads() -> int:
    """Threads for one graph: the physical cores that this process may use, and no more than its container's share of time.

    A second thread on the same core gains nothing in matrix products, and threads beyond the share make every call wait.
    """
    allowed = _allowed_cpus()
    cores = {_siblings(cpu) for cpu in allowed}
    return max(1, min(len(cores), _container_share() or len(cores)))


def doctor() -> str:
    """What `fishrt doctor` prints about this machine: lines of `name: value`."""
    lines = [
        f"system: {platform.platform()}",
        f"python: {platform.python_version()}",
        f"cpu: {_cpu_name()}",
        f"cores: {default_threads()} used by default, {len(_allowed_cpus())} logical allowed",
        f"cpu features: {' '.join(_cpu_features()) or 'unknown'}",
        f"memory: {_memory()}",
    ]
    for name in ("numpy", "onnxruntime", "onnxruntime-gpu", "tensorrt-cu13", "soundfile", "tokenizers"):
        lines.append(f"{name}: {_version(name) or 'not installed'}")
    installed = installed_providers()
    for provider in _PROVIDERS:
        if not provider.exists_here:
            state = "exists on macOS only"
        elif provider.name in installed:
            state = "ready" if provider.supported else "installed; not used by this version of fishrt"
        else:
            state = f'not installed (pip install "fishrt[{provider.extra}]")'
        lines.append(f"provider {provider.name}: {state}")
    return "\n".join(lines)


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _allowed_cpus() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _siblings(cpu: int) -> str:
    """A key that is the same for the hardware threads of one core; each is its own core where the system does not say."""
    return _read(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")) or str(cpu)


def _container_share() -> int | None:
    """CPUs' worth of time that the control group grants, rounded up; None without a limit."""
    quota, _, period = (_read(Path("/sys/fs/cgroup/cpu.max")) or "").partition(" ")
    return -(-int(quota) // int(period)) if quota.isdigit() and period.isdigit() else None


def _cpu_field(field: str) -> str:
    for line in (_read(Path("/proc/cpuinfo")) or "").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == field:
            return value.strip()
    return ""


def _cpu_name() -> str:
    return _cpu_field("model name") or platform.processor() or platform.machine()


def _cpu_features() -> list[str]:
    """The instruction sets that ONNX Runtime's kernels make use of."""
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "sve")
    present = set((_cpu_field("flags") or _cpu_field("Features")).split())
    return [name for name in wanted if name in present]


def _memory() -> str:
    for line in (_read(Path("/proc/meminfo")) or "").splitlines():
        if line.startswith("MemTotal:"):
            return f"{int(line.split()[1]) / 2**20:.1f} GiB"
    return "unknown"


def cpu_identity() -> str:
    """What kernels and packed weights depend on: architecture, model and instruction sets of the CPU."""
    return f"{platform.machine()} {_cpu_name()} {_cpu_field('flags') or _cpu_field('Features')}"


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
