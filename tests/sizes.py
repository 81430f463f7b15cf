"""How large the tests are: POCKETZO_TEST_SIZE=small shrinks those that take long where the processor is emulated."""

from __future__ import annotations

import os
from typing import TypeVar

T = TypeVar("T")

SIZE = os.environ.get("POCKETZO_TEST_SIZE") or "full"
if SIZE not in ("full", "small"):
    raise ValueError(f"POCKETZO_TEST_SIZE: expected 'full' or 'small', got {SIZE!r}")


def full_or_small(full: T, small: T) -> T:
    """Return what the tests are to use: ``full``, or ``small`` under emulation."""
    return full if SIZE == "full" else small
