"""Fixtures that several test files share."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from fishrt.bundle import Bundle
    from tiny import GoldenModel


@pytest.fixture(scope="session")
def golden() -> Path:
    """The golden vectors of S2-Pro: `lm/` and `codec/`, each with a checkpoint in the official layout."""
    return find_golden(os.environ.get("FISHRT_GOLDEN"))


def find_golden(chosen: str | None) -> Path:
    """Skips where there are none by default, but fails where there are none though a folder was `chosen`."""
    folder = (Path(chosen) if chosen is not None else Path(__file__).parent / "golden") / "s2-pro"
    if not (folder / "lm/meta.json").is_file() or not (folder / "codec/meta.json").is_file():
        if chosen is not None:
            pytest.fail(f"no golden vectors in {folder}, which FISHRT_GOLDEN names")
        pytest.skip(f"no golden vectors in {folder}; set FISHRT_GOLDEN")
    return folder


@pytest.fixture(scope="session")
def golden_model(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> GoldenModel:
    """Modules and exported graphs of the golden checkpoints."""
    pytest.importorskip("torch", reason="needs the export extra")
    from tiny import GoldenModel

    return GoldenModel(golden, tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_checkpoint(golden_model: GoldenModel) -> Path:
    """A whole checkpoint folder. Not to be written to: copy it."""
    if not golden_model.fits:
        pytest.skip("the golden language model and codec have different numbers of codebooks")
    return golden_model.checkpoint


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of it, to be written to."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "in/checkpoint"))


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, golden_model: GoldenModel) -> Bundle:
    """The bundle exported from the tiny checkpoint. Not to be written to: copy it."""
    return golden_model.bundle
