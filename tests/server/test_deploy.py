"""The container and the service: their options exist, and the health check of the container tells a server from none."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from fishrt.cli.serve import serve

DEPLOY = Path(__file__).parents[2] / "examples" / "deploy"


@pytest.mark.parametrize("name", ["Dockerfile", "fishrt.service"])
def test_options_exist(name: str) -> None:
    text = (DEPLOY / name).read_text()
    options = {option for parameter in serve.params for option in parameter.opts}
    assert set(re.findall(r"(?<=\s)--(?:api|max|bundle|host|port|voice|media)[a-z-]*", text)) <= options
    variables = {"FISHRT_" + option.removeprefix("--").replace("-", "_").upper() for option in options}
    assert set(re.findall(r"FISHRT_[A-Z_]+", text)) <= variables


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False)])
def test_the_health_check(status: int, healthy: bool) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.path == "/health"
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    found = re.search(r"HEALTHCHECK.*?CMD (\[.*?\])$", (DEPLOY / "Dockerfile").read_text(), re.DOTALL | re.MULTILINE)
    assert found
    _, *arguments = json.loads(found[1])
    with HTTPServer(("127.0.0.1", 0), Handler) as peer:
        threading.Thread(target=peer.handle_request, daemon=True).start()
        env = {"FISHRT_PORT": str(peer.server_port)}
        done = subprocess.run([sys.executable, *arguments], env=env, capture_output=True, check=False)
    assert (done.returncode == 0) == healthy
