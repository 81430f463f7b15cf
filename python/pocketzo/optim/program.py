"""Terms: what the kernels do to weights in one pass."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from ctypes import c_float
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pocketzo._core import TERM as TERM_DTYPE
from pocketzo._core import Segments

_NEAREST, STOCHASTIC, LATER = range(3)  # pocketzo::Rounding


class Use(NamedTuple):
    """What is done with one direction: the factors that multiply it in turn, the decay after them, the rounding."""

    draw: int
    scales: Sequence[float]
    decay: float = 0.0
    rounding: int = _NEAREST


TERM = struct.Struct("=QQ3ffBBB5x")  # TERM_DTYPE; writing the fields of a structured array takes four times as long


@dataclass
class Part:
    """Weights that share their settings, and what moves them."""

    segments: Segments
    lr: float
    eps: float
    decay: bool
    half: bool  # fp16
    owed: bytes = b""  # terms that the next pass begins with

    def apply(self, terms: bytes = b"") -> None:
        """Apply what is owed and these terms in one pass."""
        terms, self.owed = self.owed + terms, b""
        if terms:
            self.segments.apply(np.frombuffer(terms, TERM_DTYPE))


def float32(value: float) -> float:
    """Round; what is too large becomes infinity, which means a step to be undone."""
    return c_float(value).value
