"""Facts about the CPU and the memory of this machine."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fishrt_engines import machine

CPUS = {
    "AVX2 only": ("model name\t: An old Xeon\nflags\t\t: fpu sse4_2 avx avx2 fma", "An old Xeon", ["avx2"]),
    "AVX-512": (
        "model\t\t: 85\nmodel name\t: A Skylake\nflags\t\t: avx2 avx512f avx512bw avx512dq",
        "A Skylake",
        ["avx2", "avx512f"],
    ),
    "VNNI": (
        "model name\t: An EPYC\nflags\t\t: avx2 avx512f avx512_bf16 avx512_vnni",
        "An EPYC",
        ["avx2", "avx512f", "avx512_vnni"],
    ),
    "VNNI without AVX-512": ("model name\t: A Core\nflags\t\t: avx2 avx_vnni", "A Core", ["avx2", "avx_vnni"]),
    "AMX": (
        "model name\t: A Xeon\nflags\t\t: avx2 avx512f avx512_vnni amx_bf16 amx_tile amx_int8",
        "A Xeon",
        ["avx2", "avx512f", "avx512_vnni", "amx_int8", "amx_bf16"],
    ),
    "arm64": (
        "processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd evtstrm asimdhp asimddp i8mm\nCPU part\t: 0xd0c",
        "aarch64",
        ["asimd", "asimddp", "i8mm"],
    ),
    "nothing": ("", "aarch64", []),
}


@pytest.fixture(autouse=True)
def _no_facts_of_another_cpu() -> Iterator[None]:
    machine._cpu_field.cache_clear()
    yield
    machine._cpu_field.cache_clear()


@pytest.mark.parametrize("kind", CPUS)
def test_name_and_features_of_a_cpu(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text, name, features = CPUS[kind]
    monkeypatch.setattr(machine, "_read", lambda path: text if path == Path("/proc/cpuinfo") else "")
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert (machine.cpu_name(), machine.cpu_features()) == (name, features)


def test_cpus_of_other_features_have_other_identities(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache of packed weights uses the identity as key."""
    found = set()
    for text, *_ in CPUS.values():
        monkeypatch.setattr(machine, "_read", lambda path, text=text: text)
        machine._cpu_field.cache_clear()
        found.add(machine.cpu_identity())
    assert len(found) == len(CPUS)


def test_the_peak_of_a_process_is_not_that_of_its_parent() -> None:
    peak = machine.peak_memory()
    if peak is None:
        pytest.skip("this system does not report its memory")
    held = np.ones(50_000_000, np.float32)  # 200 MB
    assert machine.peak_memory() > held.nbytes  # type: ignore[operator]
    code = "from fishrt_engines.machine import peak_memory; print(peak_memory())"
    child = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 5e6 < child < 150e6


def test_the_peak_stays_when_memory_is_given_back() -> None:
    np.ones(50_000_000, np.float32)
    peak = machine.peak_memory()
    assert peak is None or peak > 200e6


def files_of(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


SYSTEM = {"proc/meminfo": "MemTotal: 8000000 kB\nMemAvailable:    4000000 kB\nSwapFree: 1000 kB\n"}


def test_what_the_system_can_free(tmp_path: Path) -> None:
    assert machine.available_memory(tmp_path) is None
    assert machine.available_memory(files_of(tmp_path, SYSTEM)) == 4_001_000 * 1024


def test_limits_of_control_groups(tmp_path: Path) -> None:
    """The smallest limit of a group and its parents counts; the page cache can be dropped."""
    files = {
        "proc/self/cgroup": "0::/user/work\n",
        "sys/fs/cgroup/user/memory.max": "3000000\n",
        "sys/fs/cgroup/user/memory.current": "2500000\n",
        "sys/fs/cgroup/user/memory.stat": "anon 5\ninactive_file 100000\nactive_file 400000\n",
        "sys/fs/cgroup/user/work/memory.max": "max\n",
        "sys/fs/cgroup/user/work/memory.current": "1\n",
    }
    assert machine.available_memory(files_of(tmp_path, {**SYSTEM, **files})) == 1_000_000


def test_limits_inside_a_container(tmp_path: Path) -> None:
    """The path of the group may be the host's; version 1 of control groups writes a large number for no limit."""
    files = {
        "proc/self/cgroup": "4:cpu,memory:/outside/x\n1:cpu:/\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "2000000\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "5000000\n",
        "sys/fs/cgroup/memory/outside/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/memory/outside/memory.usage_in_bytes": "1\n",
    }
    assert machine.available_memory(files_of(tmp_path, {**SYSTEM, **files})) == 0


def test_a_limit_of_address_space(tmp_path: Path) -> None:
    files = {
        "proc/self/limits": "Limit  Soft Limit  Hard Limit  Units\nMax address space         3000000      unlimited     bytes\n",
        "proc/self/status": "Name: x\nVmSize:\t   1000 kB\n",
    }
    assert machine.available_memory(files_of(tmp_path, {**SYSTEM, **files})) == 3_000_000 - 1_024_000
