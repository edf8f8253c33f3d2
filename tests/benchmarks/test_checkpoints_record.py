"""The record of exports of other forms: checkpoints of each form are read, and the smallest run has what the record needs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

import checkpoints
from fishrt_export.checkpoint.forms.describe import describe
from fishrt_export.sources.language_model import open_language_model
from full_size import write_checkpoint
from full_size.forms import FORMS, write_form

FORM = {
    "gptq": ("GPTQ, act-order", 4, "groups of 32", 0.2),
    "q8_0": ("GGUF of s2.cpp, Q8_0", 8, "blocks of 32", 0.01),
    "nf4": ("bitsandbytes NF4, nested scales", 4, "blocks of 64", 0.15),
    "fp8": ("FP8 (e4m3)", 8, "rows", 0.04),
}
"""Of each form, what is recognised, and the largest distance from the official weights."""


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("s2", tmp_path_factory.mktemp("official"), tiny=True)


@pytest.mark.parametrize("form", FORMS)
def test_a_form_of_the_official_layout_is_read(official: Path, tmp_path: Path, form: str) -> None:
    write_form(form, official, tmp_path / form)
    found = describe(tmp_path / form)
    title, bits, group, largest = FORM[form]
    assert (found.form, found.bits, found.group) == (title, bits, group)
    assert found.codec == "codec.pth"
    source = open_language_model(tmp_path / form)
    assert source.problems() == []
    assert source.config == open_language_model(official).config
    assert 0 < checkpoints.distance(tmp_path / form, official) < largest


@pytest.mark.slow
@pytest.mark.thorough
def test_a_record(tmp_path: Path) -> None:
    output = tmp_path / "record.json"
    sides = ("official", "nf4", "nf4-int8")
    done = CliRunner().invoke(checkpoints.main, ["--smoke", "--output", str(output), *[f"--side={side}" for side in sides]])
    assert done.exit_code == 0, done.output
    record = json.loads(output.read_text())
    assert record["peak_ratios"].keys() == record["sides"].keys() == set(sides)
    assert record["sides"]["nf4"]["stored"]["slow_ar"].startswith("nf4 (")
    assert record["sides"]["nf4-int8"]["speaking"]["frame"]["median_ms"] > 0
    assert str(tmp_path) not in output.read_text()
