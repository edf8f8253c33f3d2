"""The description of all routes: as OpenAPI, and as a page that needs neither a script nor another address."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from html import escape
from inspect import cleandoc
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.responses import HTMLResponse
from starlette.routing import BaseRoute, WebSocketRoute

from .encodings import MSGPACK
from .problems import NATIVE, PACKED

ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_BINARY = {"schema": {"type": "string", "format": "binary"}}
AUDIO: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The speech.",
        "content": {
            **{f"audio/{name}": _BINARY for name in ("mpeg", "ogg", "aac", "flac", "wav", "pcm")},
            "text/event-stream": {},
        },
    }
}
"""The reply of a route that speaks."""


def body(schema: dict[str, Any], *kinds: str) -> dict[str, Any]:
    """Return how OpenAPI describes a body of some content types: JSON if none is named."""
    content = {kind: {"schema": schema} for kind in kinds or ("application/json",)}
    return {"requestBody": {"required": True, "content": content}}


def routes(app: FastAPI) -> APIRouter:
    """Return the route of the page."""
    router = APIRouter()

    @router.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse("".join(_page(app.openapi())))

    return router


def describe(app: FastAPI, every: Iterable[BaseRoute]) -> dict[str, Any]:
    """Return the OpenAPI description; FastAPI's own says that a wrong request is answered with 422, and lacks WebSockets."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
        for path, _, operation in _operations(schema):
            operation["responses"].pop("422", None)
            for status, what in (("4XX", "The request is at fault."), ("503", "Not ready.")):
                content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
                operation["responses"].setdefault(status, {"description": what, "content": content})
            for status, response in operation["responses"].items() if NATIVE.match(path) else ():
                if status != "200" or PACKED.match(path):
                    response["content"][MSGPACK] = response["content"]["application/json"]
        schemas = schema.setdefault("components", {}).setdefault("schemas", {})
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        schemas["Error"] = ERROR
        sockets = (route for route in every if isinstance(route, WebSocketRoute))
        schema["x-websockets"] = {route.path: cleandoc(route.endpoint.__doc__ or "") for route in sockets}
        app.openapi_schema = schema
    return app.openapi_schema


def _operations(schema: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            yield path, method, operation


def _page(schema: dict[str, Any]) -> Iterator[str]:
    yield f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(schema["info"]["title"])}: routes</title>'
    yield '<meta name="viewport" content="width=device-width"><h1>Routes</h1>'
    yield '<p>Also as <a href="openapi.json">OpenAPI</a>. Everything under /v1 is there without /v1, too.</p>'
    for path, said in schema["x-websockets"].items():
        yield f"<h2><code>WebSocket {escape(path)}</code></h2><pre>{escape(said)}</pre>"
    for path, method, operation in _operations(schema):
        yield f"<h2><code>{method.upper()} {escape(path)}</code></h2><p><b>{escape(operation.get('summary', ''))}.</b> "
        yield f"{escape(operation.get('description', ''))}</p>"
        for kind, content in operation.get("requestBody", {}).get("content", {}).items():
            yield f"<p>Body, <code>{escape(kind)}</code>:</p>"
            yield from _fields(content["schema"])


def _fields(schema: dict[str, Any]) -> Iterator[str]:
    yield "<ul>"
    for name, field in schema.get("properties", {}).items():
        needed = " (required)" if name in schema.get("required", ()) else ""
        yield f"<li><code>{escape(name)}</code>{needed} {escape(field.get('description', ''))}"
        yield from _fields(field["items"]) if field.get("items", {}).get("properties") else ()
        yield "</li>"
    yield "</ul>"
