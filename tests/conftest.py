"""Fixtures that several test files share."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fishrt_engines.providers import find_obstacle

if TYPE_CHECKING:
    from fishrt.bundle import Bundle
    from tiny import GoldenModel

FAMILIES = ("s2-pro", "s1-mini", "fish-1.5", "fish-1.4", "fish-1.2")
CHOSEN = os.environ.get("FISHRT_GOLDEN")


def golden_root(chosen: str | None) -> Path:
    """The folder that holds one folder of vectors for each family."""
    return Path(chosen) if chosen is not None else Path(__file__).parent / "golden"


def present_families(chosen: str | None) -> list[str]:
    """The families that there are vectors of."""
    return [family for family in FAMILIES if (golden_root(chosen) / family).is_dir()]


def find_golden(chosen: str | None, family: str) -> Path:
    """Skips where there are none of the family, but fails where they are not whole, or a `chosen` folder has none at all."""
    folder = golden_root(chosen) / family
    if chosen is not None and not present_families(chosen):
        pytest.fail(f"no golden vectors in {golden_root(chosen)}, which FISHRT_GOLDEN names")
    if not folder.is_dir():
        pytest.skip(f"no golden vectors in {folder}; set FISHRT_GOLDEN")
    if lacking := [half for half in ("lm", "codec") if not (folder / half / "meta.json").is_file()]:
        pytest.fail(f"{folder} lacks the vectors of {' and '.join(lacking)}")
    return folder


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where several processes share the tests, those of one family go to one of them, which exports its graphs for all."""
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        of_s2 = "s2_golden" in getattr(item, "fixturenames", ())
        item.add_marker(pytest.mark.xdist_group(params.get("golden", "s2-pro" if of_s2 else item.path.name)))


@pytest.fixture(scope="session", params=present_families(CHOSEN) or FAMILIES)
def golden(request: pytest.FixtureRequest) -> Path:
    """The golden vectors of each family: `lm/` and `codec/`, each with a checkpoint in the official layout."""
    return find_golden(CHOSEN, request.param)


@pytest.fixture(scope="session")
def s2_golden() -> Path:
    """Those of S2-Pro, for tests of what does not differ between families."""
    return find_golden(CHOSEN, "s2-pro")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], GoldenModel]:
    """The one model of each golden folder."""
    pytest.importorskip("torch", reason="needs the export extra")
    from tiny import GoldenModel

    return cache(lambda folder: GoldenModel(folder, tmp_path_factory.mktemp(folder.name)))


@pytest.fixture(scope="session")
def golden_model(models: Callable[[Path], GoldenModel], golden: Path) -> GoldenModel:
    """Modules and exported graphs of the golden checkpoints, of each family."""
    return models(golden)


@pytest.fixture(scope="session")
def s2_model(models: Callable[[Path], GoldenModel], s2_golden: Path) -> GoldenModel:
    """Those of S2-Pro, for tests of what does not differ between families."""
    return models(s2_golden)


@pytest.fixture(scope="session")
def tiny_checkpoint(s2_model: GoldenModel) -> Path:
    """A whole checkpoint folder. Not to be written to: copy it."""
    if not s2_model.fits:
        pytest.skip("the golden language model and codec have numbers of codebooks that do not fit")
    return s2_model.checkpoint


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of it, to be written to."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "in/checkpoint"))


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, s2_model: GoldenModel) -> Bundle:
    """The bundle exported from the tiny checkpoint. Not to be written to: copy it."""
    return s2_model.bundle


@pytest.fixture(scope="session")
def cuda_device() -> None:
    """For tests marked `cuda`: skips where there is no device, and says what is missing."""
    if obstacle := find_obstacle("cuda"):
        pytest.skip(f"no CUDA here: {obstacle.what}")


@pytest.fixture(scope="session")
def tensorrt_device() -> None:
    """For tests marked `trt`: skips where TensorRT or a device is missing, and says which."""
    if obstacle := find_obstacle("tensorrt"):
        pytest.skip(f"no TensorRT here: {obstacle.what}")
