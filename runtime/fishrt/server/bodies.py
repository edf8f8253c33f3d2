"""Bodies of requests → values."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.requests import Request

from .problems import Problem

_LONG = 1 << 20
"""From so many bytes, other requests would notice the parsing."""


async def json_object(request: Request) -> dict[str, Any]:
    """Return the JSON object in a request's body, whatever its Content-Type says. Raises Problem 400."""
    data = await request.body()
    return object_of(data) if len(data) < _LONG else await asyncio.to_thread(object_of, data)


def object_of(data: bytes) -> dict[str, Any]:
    """Return the JSON object in `data`. Raises Problem 400 for what is no JSON, and for JSON that is no object."""
    if not data.strip():
        raise Problem(400, "the body is empty; a JSON object is expected", code="invalid_json")
    try:
        value = json.loads(data, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise Problem(400, f"the body is no valid JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise Problem(400, "the body is JSON, but no object", code="invalid_json")
    return value


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")
