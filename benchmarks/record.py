"""The common fields of every JSON record: date, machine, versions and commit of a measurement."""

from __future__ import annotations

import json
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from fishrt.bench.setup import describe_machine

PACKAGES = ("onnx", "torch", "pocketsphinx")
"""Packages whose versions are recorded in addition to the runtime's dependencies."""
RESULTS = Path(__file__).parent / "results"


def environment() -> dict[str, Any]:
    """Return machine, versions and commit."""
    machine = describe_machine()
    for name in PACKAGES:
        try:
            machine["versions"][name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {"date": datetime.now(UTC).date().isoformat(), "commit": _commit(), **machine}


def write_record(name: str, measured: dict[str, Any], path: Path | None = None) -> Path:
    """Write results/<name>.json, or `path`. Return its path."""
    path = path or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"benchmark": name, "environment": environment(), **measured}, indent=1) + "\n")
    return path


def _commit() -> str | None:
    here = Path(__file__).parent
    done = subprocess.run(
        ["git", "-C", str(here), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or None
