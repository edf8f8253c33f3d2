"""Options and the place of a bundle: what is wrong with them is found without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fishrt_export.errors import ExportError
from fishrt_export.options import Lora, Options, with_targets
from fishrt_export.place import check_out

UNKNOWN = [
    ({"head": "half"}, "unknown head 'half'", "audio, full"),
    ({"family": "1.6"}, r"unknown family '1\.6'", "s2, s1, 1.5, 1.4, 1.2"),
    ({"precision": "int3"}, "unknown precision 'int3'", "fp32, fp16, int8, int8-rows, int4"),
    ({"keep": {"slow_ar.*": "bf16"}}, "unknown precision 'bf16'", "fp32, fp16, int8, int8-rows, int4"),
    ({"targets": ["tflite"]}, "unknown target 'tflite'", "cpu, cuda, tensorrt, coreml"),
]


@pytest.mark.parametrize(("options", "says", "hint"), UNKNOWN)
def test_an_unknown_name(options: dict[str, Any], says: str, hint: str) -> None:
    with pytest.raises(ExportError, match=says) as caught:
        Options(**options)
    assert caught.value.hint == f"choose one of: {hint}"


def test_options_in_words(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").touch()
    options = Options("full", None, Lora(tmp_path / "a.ckpt", 16.0), "int4", {"fast_ar.*": "fp32"}, ["cpu", "cuda"], True)
    assert options.words == "int4, fast_ar.*=fp32, codec in 8 bits, full head, LoRA a.ckpt, alpha 16, graphs for cuda"
    assert Options().words == "fp32"


def test_further_targets_in_words() -> None:
    assert with_targets("fp32", ["cpu"]) == "fp32"
    assert with_targets("int8, graphs for cuda, coreml, full head", ["coreml", "tensorrt"]) == (
        "int8, full head, graphs for cuda, coreml, tensorrt"
    )
    assert with_targets("", ["cuda"]) == "graphs for cuda"  # a bundle of schema 3 may have no words


def test_a_mount_point_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_out(tmp_path / "new")
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path)
    with pytest.raises(ExportError, match="is a mount point") as caught:
        check_out(tmp_path)
    assert str(tmp_path / "bundle") in str(caught.value.hint)
    check_out(tmp_path / "new")


MISTAKES = {
    "none out": "none does not exist",
    "taken/x out": "lacks config.json, a tokenizer",
    "taken out": "is not a complete checkpoint: it lacks config.json, weights",
    "none taken": "taken exists and is not empty",
    "none no/out": "there is no folder",
    "none out --family 1.6": "unknown family '1.6'",
    "none out --keep fast_ar.*=int5": "unknown precision 'int5'",
    "none out --lora none --lora-alpha 16": "none is not a file",
}


def test_mistakes_are_told_without_torch(tmp_path: Path) -> None:
    """In a process that cannot import torch."""
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/x").touch()
    code = f"""
import sys
sys.modules["torch"] = None
from click.testing import CliRunner
from fishrt.cli import main
for line in {list(MISTAKES)!r}:
    print(CliRunner().invoke(main, ["export", *line.split()]).stderr.splitlines()[0])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    for told, (line, says) in zip(done.stdout.splitlines(), MISTAKES.items(), strict=True):
        assert says in told, line
