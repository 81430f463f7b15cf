"""Checks of arguments that are numbers or regular expressions."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np


def check_integer(name: str, value: object, least: int, most: int | None = None) -> None:
    """Check that an argument is an integer in a range.

    Raises
    ------
    TypeError
        It is no integer; a bool is none.
    ValueError
        It is out of range.
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < least or (most is not None and value > most):
        expected = f"at least {least}" if most is None else f"in {least} .. {most}"
        raise ValueError(f"{name} must be {expected}, got {value}")


def check_number(name: str, value: object, *, positive: bool = False, most: float | None = None) -> None:
    """Check that an argument is a finite number of at least 0, or more than 0, and perhaps at most ``most``.

    Raises
    ------
    TypeError
        It is no real number; a bool is none.
    ValueError
        It is out of range.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not (math.isfinite(value) and (value > 0 if positive else value >= 0) and (most is None or value <= most)):
        least = f"{'greater than' if positive else 'at least'} 0"
        expected = f"finite and {least}" if most is None else f"{least} and at most {most:g}"
        raise ValueError(f"{name} must be {expected}, got {value}")


def plain(value: Any) -> Any:
    """Return settings with Python's numbers in the place of numpy's, which JSON does not have."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value


def compile_pattern(name: str, value: object) -> re.Pattern[str]:
    """Return an argument that is a regular expression, compiled.

    Raises
    ------
    TypeError
        It is no string.
    ValueError
        It is not a regular expression; gives the reason.
    """
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a str, got {value!r}")
    try:
        return re.compile(value)
    except (re.error, OverflowError, RecursionError) as error:  # as of "a{99999999999}", and of a thousand brackets
        raise ValueError(f"{name} must be a regular expression, got {value!r}: {error}") from None
