"""Strict JSON objects, which every reader interprets alike: UTF-8, no duplicate names, no NaN, no infinity."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NoReturn


def dump(fields: Mapping[str, Any]) -> bytes:
    """Serialise an object to ASCII; raise ValueError for a number that is not finite."""
    return json.dumps(fields, allow_nan=False).encode()


def parse(text: bytes) -> dict[str, Any]:
    """Parse an object.

    Raises
    ------
    ValueError
        The text is not a JSON object, or other readers could interpret it differently.
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
