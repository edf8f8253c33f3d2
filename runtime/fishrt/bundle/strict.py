"""Strict reading of dataclasses from JSON: an unknown key, a missing key and a value of another type are errors."""

from __future__ import annotations

import functools
import sys
import types
import typing
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar

from ..errors import BundleError

T = TypeVar("T")
AGAIN = "copy the bundle again, or export the checkpoint again"
"""The hint for a damaged file of a bundle."""
UPDATE = "update fishrt, or export again"
"""The hint for a bundle of another version."""


def parse_dataclass(kind: type[T], value: Any, where: str) -> T:
    """Return a dataclass from decoded JSON, strictly. where: the name of `value` in messages. Raises BundleError."""
    if not isinstance(value, dict):
        raise BundleError(f"{where} is {value!r}; expected an object", hint=AGAIN)
    types_by_name, required = _fields(kind)  # type: ignore[arg-type]  # mypy takes no class for Hashable
    if value.keys() != types_by_name.keys():
        if unknown := sorted(value.keys() - types_by_name.keys()):
            raise BundleError(f"{where} has unknown keys: {', '.join(unknown)}", hint=UPDATE)
        if missing := sorted(required - value.keys()):
            raise BundleError(f"{where} lacks the keys: {', '.join(missing)}", hint=AGAIN)
    return kind(**{name: _parse(types_by_name[name], item, f"{where}.{name}") for name, item in value.items()})


@functools.cache  # evaluating the types takes longer than reading an object, and a manifest has hundreds of one class
def _fields(kind: type[Any]) -> tuple[dict[str, Any], frozenset[str]]:
    """Return the types of a dataclass's fields by name, and the names of those without a default."""
    required = (f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING)
    return typing.get_type_hints(kind), frozenset(required)


def _of_kind(options: tuple[Any, ...], value: dict[str, Any], where: str) -> type[Any]:
    """Return the one of several dataclasses whose field `kind`, a Literal, may have the object's value. Raises BundleError."""
    if "kind" not in value:
        raise BundleError(f"{where} lacks the keys: kind", hint=AGAIN)
    known = [(name, option) for option in options for name in typing.get_args(_fields(option)[0]["kind"])]
    for name, option in known:
        if name == value["kind"]:
            return option  # type: ignore[no-any-return]
    names = ", ".join(name for name, _ in known)
    raise BundleError(f"{where}.kind is {value['kind']!r}; known are {names}", hint=UPDATE)


@functools.cache  # as for _fields
def _shape(kind: Any) -> tuple[Any, tuple[Any, ...]]:
    """Return what a type is, and its arguments: `object` for a dataclass, `Union`, dict, tuple, `Literal`; else the type."""
    if is_dataclass(kind):
        return object, ()
    origin = typing.get_origin(kind)
    return (typing.Union if origin is types.UnionType else origin or kind), typing.get_args(kind)


def _fits(kind: Any, value: Any) -> bool:
    shape, arguments = _shape(kind)
    if shape is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if shape is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if shape is object or shape is dict:
        return isinstance(value, dict)
    if shape is tuple:
        return isinstance(value, list)
    if shape is typing.Literal:
        return value in arguments
    return isinstance(value, shape)


def _kind_name(kind: Any) -> str:
    return getattr(kind, "__name__", str(kind))


def _parse(kind: Any, value: Any, where: str) -> Any:
    """Return `value` from JSON as the type `kind`: dataclasses, dict[str, X], tuple[X, ...], unions and plain values."""
    shape, arguments = _shape(kind)
    if shape is object:
        return parse_dataclass(kind, value, where)
    if shape is typing.Union:
        if isinstance(value, dict) and all(map(is_dataclass, arguments)):
            return parse_dataclass(_of_kind(arguments, value, where), value, where)
        for option in arguments:
            if option is type(None) and value is None:
                return None
            if option is not type(None) and value is not None and _fits(option, value):
                return _parse(option, value, where)
    elif shape is dict and isinstance(value, dict):
        return {key: _parse(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    elif shape is tuple and isinstance(value, list):
        return tuple([_parse(arguments[0], item, f"{where}[{n}]") for n, item in enumerate(value)])
    elif _fits(kind, value):
        return float(value) if kind is float else value
    raise BundleError(f"{where} is {value!r}; expected {_kind_name(kind)}", hint=AGAIN)
