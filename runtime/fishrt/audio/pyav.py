"""The optional package PyAV, which has ffmpeg's filters, encoders and decoders. Nothing of it is loaded until it is needed."""

from __future__ import annotations

import importlib
from typing import Any

from ..errors import AudioError


def pyav(what: str) -> Any:
    """Return the module av. what: what needs it, as the subject of the error. Raises AudioError if it is not installed."""
    try:
        return importlib.import_module("av")
    except ImportError:
        raise AudioError(f"{what} needs PyAV, which is not installed", hint='pip install "fishrt[server]"') from None
