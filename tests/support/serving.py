"""A real process of `fishrt serve`, on a free port; and a server in a thread of this process."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

LONG = "The birds sing in the trees, and the sun shines on the sea. " * 40


class Server:
    """A server that runs; its log is a file."""

    def __init__(self, process: subprocess.Popen[str], log: Path, first_line: str) -> None:
        self.process, self._log = process, log
        found = re.search(r"http://127\.0\.0\.1:(\d+)", first_line)
        assert found, first_line + self.log
        self.port = int(found.group(1))

    @property
    def log(self) -> str:
        return self._log.read_text(encoding="utf-8")

    def connect(self) -> HTTPConnection:
        return HTTPConnection("127.0.0.1", self.port, timeout=60)

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> HTTPResponse:
        """Return the reply, with its head read."""
        connection = self.connect()
        connection.request(method, path, None if body is None else json.dumps(body).encode(), headers)
        return connection.getresponse()

    def health(self) -> dict[str, Any]:
        return dict(json.loads(self.ask("GET", "/health").read()))

    def socket(self, sent: bytes = b"") -> socket.socket:
        """Return a connection on which these bytes were sent."""
        found = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        found.sendall(sent)
        return found

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal, wait, and return the exit status."""
        self.process.send_signal(number)
        return self.process.wait(60)


@contextmanager
def serving(folder: Path, *options: str, ready: bool = True, **variables: str) -> Iterator[Server]:
    """Start a server that keeps its voices in `folder`; at the end it is killed if it still runs."""
    log = folder / "log.txt"
    with log.open("w") as file:
        process = start(*options, "--voice-dir", str(folder / "voices"), log=file, **variables)
    try:
        assert process.stdout is not None
        readable, _, _ = select.select([process.stdout], [], [], 60)
        server = Server(process, log, process.stdout.readline() if readable else "")
        while ready and server.health()["status"] == "loading":
            time.sleep(0.02)
        yield server
    finally:
        process.kill()
        process.wait()


@dataclass(frozen=True)
class Here:
    """A server in a thread of this process."""

    app: Any
    port: int
    wyoming: int
    """Port of Wyoming's protocol."""

    @property
    def service(self) -> Any:
        return self.app.state.service


@contextmanager
def serving_here(tts: Any, **settings: Any) -> Iterator[Here]:
    """Start a server that is ready, with sockets whose buffers are small, so that it notices a slow reader soon."""
    import uvicorn

    from fishrt.server import run
    from fishrt.server.app import create_app
    from fishrt.server.settings import Settings

    with ExitStack() as stack:
        http, wyoming = (stack.enter_context(run.listen("127.0.0.1", 0)) for _ in range(2))
        http.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # its connections have it, too
        app = create_app(tts, Settings(**settings), closing=False, wyoming=wyoming)
        server = uvicorn.Server(run.configuration(app))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [http]})
        thread.start()
        while app.state.service.state == "loading":
            time.sleep(0.01)
        yield Here(app, http.getsockname()[1], wyoming.getsockname()[1])
        server.should_exit = True
        thread.join()


def start(*options: str, log: Any = subprocess.PIPE, **variables: str) -> subprocess.Popen[str]:
    """Start `fishrt serve` on a free port, unless the options name one."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FISHRT_") or name == "FISHRT_CACHE"}
    command = [
        sys.executable,
        "-m",
        "fishrt",
        "serve",
        "--threads",
        "1",
        *(() if "--port" in options else ("--port", "0")),
        *options,
    ]
    return subprocess.Popen(command, env={**kept, **variables}, stdout=subprocess.PIPE, stderr=log, text=True)


def speech(text: str = "Hi.", **fields: Any) -> bytes:
    """Return the bytes of a whole request for speech."""
    body = json.dumps({"input": text, "seed": 1, "response_format": "pcm", **fields}).encode()
    return b"POST /v1/audio/speech HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
