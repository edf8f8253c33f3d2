"""Typed access to the fields of a config that was read from JSON. Errors name the file, the field and its value."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .errors import ExportError

MOST = 2**24
"""No size of any model is larger; one that is would be an error of another kind later, or fill the memory."""


@dataclass(frozen=True, slots=True)
class Fields:
    """One object of a config. Every method raises ExportError for an absent field or a wrong value."""

    values: Mapping[str, Any]
    source: str
    """Name of the file."""
    prefix: str = ""
    """Names of the objects around this one, each with a dot behind it."""

    def raw(self, name: str) -> Any:
        """The value as it is."""
        if name not in self.values:
            raise ExportError(f"{self.source} lacks {self.prefix}{name}", hint="the config must be the one of this checkpoint")
        return self.values[name]

    def count(self, name: str) -> int:
        """A positive whole number, of a size that memory can hold."""
        value = self.raw(name)
        if not _is_whole(value) or not 1 <= value <= MOST:
            raise self.error(name, f"a positive whole number up to {MOST:,}")
        return int(value)

    def number(self, name: str) -> float:
        """A positive number."""
        value = self.raw(name)
        if not (_is_whole(value) or isinstance(value, float)) or not 0 < value <= sys.float_info.max:
            raise self.error(name, "a positive number")
        return float(value)

    def flag(self, name: str) -> bool:
        """True or false."""
        value = self.raw(name)
        if not isinstance(value, bool):
            raise self.error(name, "true or false")
        return value

    def counts(self, name: str, *, least: int = 1) -> tuple[int, ...]:
        """A list of one or more whole numbers, none below `least`."""
        value = self.raw(name)
        if not isinstance(value, list | tuple) or not value or not all(_is_whole(item) and item >= least for item in value):
            raise self.error(name, f"a list of whole numbers of at least {least}")
        return tuple(value)

    def section(self, name: str) -> Fields:
        """An object."""
        value = self.raw(name)
        if not isinstance(value, Mapping):
            raise self.error(name, "an object")
        return Fields(value, self.source, f"{self.prefix}{name}.")

    def only(self, known: Iterable[str]) -> None:
        """Refuses all other fields."""
        if unknown := sorted(self.values.keys() - set(known)):
            names = ", ".join(f"{self.prefix}{name}" for name in unknown)
            raise ExportError(
                f"{self.source} has unknown fields: {names}",
                hint="remove them if they change nothing; options that they set are not supported",
            )

    def error(self, name: str, expected: str) -> ExportError:
        """For a field that is there, but is not as expected."""
        return ExportError(f"{self.source}: {self.prefix}{name} is {self.values[name]!r}; expected {expected}")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
