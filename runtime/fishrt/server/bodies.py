"""Bodies of requests → values."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import msgpack
from starlette.datastructures import UploadFile
from starlette.requests import Request

from .encodings import MSGPACK_TYPES
from .problems import Problem

MOST_BYTES = 32 << 20
"""Longest body of a request."""
_LONG = 1 << 20
"""From so many bytes, other requests would notice the parsing."""
_MOST_FILES, _MOST_FIELDS = 64, 256
MOST_VALUES = 200_000
"""Most values of an object, those inside included: each takes many times the bytes that it has in the body."""
_MOST_URLENCODED = 1 << 19
"""Longest form that is not multipart: it is parsed letter by letter."""


async def fields_of(request: Request) -> dict[str, Any]:
    """Return the fields of a body: of MessagePack or a form if its Content-Type says so, else of JSON. Raises Problem 400.

    The files of a form are bytes; a name that comes several times has a list. JSON in the name of a form, as curl sends it
    without a header, is JSON.
    """
    kind = _kind(request)
    if kind in MSGPACK_TYPES:
        return await _parsed(unpacked, await request.body())
    multipart = kind.startswith("multipart/")
    if multipart or (is_form(request) and not (await request.body()).lstrip().startswith(b"{")):
        return await _form(request)
    return await json_object(request)


def is_form(request: Request) -> bool:
    """Return whether a body is a form, in which numbers are text."""
    return _kind(request).startswith(("multipart/", "application/x-www-form-urlencoded"))


async def json_object(request: Request) -> dict[str, Any]:
    """Return the JSON object in a request's body, whatever its Content-Type says. Raises Problem 400."""
    return await _parsed(object_of, await request.body())


async def _parsed(parse: Callable[[bytes], dict[str, Any]], data: bytes) -> dict[str, Any]:
    return parse(data) if len(data) < _LONG else await asyncio.to_thread(parse, data)


def object_of(data: bytes | str) -> dict[str, Any]:
    """Return the JSON object in `data`. Raises Problem 400 for what is no JSON, and for JSON that is no object."""
    if not data.strip():
        raise Problem(400, "the body is empty; a JSON object is expected", code="invalid_json")
    try:
        value = json_value(data)
    except (ValueError, RecursionError) as error:
        raise Problem(400, f"the body is no valid JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise Problem(400, "the body is JSON, but no object", code="invalid_json")
    return value


def json_value(data: bytes | str) -> Any:
    """Return the value of JSON. Raises ValueError for what is none, and for more than MOST_VALUES; RecursionError."""
    if sum(map(data.count, ",[{") if isinstance(data, str) else map(data.count, b",[{")) > MOST_VALUES:
        raise _too_many()
    return json.loads(data, parse_constant=_refuse)


def unpacked(data: bytes) -> dict[str, Any]:
    """Return the map in MessagePack. Raises Problem 400 for what is none."""
    count = 0

    def counted(value: Any) -> Any:
        nonlocal count
        count += 1 + len(value)
        if count > MOST_VALUES:
            raise _too_many()
        return value

    try:
        value = msgpack.unpackb(data, list_hook=counted, object_hook=counted, max_array_len=MOST_VALUES, max_map_len=MOST_VALUES)
    except (ValueError, RecursionError) as error:
        raise Problem(400, f"the body is no valid MessagePack: {error}", code="invalid_msgpack") from None
    if not isinstance(value, dict):
        raise Problem(400, "the body is MessagePack, but no map", code="invalid_msgpack")
    return value


def _too_many() -> ValueError:
    return ValueError(f"it has more than {MOST_VALUES:,} values")


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _kind(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def _form(request: Request) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if not _kind(request).startswith("multipart/") and len(await request.body()) > _MOST_URLENCODED:
        raise Problem(413, f"a form of more than {_MOST_URLENCODED >> 10} KiB must be multipart/form-data", code="body_too_large")
    async with request.form(max_files=_MOST_FILES, max_fields=_MOST_FIELDS, max_part_size=MOST_BYTES) as form:
        for name in form:
            values = [await value.read() if isinstance(value, UploadFile) else value for value in form.getlist(name)]
            found[name] = values[0] if len(values) == 1 else values
    return found
