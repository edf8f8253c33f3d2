"""Memory that a bundle needs, memory of a machine, and errors before the work if it is too little."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import fishrt.tts
from fishrt import TTS
from fishrt.bundle.memory import available_memory, check_memory, estimate
from fishrt.errors import BundleError, FishrtError
from helpers_cli import run
from helpers_text import bundle_folder, manifest


def test_the_need_of_a_bundle() -> None:
    memory = {"slow_ar": 5000, "fast_ar": 300, "codec_encode": 70, "codec_decode": 20}
    graphs = manifest().graphs
    content = manifest(graphs={role: replace(graph, memory=memory[role]) for role, graph in graphs.items()})
    need = estimate(content)
    assert (need.speaking, need.encoding, need.disk) == (5320, 70, 0)
    assert need.cache == 2 * 1000 * 8 * 4
    fast = content.graphs["fast_ar"]
    fixed = replace(fast.spec, inputs=(replace(fast.spec.inputs[1], shape=("batch", 2, 9, 8)),))
    assert estimate(replace(content, graphs={**content.graphs, "fast_ar": replace(fast, spec=fixed)})).state == 2 * 9 * 8 * 4


@pytest.mark.parametrize(
    ("wrong", "says"),
    [({"memory": -1}, "memory of fast_ar is -1 bytes"), ({"precision": "int5"}, "precision of fast_ar is 'int5'; .* int8, int4")],
)
def test_a_manifest_with_another_memory_or_precision(wrong: dict[str, Any], says: str) -> None:
    graphs = manifest().graphs
    with pytest.raises(BundleError, match=says):
        manifest(graphs={**graphs, "fast_ar": replace(graphs["fast_ar"], **wrong)}).check()


def test_too_little_is_refused_with_both_figures() -> None:
    check_memory(2_000_000_000, "this", available=2_000_000_000)
    check_memory(2_000_000_000, "this", available=None if available_memory() is None else 1 << 62)
    with pytest.raises(FishrtError, match=r"this needs about 2\.00 GB of memory, and 1\.90 GB are free") as caught:
        check_memory(2_000_000_000, "this", available=1_900_000_000)
    assert "less precision" in str(caught.value.hint)


def test_a_bundle_that_does_not_fit_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = bundle_folder(tmp_path / "bundle")
    graphs = {role: replace(graph, memory=1 << 60) for role, graph in bundle.manifest.graphs.items()}
    large = replace(bundle, manifest=replace(bundle.manifest, graphs=graphs))
    TTS.load(bundle)
    with pytest.raises(FishrtError, match="speaking with test needs about"):
        TTS.load(large)
    monkeypatch.setattr(fishrt.tts, "check_memory", lambda *_: None)
    TTS.load(large)


def test_inspect_tells_the_need(tmp_path: Path) -> None:
    bundle_folder(tmp_path / "bundle")
    shown = run("inspect", tmp_path / "bundle")
    assert shown.exit_code == 0
    assert "memory        3.0 kB of weights to speak, 1.0 kB more to make voices" in shown.output
    assert "64.0 kB for 1,000 positions of context" in shown.output
    assert '"memory_need": {"disk": ' in run("inspect", tmp_path / "bundle", "--json").output


# ---- machines, as their files describe them


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


SYSTEM = {"proc/meminfo": "MemTotal: 8000000 kB\nMemAvailable:    4000000 kB\nSwapFree: 1000 kB\n"}


def test_what_the_system_can_free(tmp_path: Path) -> None:
    assert available_memory(tmp_path) is None
    assert available_memory(machine(tmp_path, SYSTEM)) == 4_001_000 * 1024


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
    assert available_memory(machine(tmp_path, {**SYSTEM, **files})) == 1_000_000


def test_limits_inside_a_container(tmp_path: Path) -> None:
    """The path of the group may be the host's; version 1 of control groups writes a large number for no limit."""
    files = {
        "proc/self/cgroup": "4:cpu,memory:/outside/x\n1:cpu:/\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "2000000\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "5000000\n",
        "sys/fs/cgroup/memory/outside/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/memory/outside/memory.usage_in_bytes": "1\n",
    }
    assert available_memory(machine(tmp_path, {**SYSTEM, **files})) == 0


def test_a_limit_of_address_space(tmp_path: Path) -> None:
    files = {
        "proc/self/limits": "Limit  Soft Limit  Hard Limit  Units\nMax address space         3000000      unlimited     bytes\n",
        "proc/self/status": "Name: x\nVmSize:\t   1000 kB\n",
    }
    assert available_memory(machine(tmp_path, {**SYSTEM, **files})) == 3_000_000 - 1_024_000
