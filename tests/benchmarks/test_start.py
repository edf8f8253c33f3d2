"""benchmarks/start.py: every step, bundle and checkout takes its turn. No test asserts a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

import start
from harness import HERE, ProcessError


def test_a_record_of_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "STEPS", {name: start.STEPS[name] for name in ("python", "fishrt")})
    options = ["--rounds", "1", "--bundle-rounds", "1", "--output", str(tmp_path / "start.json")]
    done = CliRunner().invoke(start.main, [*options, *[str(HERE.parent)] * 2])
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "start.json").read_text())
    assert {side: [set(turn) for turn in own] for side, own in record["turns"].items()} == {
        side: [{"python", "fishrt"}] for side in ("0", "1")
    }
    assert all(set(medians) == {"0", "1"} for medians in record["seconds"].values())
    assert str(HERE.parent) not in json.dumps(record)
    (minnow,) = record["bundles"].values()
    for (turn,) in minnow["turns"].values():
        assert turn["bundle_bytes"] > 5_000_000
        for begun in start.STARTS:
            assert set(turn[begun]) == set(start.PARTS)
            assert turn[begun]["all"] == pytest.approx(sum(turn[begun][part] for part in start.PARTS[:-3]), abs=1e-3)
            assert 0 < turn[begun]["own_bytes"] < turn[begun]["peak_bytes"]


def test_another_package_than_that_of_the_checkout_is_told(tmp_path: Path) -> None:
    with pytest.raises(ProcessError, match="which is not in"):
        start.starts(tmp_path, HERE.parent / "runtime/fishrt/minnow")


def test_a_start_that_fails_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ProcessError, match="printed nothing: import nobody"):
        start.seconds(HERE.parent, "import nobody")
    assert "ModuleNotFoundError" in capfd.readouterr().err
