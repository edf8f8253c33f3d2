"""The record of the job engine: it is written, and its ratios are those of its times."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

import scale


def test_the_record(tmp_path: Path) -> None:
    small = ["--rows", "2", "--rounds", "1", "--many", "20", "--threads", "1", "--output", str(tmp_path / "scale.json")]
    done = CliRunner().invoke(scale.main, small)
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "scale.json").read_text())
    assert list(found["speaking"]) == ["loop", "render", "render_batch_8"]
    loop, batch = found["speaking"]["loop"], found["speaking"]["render_batch_8"]
    assert loop["faster_than_loop"] == 1
    assert abs(batch["faster_than_loop"] - loop["row_ms"] / batch["row_ms"]) < 0.05
    assert found["engine"]["rows"] == 20
    assert found["engine"]["share_of_a_row"] > 0
