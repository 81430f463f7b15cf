"""JSON objects that every reader understands alike: UTF-8, no name twice, no NaN, no infinity."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NoReturn


def dump(fields: Mapping[str, Any]) -> bytes:
    """Return the text of an object, in ASCII; a ValueError for a number that is not finite."""
    return json.dumps(fields, allow_nan=False).encode()


def parse(text: bytes) -> dict[str, Any]:
    """Return the object that a text holds.

    Raises
    ------
    ValueError
        It holds none, or one that readers in other languages could understand otherwise.
    """
    try:
        fields = json.loads(text.decode(), object_pairs_hook=_unique, parse_constant=_refuse)
    except RecursionError as error:
        raise ValueError(f"nested too deeply: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"not a JSON object, but of type {type(fields).__name__}")
    return fields


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a name occurs twice")
    return fields


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")
