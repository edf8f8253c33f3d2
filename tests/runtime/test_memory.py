"""Memory that a bundle needs, and errors before the work if it is too little."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import fishrt.tts
from fishrt import TTS
from fishrt.bundle.memory import check_memory, estimate
from fishrt.errors import BundleError, FishrtError
from fishrt_engines.machine import available_memory
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
    [({"memory": -1}, "memory of fast_ar is -1 bytes"), ({"precision": "int5"}, "of fast_ar is 'int5'; .* int8-rows, int4")],
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
