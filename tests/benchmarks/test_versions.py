"""benchmarks/versions.py: the comparison of a checkout with itself, and what it refuses. No test asserts a time."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

pytest.importorskip("torch", reason="needs the export extra")

import versions
from fishrt.bundle.folder import embedded_bundle
from harness import HERE, ProcessError
from record import commit

ROOT = HERE.parent
FIGURES = {*versions.FIGURES, *versions.EXPORT_FIGURES}


def run_versions(*arguments: object) -> Any:
    return CliRunner().invoke(versions.main, [str(a) for a in arguments])


def test_a_checkout_says_the_same_as_itself(tiny_checkpoint, tiny_bundle, tmp_path):
    """The bundles exist already, since an export takes most of a minute; of minnow's, the time of the export is known."""
    checkpoints, bundles = tmp_path / "checkpoints", tmp_path / "bundles" / (commit(ROOT) or "none")
    checkpoints.mkdir(), bundles.mkdir(parents=True)
    (checkpoints / "s2").symlink_to(tiny_checkpoint)
    (bundles / "s2-fp32").symlink_to(tiny_bundle.path)
    (bundles / "minnow-fp32").symlink_to(embedded_bundle())
    (bundles / "minnow-fp32.json").write_text(json.dumps({"seconds": 2.0, "peak_memory_bytes": 10}))
    places = ("--checkpoints", checkpoints, "--bundles", bundles.parent, "--output", tmp_path / "record.json")
    done = run_versions("--smoke", "--size", "s2", "--precision", "fp32", *places, ROOT, ROOT)
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["benchmark"] == "versions"
    assert record["method"]["commits"] == dict.fromkeys(("before", "after"), bundles.name)
    assert {"cpu", "cpu_features", "versions"} <= record["environment"].keys()
    assert set(record["families"]) == {"minnow", "s2"}
    for family, found in record["families"].items():
        assert found["same_codes"] == {"0": True, "1": True, "2": True}
        assert {side: len(own) for side, own in found["turns"].items()} == {"before": 1, "after": 1}
        whole = {name for name, values in found["compared"].items() if set(values) == {"before", "after", "ratio"}}
        assert whole == (FIGURES if family == "minnow" else set(versions.FIGURES))
    assert record["families"]["minnow"]["compared"]["export_s"] == {"before": 2.0, "after": 2.0, "ratio": 1.0}
    assert record["families"]["minnow"]["export"]["after"]["forms"] == embedded_forms()
    assert str(tmp_path) not in json.dumps(record)
    assert str(Path.home()) not in json.dumps(record)


def embedded_forms() -> int:
    return len(
        [
            form
            for graph in json.loads((embedded_bundle() / "manifest.json").read_text())["graphs"].values()
            for form in graph["forms"]
        ]
    )


def turn(frame_ms: float, *codes: int) -> dict[str, Any]:
    return {
        "cold": {"load_s": 4.0, "load_peak_bytes": 100},
        "cached": {
            "load_s": 1.0,
            "load_peak_bytes": 10,
            "frame_ms": frame_ms,
            "first_audio_ms": 9.0,
            "codes": [[[n]] for n in codes],
        },
    }


def test_ratios_are_of_medians_and_codes_are_compared_by_seed():
    turns = {"before": [turn(10, 1, 2, 3), turn(20, 1, 2, 3), turn(90, 1, 2, 3)], "after": [turn(30, 1, 5, 3), turn(30, 1, 2, 4)]}
    found = versions.summarise({"before": {"seconds": 8.0}, "after": {"seconds": 6.0}}, turns)
    assert found["compared"]["frame_ms"] == {"before": 20, "after": 30, "ratio": 1.5}
    assert found["compared"]["cold_load_peak_bytes"]["ratio"] == 1
    assert found["compared"]["export_s"] == {"before": 8, "after": 6, "ratio": 0.75}
    assert found["same_codes"] == {0: True, 1: False, 2: False}
    assert "codes" not in turns["after"][0]["cached"]


def git(folder: Path, *arguments: str) -> None:
    settings = ("-c", "user.name=nobody", "-c", "user.email=nobody@example.org", "-c", "commit.gpgsign=false")
    subprocess.run(["git", "-C", str(folder), *settings, *arguments], check=True, capture_output=True)


def test_checkouts_that_no_commit_names_are_refused(tmp_path):
    outside, changed = tmp_path / "outside", tmp_path / "changed"
    outside.mkdir(), changed.mkdir()
    git(changed, "init")
    (changed / "file").write_text("committed")
    git(changed, "add", "file"), git(changed, "commit", "-m", "one")
    assert len(commit(changed) or "") >= 7
    (changed / "file").write_text("changed")
    for folder in (outside, changed):
        done = run_versions(folder, folder)
        assert done.exit_code == 2
        assert f"{folder} is no checkout of git, or has uncommitted changes" in done.output


def test_packages_from_elsewhere_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(versions, "python", lambda *_, **__: json.dumps({"package": "/elsewhere/fishrt/__init__.py"}))
    with pytest.raises(ProcessError, match=r"measured /elsewhere/fishrt/.*, which is not in"):
        versions.Side(tmp_path, "1234567", tmp_path / "cache", 0.0).turn(tmp_path, 1, 4)


def test_a_process_has_the_packages_of_its_checkout_and_its_own_cache(tmp_path):
    side = versions.Side(tmp_path, "1234567", tmp_path / "cache", 1e12)
    printed = side.run("-c", "import os; print(os.environ['PYTHONPATH'], os.environ['FISHRT_CACHE'], sep=os.pathsep)")
    layers = [tmp_path / layer for layer in ("engines", "runtime", "export")]
    assert printed.strip().split(os.pathsep) == [*map(str, (HERE, *layers, tmp_path / "cache"))]
