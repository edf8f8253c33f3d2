"""The page to try the server in a browser: its files, and the routes that send them. It talks to the API as any client does."""

from __future__ import annotations

import hashlib
from pathlib import Path

from fastapi import APIRouter, Request
from starlette.responses import Response

from ..problems import Problem

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_INDEX = "index.html"


def routes() -> APIRouter:
    """Return the routes, which send the files of this folder as they are now."""
    router = APIRouter()
    files = {
        path.name: (path.read_bytes(), _TYPES[path.suffix]) for path in Path(__file__).parent.iterdir() if path.suffix in _TYPES
    }
    tags = {name: f'"{hashlib.sha256(data).hexdigest()[:32]}"' for name, (data, _) in files.items()}

    @router.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def index(request: Request) -> Response:
        return send(_INDEX, request)

    @router.api_route("/page/{name}", methods=["GET", "HEAD"], include_in_schema=False)
    async def file(name: str, request: Request) -> Response:
        if name not in files or name == _INDEX:
            raise Problem(404, "the page has no such file", code="not_found")
        return send(name, request)

    def send(name: str, request: Request) -> Response:
        """Send a file, or nothing to a browser that has it."""
        headers = {"ETag": tags[name], "Cache-Control": "no-cache"}
        held = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
        if tags[name] in held or "*" in held:
            return Response(status_code=304, headers=headers)
        data, kind = files[name]
        return Response(data, media_type=kind, headers=headers)

    return router
