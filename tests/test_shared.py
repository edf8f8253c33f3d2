"""Sharing of traces between tests: equal modules have the same key, different ones have different keys."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from shared import identity, make_once
from tiny import GoldenModel


def build(models: Callable[[Path], GoldenModel], golden: Path) -> torch.nn.Module:
    return next(job for job in models(golden).codec.jobs() if job.role == "codec_decode").build()


def test_equal_modules_have_one_key(models: Callable[[Path], GoldenModel], s2_golden: Path) -> None:
    first, second = build(models, s2_golden), build(models, s2_golden)
    with torch.no_grad():
        for parameter in second.parameters():
            if not parameter.is_meta:
                parameter.add_(1)
    assert identity(first) == identity(second) is not None


def test_all_else_counts(models: Callable[[Path], GoldenModel], s2_golden: Path) -> None:
    conv = torch.nn.Conv1d(2, 2, 3)
    keys = {identity(conv)}
    for change in ({"dilation": (2,)}, {"table": torch.zeros(2)}, {"table": torch.ones(2)}, {"forward_kind": "same"}):
        vars(conv).update(change)
        keys.add(identity(conv))
    conv.to("meta")
    assert len(keys | {identity(conv)}) == 6
    other = build(models, s2_golden)
    vars(other)["extra"] = 1
    assert identity(other) != identity(build(models, s2_golden))


def test_a_class_of_a_test_has_no_key() -> None:
    class Local(torch.nn.Module):
        pass

    assert identity(Local()) is None


def test_what_was_not_finished_is_not_used(tmp_path: Path) -> None:
    def broken(folder: Path) -> None:
        folder.mkdir()
        (folder / "half").touch()
        raise ValueError

    with pytest.raises(ValueError, match=r"^$"):
        make_once(tmp_path / "made", broken)
    assert not (tmp_path / "made").exists()
    made = make_once(tmp_path / "made", Path.mkdir)
    assert list(made.iterdir()) == []
    assert make_once(tmp_path / "made", broken) == made
