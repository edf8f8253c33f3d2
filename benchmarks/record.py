"""The common fields of every JSON record: date, machine, versions and commit of a measurement."""

from __future__ import annotations

import json
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from fishrt.bench.setup import describe_machine
from fishrt_engines.machine import cpu_features

PACKAGES = ("onnx", "torch", "pocketsphinx")
"""Packages whose versions are recorded in addition to the runtime's dependencies."""
HERE = Path(__file__).parent
RESULTS = HERE / "results"


def environment() -> dict[str, Any]:
    """Return machine, versions and commit."""
    machine = describe_machine()
    for name in PACKAGES:
        try:
            machine["versions"][name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {"date": datetime.now(UTC).date().isoformat(), "commit": commit(HERE), "cpu_features": cpu_features(), **machine}


def write_record(name: str, measured: dict[str, Any], path: Path | None = None) -> Path:
    """Write results/<name>.json, or `path`. Return its path."""
    path = path or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"benchmark": name, "environment": environment(), **measured}, indent=1) + "\n")
    return path


def commit(folder: Path) -> str | None:
    """Return the commit of a folder, with "-dirty" if tracked files differ from it; None outside of a checkout."""
    done = subprocess.run(
        ["git", "-C", str(folder), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or None
