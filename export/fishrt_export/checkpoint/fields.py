"""Typed access to the fields of a config that was read from JSON. Errors name the file, the field and its value."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ExportError

MOST = 2**24
"""Upper bound of every size: no model reaches it, and a larger size would fill the memory or fail later without its name."""


@dataclass(frozen=True, slots=True)
class Fields:
    """One object of a config. Every method that reads a field raises ExportError if it is absent or has a wrong value."""

    values: Mapping[str, Any]
    source: str
    """File name of the config."""
    prefix: str = ""
    """Names of the enclosing objects, each followed by a dot."""

    def raw(self, name: str) -> Any:
        """Return the value as it is."""
        if name not in self.values:
            raise ExportError(f"{self.source} lacks {self.prefix}{name}", hint="the config must be the one of this checkpoint")
        return self.values[name]

    def count(self, name: str) -> int:
        """Return a whole number, 1 to MOST."""
        value = self.raw(name)
        if not _is_whole(value) or not 1 <= value <= MOST:
            raise self.error(name, f"a positive whole number up to {MOST:,}")
        return int(value)

    def number(self, name: str) -> float:
        """Return a positive finite number."""
        value = self.raw(name)
        if not (_is_whole(value) or isinstance(value, float)) or not 0 < value <= sys.float_info.max:
            raise self.error(name, "a positive number")
        return float(value)

    def flag(self, name: str) -> bool:
        """Return true or false."""
        value = self.raw(name)
        if not isinstance(value, bool):
            raise self.error(name, "true or false")
        return value

    def counts(self, name: str, *, least: int = 1) -> tuple[int, ...]:
        """Return a list of one or more whole numbers, each at least `least`."""
        value = self.raw(name)
        if not isinstance(value, list | tuple) or not value or not all(_is_whole(item) and item >= least for item in value):
            raise self.error(name, f"a list of whole numbers of at least {least}")
        return tuple(value)

    def section(self, name: str) -> Fields:
        """Return the fields of an object within this one."""
        value = self.raw(name)
        if not isinstance(value, Mapping):
            raise self.error(name, "an object")
        return Fields(value, self.source, f"{self.prefix}{name}.")

    def only(self, known: Iterable[str]) -> None:
        """Check that there are no other fields. Raises ExportError."""
        if unknown := sorted(self.values.keys() - set(known)):
            names = ", ".join(f"{self.prefix}{name}" for name in unknown)
            raise ExportError(
                f"{self.source} has unknown fields: {names}",
                hint="remove them if they change nothing; options that they set are not supported",
            )

    def error(self, name: str, expected: str) -> ExportError:
        """Return the error for a field whose value is not the expected one."""
        return ExportError(f"{self.source}: {self.prefix}{name} is {self.values[name]!r}; expected {expected}")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
