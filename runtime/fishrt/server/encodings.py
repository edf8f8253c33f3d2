"""Objects of replies → JSON or MessagePack, as the client asks."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qs

import msgpack
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Scope

MSGPACK = "application/msgpack"
MSGPACK_TYPES = frozenset({MSGPACK, "application/x-msgpack", "application/vnd.msgpack"})


def answer(
    body: Any,
    scope: Scope,
    status: int = 200,
    headers: Mapping[str, str] | None = None,
    *,
    packed: bool = False,
) -> Response:
    """Return the reply with an object, in which JSON has bytes as base64. packed: in MessagePack, unless JSON is asked for.

    `?format=` goes before the header Accept.
    """
    asked = [value.lower() for value in parse_qs(scope["query_string"].decode("latin-1")).get("format", [])]
    accepted = Headers(scope=scope).get("accept", "").lower()
    if asked and asked[0] in ("json", "msgpack"):
        packed = asked[0] == "msgpack"
    elif any(kind in accepted for kind in MSGPACK_TYPES):
        packed = True
    elif "application/json" in accepted:
        packed = False
    if packed:
        return Response(msgpack.packb(body), status, dict(headers or {}), MSGPACK)
    data = json.dumps(body, ensure_ascii=False, separators=(",", ":"), default=_text).encode()
    return Response(data, status, dict(headers or {}), "application/json")


def _text(value: Any) -> str:
    return base64.b64encode(value).decode()
