"""The golden vectors of Echo-TTS: arrays, cases, texts."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vectors import CHOSEN, golden_root


def echo_golden() -> Path:
    """Return the folder of the vectors, with the checkpoint in the official layout. Skip if there is none."""
    folder = golden_root(CHOSEN) / "echo-tts"
    if not folder.is_dir():
        pytest.skip(f"no golden vectors in {folder}; set FISHRT_GOLDEN", allow_module_level=True)
    return folder


@cache
def arrays() -> dict[str, np.ndarray]:
    """Return all arrays by name; `meta()["arrays"]` describes them."""
    with np.load(echo_golden() / "vectors.npz") as file:
        return dict(file)


@cache
def meta() -> dict[str, Any]:
    """Return the configuration and the cases."""
    return json.loads((echo_golden() / "meta.json").read_text(encoding="utf-8"))


@cache
def texts() -> dict[str, Any]:
    """Return the cases of the tokeniser and of the streaming server's text rules."""
    return json.loads((echo_golden() / "text.json").read_text(encoding="utf-8"))


@cache
def http_cases() -> dict[str, Any]:
    """Return requests to the streaming server: settings, plans of generations and replies; and conversions of samples."""
    return json.loads((echo_golden() / "http.json").read_text(encoding="utf-8"))
