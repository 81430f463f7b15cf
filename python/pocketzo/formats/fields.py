"""Read typed values from a JSON object. Errors name the value, what was expected and what was found."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any


class FieldError(ValueError):
    """A value of a JSON object is missing or invalid."""


class Fields:
    """A JSON object.

    Parameters
    ----------
    value
        The value from ``json.loads``.
    where : str
        The location in the file for error messages, such as ``tensors[3]``; empty at the top level.
    """

    def __init__(self, value: object, where: str = "") -> None:
        if not isinstance(value, dict):
            raise FieldError(f"{where or 'the file'} is {_short(value)}, expected an object")
        self._values: dict[str, Any] = value
        self._where = where

    def error(self, key: str, expected: str) -> FieldError:
        """Return an error that names a key, its value and the expected value."""
        return FieldError(f"{self._prefix}{key!r} is {_short(self._values.get(key))}, expected {expected}")

    def text(self, key: str) -> str:
        """Return a string that is not empty."""
        value = self._get(key)
        if type(value) is not str or not value:
            raise self.error(key, "a string that is not empty")
        return value

    def optional_text(self, key: str) -> str | None:
        """Return a string that is not empty, or None for null."""
        return None if self._get(key) is None else self.text(key)

    def integer(self, key: str, least: int, most: int) -> int:
        """Return an integer within limits, both included."""
        value = self._get(key)
        if type(value) is not int or not least <= value <= most:
            raise self.error(key, f"an integer of {least} to {most}")
        return value

    def optional_integer(self, key: str, least: int, most: int) -> int | None:
        """Return an integer within limits, both included, or None for null."""
        return None if self._get(key) is None else self.integer(key, least, most)

    def sha256(self, key: str) -> str:
        """Return a SHA-256 in lower-case hex."""
        value = self._get(key)
        if type(value) is not str or not re.fullmatch("[0-9a-f]{64}", value):
            raise self.error(key, "a SHA-256 in hex")
        return value

    def choice(self, key: str, choices: Sequence[str]) -> str:
        """Return a string that is one of some."""
        value: str = self._get(key)
        if value not in choices:
            raise self.error(key, f"one of {', '.join(choices)}")
        return value

    def boolean(self, key: str) -> bool:
        """Return true or false."""
        value = self._get(key)
        if type(value) is not bool:
            raise self.error(key, "true or false")
        return value

    def number(self, key: str) -> float:
        """Return a number."""
        value = self._get(key)
        if type(value) not in (int, float):
            raise self.error(key, "a number")
        return float(value)

    def names(self, key: str, *, empty: bool = False) -> tuple[str, ...]:
        """Return a list of unique, non-empty strings, as a tuple; with ``empty``, it may have none."""
        value = self._get(key)
        if type(value) is not list or not (value or empty) or not all(type(name) is str and name for name in value):
            raise self.error(key, "a list of names")
        if len(set(value)) != len(value):
            raise self.error(key, "each name once")
        return tuple(value)

    def shape(self, key: str, *, symbols: bool = False) -> tuple[Any, ...]:
        """Return a list of sizes, each 0 or more, as a tuple; with ``symbols``, a size may also be a name."""
        value = self._get(key)
        if type(value) is not list or not all(
            (type(size) is int and size >= 0) or (symbols and type(size) is str) for size in value
        ):
            raise self.error(key, "a list of sizes" + " or their names" * symbols)
        return tuple(value)

    def object(self, key: str) -> Fields:
        """Return a nested object."""
        return Fields(self._get(key), f"{self._where}.{key}" if self._where else key)

    def optional_object(self, key: str) -> Fields | None:
        """Return a nested object, or None for null."""
        return None if self._get(key) is None else self.object(key)

    def objects(self, key: str) -> Sequence[Fields]:
        """Return a list of nested objects."""
        value = self._get(key)
        if type(value) is not list:
            raise self.error(key, "a list")
        where = f"{self._where}.{key}" if self._where else key
        return [Fields(item, f"{where}[{index}]") for index, item in enumerate(value)]

    def plain(self) -> dict[str, Any]:
        """Return the object as a plain dict."""
        return self._values

    @property
    def _prefix(self) -> str:
        return f"{self._where}: " if self._where else ""

    def _get(self, key: str) -> Any:
        if key not in self._values:
            raise FieldError(f"{self._prefix}{key!r} is missing")
        return self._values[key]


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
