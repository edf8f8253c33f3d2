"""Words about requests: what is expected of a wrong field, which fields change nothing, and what may be wrong with the speech."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

_EXPECTED = {
    "missing": "it is missing",
    "string_type": "a text is expected",
    "string_unicode": "a text of whole characters is expected; it has half of a pair (a surrogate)",
    "string_too_short": "the text is empty",
    "string_too_long": "at most {max_length} characters are expected",
    "too_short": "the list is empty",
    "literal_error": "{expected} is expected",
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false is expected"),
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float", "int_parsing_size"), "a whole number is expected"),
    **dict.fromkeys(("float_type", "float_parsing", "finite_number"), "a number is expected"),
    "greater_than": "a number above {gt} is expected",
    "greater_than_equal": "a number of at least {ge} is expected",
    "less_than": "a number below {lt} is expected",
    "less_than_equal": "a number of at most {le} is expected",
    "value_error": "{error}",
}
_MOST_NAMES = 20
_MOST_BYTES, _MOST_LETTERS = 1000, 150
"""Of all warnings in a header, and of one."""
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,39}")
"""A name that a header and a log can hold, and that is no text."""


def expected(error: Mapping[str, Any]) -> str:
    """Return what is wrong about a value, from one of pydantic's `errors()`."""
    facts = {name: f"{value:g}" if isinstance(value, float) else value for name, value in error.get("ctx", {}).items()}
    return _EXPECTED.get(error["type"], "another value is expected").format(**facts)


def listed(names: Iterable[Any]) -> str:
    """Return names of a client, as a header and a log can hold them: letters of ASCII, at most 1 KB."""
    found = [name if isinstance(name, str) and _NAME.fullmatch(name) else "?" for name in dict.fromkeys(names)]
    return ", ".join([*found[:_MOST_NAMES], *(["..."] if found[_MOST_NAMES:] else [])])


def ignored_header(names: Iterable[Any]) -> dict[str, str]:
    """Return the header that names the fields of a request that changed nothing, if there are any."""
    return {"X-Ignored-Parameters": said} if (said := listed(names)) else {}


def warnings_header(warnings: Iterable[str]) -> dict[str, str]:
    """Return the header that has the first warnings about a speech, if there are any: an array of JSON in ASCII."""
    shown: list[str] = []
    for warning in warnings:
        shown.append(warning if len(warning) <= _MOST_LETTERS else f"{warning[: _MOST_LETTERS - 1]}…")
        if len(json.dumps(shown)) > _MOST_BYTES:
            shown.pop()
    return {"X-Warnings": json.dumps(shown)} if shown else {}
