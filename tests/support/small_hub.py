"""A hub on the loopback interface: the routes of the Hugging Face Hub that a download asks for, over folders of this machine."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

LFS_BYTES = 10_000
"""Size in bytes from which a file is an LFS file, with a SHA-256."""


@dataclass
class SmallHub:
    """The served folders, the simulated faults, and the recorded requests."""

    url: str = ""
    repositories: dict[str, Path] = field(default_factory=dict)
    """Folders by OWNER/NAME. Every change of a file is a new commit of the branch `main`."""
    gated: set[str] = field(default_factory=set)
    """Repositories whose files cannot be read by anybody."""
    token: str | None = None
    """The one valid token; None: anybody may read."""
    break_off: dict[str, list[int]] = field(default_factory=dict)
    """Number of bytes after which the next answers break off, by file name."""
    corrupt: set[str] = field(default_factory=set)
    """Files served with other content than announced."""
    down: bool = False
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)
    """Method, path and Range header of every request."""
    agents: set[str] = field(default_factory=set)

    def downloads(self) -> list[tuple[str, str | None]]:
        """Return names and ranges of the files whose content was requested."""
        return [(path.rpartition("/")[2], sent) for method, path, sent in self.asked if method == "GET" and "/resolve/" in path]

    def commit(self, name: str) -> str:
        """Return a hash of all files as the commit."""
        digest = hashlib.sha1(name.encode())
        for path in self.files(name):
            digest.update(path.name.encode() + path.read_bytes())
        return digest.hexdigest()

    def files(self, name: str) -> list[Path]:
        """Return all files of a repository."""
        return sorted(path for path in self.repositories[name].rglob("*") if path.is_file())


@contextmanager
def serving() -> Iterator[SmallHub]:
    """Run a hub in a thread."""
    hub = SmallHub()

    class Handler(_Handler):
        small_hub = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    small_hub: SmallHub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        hub, path = self.small_hub, unquote(urlsplit(self.path).path)
        hub.asked.append((self.command, path, self.headers["Range"]))
        hub.agents.add(self.headers["User-Agent"])
        if hub.down:
            return self._fail(503)
        if hub.token and self.headers["Authorization"] not in (None, f"Bearer {hub.token}"):
            return self._fail(401, message="Invalid credentials in Authorization header")
        parts = path.strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        name, rest = "/".join(parts[2:4] if api else parts[:2]), parts[4:] if api else parts[2:]
        if name not in hub.repositories or (hub.token and not self.headers["Authorization"]):
            return self._fail(401, "RepoNotFound")
        revision = rest[1] if rest else "main"
        if revision not in ("main", hub.commit(name)):
            return self._fail(404, "RevisionNotFound")
        if api:
            return self._send(json.dumps(self._info(name)).encode(), {"Content-Type": "application/json"})
        if name in hub.gated:
            return self._fail(403, "GatedRepo")
        return self._file(name, "/".join(rest[2:]), body=body)

    def _info(self, name: str) -> dict[str, object]:
        root = self.small_hub.repositories[name]
        siblings = []
        for path in self.small_hub.files(name):
            content = path.read_bytes()
            entry: dict[str, object] = {"rfilename": path.relative_to(root).as_posix(), "size": len(content)}
            entry["blobId"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            if len(content) >= LFS_BYTES:
                entry["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
            siblings.append(entry)
        return {"id": name, "sha": self.small_hub.commit(name), "siblings": siblings}

    def _file(self, name: str, file: str, *, body: bool) -> None:
        hub = self.small_hub
        path = hub.repositories[name] / file
        if not path.is_file():
            return self._fail(404, "EntryNotFound")
        content = path.read_bytes()
        lfs = len(content) >= LFS_BYTES
        etag = (hashlib.sha256(content) if lfs else hashlib.sha1(b"blob %d\0" % len(content) + content)).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": hub.commit(name), "Accept-Ranges": "bytes"}
        if path.name in hub.corrupt:
            content = bytes(byte ^ 1 for byte in content)
        start, size = 0, len(content)
        if sent := self.headers["Range"]:
            start = int(sent.removeprefix("bytes=").removesuffix("-"))
            headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
        breaks = hub.break_off.get(path.name) if body else None
        most = breaks.pop(0) if breaks else None
        return self._send(content[start:], headers, status=206 if sent else 200, body=body, most=most)

    def _send(
        self, content: bytes, headers: dict[str, str], *, status: int = 200, body: bool = True, most: int | None = None
    ) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content[:most])
        if most is not None:
            self.close_connection = True

    def _fail(self, status: int, code: str | None = None, message: str | None = None) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message}
        self._send(b"", {key: value for key, value in headers.items() if value}, status=status)
