"""Fixtures that several test files share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from fishrt.bundle import Bundle
    from tiny import GoldenModel


@pytest.fixture(scope="session")
def golden() -> Path:
    """The golden vectors of S2-Pro: `lm/` and `codec/`, each with a checkpoint in the official layout."""
    folder = Path(os.environ.get("FISHRT_GOLDEN", Path(__file__).parent / "golden")) / "s2-pro"
    if not (folder / "lm/meta.json").is_file() or not (folder / "codec/meta.json").is_file():
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


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, golden_model: GoldenModel) -> Bundle:
    """The bundle exported from it. Not to be written to: copy it."""
    return golden_model.bundle
