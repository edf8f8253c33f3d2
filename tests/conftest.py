"""Fixtures that several test files share."""

from __future__ import annotations

import gc
import os
import shutil
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fishrt_engines.providers import find_obstacle
from vectors import CHOSEN, FAMILIES, find_golden, present_families

if TYPE_CHECKING:
    from echo_model import EchoModel
    from fishrt.bundle.folder import Bundle
    from tiny import GoldenModel

RUNNING = pytest.StashKey[pytest.Item]()

gc.set_threshold(100_000, 20, 20)  # what a trace makes lives until its end, and looking for garbage takes a tenth of its time


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of fixtures that trace; `make quick` leaves them out."""
    for item in items:
        if {"golden_model", "s2_model", "tiny_bundle", "exported", "exports", "echo_model"} & set(
            getattr(item, "fixturenames", ())
        ):
            item.add_marker("slow")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Keep the test that runs, for `share_traces`."""
    item.config.stash[RUNNING] = item


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of the session share; write to it through `shared.make_once`."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session", autouse=True)
def _traces(shared_folder: Path, pytestconfig: pytest.Config) -> None:
    """Each module is traced once in the session. Only tests marked `slow` may: `make quick` relies on it."""
    if "fishrt_export.graph.job" not in sys.modules:  # of the tests chosen, none exports: torch stays out
        return
    from shared import share_traces

    def check() -> None:
        test = pytestconfig.stash[RUNNING]
        assert test.get_closest_marker("slow"), f"{test.nodeid} traces a module: give it the mark `slow`"

    share_traces(shared_folder / "traces", check)


@pytest.fixture(scope="session", params=present_families(CHOSEN) or FAMILIES)
def golden(request: pytest.FixtureRequest) -> Path:
    """The golden vectors of each family: `lm/` and `codec/`, each with a checkpoint in the official layout."""
    return find_golden(CHOSEN, request.param)


@pytest.fixture(scope="session")
def s2_golden() -> Path:
    """S2-Pro's, for tests of behaviour common to all families."""
    return find_golden(CHOSEN, "s2-pro")


@pytest.fixture(scope="session")
def models(shared_folder: Path) -> Callable[[Path], GoldenModel]:
    """The one model of each golden folder."""
    pytest.importorskip("torch", reason="needs the export extra")
    from tiny import GoldenModel

    def model(golden: Path) -> GoldenModel:
        folder = shared_folder / golden.name
        folder.mkdir(exist_ok=True)
        return GoldenModel(golden, folder)

    return cache(model)


@pytest.fixture(scope="session")
def golden_model(models: Callable[[Path], GoldenModel], golden: Path) -> GoldenModel:
    """Modules and exported graphs of the golden checkpoints, of each family."""
    return models(golden)


@pytest.fixture(scope="session")
def s2_model(models: Callable[[Path], GoldenModel], s2_golden: Path) -> GoldenModel:
    """S2-Pro's, for tests of behaviour common to all families."""
    return models(s2_golden)


@pytest.fixture(scope="session")
def echo_model(shared_folder: Path) -> EchoModel:
    """Modules and exported graphs of the golden diffusion model."""
    pytest.importorskip("torch", reason="needs the export extra")
    from echo_model import EchoModel
    from echo_vectors import echo_golden

    golden, folder = echo_golden(), shared_folder / "echo"
    folder.mkdir(exist_ok=True)
    return EchoModel(golden, folder)


@pytest.fixture(scope="session")
def tiny_checkpoint(models: Callable[[Path], GoldenModel], s2_golden: Path) -> Path:
    """A complete checkpoint folder. Do not write to it: copy it."""
    model = models(s2_golden)
    if not model.fits:
        pytest.skip("the golden language model and codec have numbers of codebooks that do not fit")
    return model.checkpoint


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A writable copy of `tiny_checkpoint`."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "in/checkpoint"))


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, s2_model: GoldenModel) -> Bundle:
    """The bundle exported from the tiny checkpoint. Do not write to it: copy it."""
    return s2_model.bundle


@pytest.fixture(scope="session")
def cuda_device() -> None:
    """Skip tests marked `cuda` if there is no device, with the reason."""
    if obstacle := find_obstacle("cuda"):
        pytest.skip(f"no CUDA here: {obstacle.what}")


@pytest.fixture(scope="session")
def tensorrt_device() -> None:
    """Skip tests marked `trt` if TensorRT or a device is missing, with the reason."""
    if obstacle := find_obstacle("tensorrt"):
        pytest.skip(f"no TensorRT here: {obstacle.what}")
