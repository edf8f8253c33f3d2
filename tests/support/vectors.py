"""Golden vectors: those of FISHRT_GOLDEN, else the ones that lie beside the tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

FAMILIES = ("s2-pro", "s1-mini", "fish-1.5", "fish-1.4", "fish-1.2")
CHOSEN = os.environ.get("FISHRT_GOLDEN")


def golden_root(chosen: str | None) -> Path:
    """Return the folder of golden vectors, with one folder for each family."""
    return Path(chosen) if chosen is not None else Path(__file__).parents[1] / "golden"


def present_families(chosen: str | None) -> list[str]:
    """Return the families with golden vectors."""
    return [family for family in FAMILIES if (golden_root(chosen) / family).is_dir()]


def find_golden(chosen: str | None, family: str) -> Path:
    """Return a family's vectors. Skip if there are none; fail if they are incomplete or a `chosen` folder has none at all."""
    folder = golden_root(chosen) / family
    if chosen is not None and not present_families(chosen):
        pytest.fail(f"no golden vectors in {golden_root(chosen)}, which FISHRT_GOLDEN names")
    if not folder.is_dir():
        pytest.skip(f"no golden vectors in {folder}; set FISHRT_GOLDEN")
    if lacking := [half for half in ("lm", "codec") if not (folder / half / "meta.json").is_file()]:
        pytest.fail(f"{folder} lacks the vectors of {' and '.join(lacking)}")
    return folder
