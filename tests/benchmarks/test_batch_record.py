"""The record of batches: every size, and its growth over a batch of one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

import batch


def test_growth_is_over_a_batch_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = iter([(10, 18, 30, 40), (12, 20, 36, 48), (11, 19, 33, 44)])

    def python(*_: object) -> str:
        rows = zip(batch.SIZES, next(speeds), strict=True)
        return json.dumps({"batches": [{"rows": size, "frames_per_s": speed} for size, speed in rows]})

    monkeypatch.setattr(batch, "python", python)
    done = CliRunner().invoke(batch.main, ["--output", str(tmp_path / "batch.json")])
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "batch.json").read_text())["batches"]["minnow"]
    assert found["1"] == {"frames_per_s": 11, "growth": 1.0}
    assert found["8"] == {"frames_per_s": 44, "growth": 4.0}
