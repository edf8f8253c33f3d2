"""A server with the embedded voice, in this process."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the server extra")

from fastapi.testclient import TestClient

from fishrt import TTS
from fishrt.server.app import create_app
from fishrt.server.settings import Settings

HERE = {"Host": "127.0.0.1:8080"}
"""What a client of this machine sends; httpx and Starlette would name a host of their own."""


@pytest.fixture(scope="session")
def voice_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder of voices. Tests that add voices take one of their own."""
    return tmp_path_factory.mktemp("voices")


@pytest.fixture(scope="session")
def tts(voice_folder: Path) -> Iterator[TTS]:
    with TTS.load(threads=1, voices=voice_folder) as loaded:
        yield loaded


@pytest.fixture(scope="session")
def start(tts: TTS) -> Iterator[Callable[..., TestClient]]:
    """Return a client of a new server with these settings, whose model is loaded."""
    with ExitStack() as stack:

        def started(own: TTS | None = None, **settings: Any) -> TestClient:
            app = create_app(own or tts, Settings(**settings), closing=False)
            client = stack.enter_context(TestClient(app, headers=HERE, raise_server_exceptions=False))
            while client.get("/health").json()["status"] == "loading":
                time.sleep(0.01)
            return client

        yield started


@pytest.fixture(scope="session")
def client(start: Callable[..., TestClient]) -> TestClient:
    """A client of a server with usual settings."""
    return start()


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of the machine changes a test."""
    for name in [name for name in os.environ if name.startswith("FISHRT_") and name not in ("FISHRT_CACHE", "FISHRT_GOLDEN")]:
        monkeypatch.delenv(name)
