"""Pipecat's service for OpenAI, which takes every byte as 24 kHz."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.large


@pytest.fixture(scope="module")
def told(drive: Callable[..., Any]) -> Any:
    return drive("pipecat_service.py")


@pytest.mark.parametrize("name", ["usual", "chosen"])
def test_a_pipeline_speaks(told: Any, hear: Any, share_understood: Any, name: str) -> None:
    assert told(name) == {"rates": [24_000], "errors": []}
    assert share_understood(hear(told.folder / f"{name}.wav")) > 0.5


def test_a_mistake_is_an_error_frame(told: Any) -> None:
    assert "speed" in told("mistake")["errors"][0]
