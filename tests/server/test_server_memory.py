"""The memory of a server that answers one request after another."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from serving import Server, serving

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="/proc tells what is a process's own"),
]

WARMING, MEASURED = 60, 240
FORMS = ("pcm", "wav", "mp3", "flac")


def own_bytes(server: Server) -> int:
    """Return the resident bytes of the server that are of no file."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return 1024 * int(re.findall(r"RssAnon:\s*(\d+) kB", status)[0])


def received(server: Server, n: int) -> int:
    """Speak, every other time what was said before; return the bytes of the sound, seconds long, which little work makes."""
    seed: dict[str, Any] = {"seed": n % 16} if n % 2 else {}
    body = {"input": "Hi.", "speed": 0.25, "sample_rate": 48_000, "response_format": FORMS[n // 2 % 4], "stream": n % 3 == 0}
    reply = server.ask("POST", "/v1/audio/speech", {**body, **seed})
    assert reply.status == 200
    return len(reply.read())


@pytest.mark.thorough
def test_requests_leave_nothing_behind(tmp_path: Path) -> None:
    """A leak of the sound would keep more than half of what is sent; an allocator with one arena varies by far less."""
    with serving(tmp_path, MALLOC_ARENA_MAX="1") as server:
        for n in range(WARMING):
            received(server, n)
        before = own_bytes(server)
        sent = sum(received(server, n) for n in range(MEASURED))
        assert own_bytes(server) - before < sent / 2
