"""What a step does to the weights, in terms of the kernels."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from ctypes import c_float
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np

from pocketzo._core import TERM as TERM_DTYPE
from pocketzo._core import Segments

Point: TypeAlias = Mapping[int, float]
"""Where the weights are during a step: by draw, the multiple of eps by which they are shifted along its direction."""

NEAREST, STOCHASTIC, LATER = range(3)  # pocketzo::Rounding

TERM = struct.Struct("=QQ3ffBBB5x")  # TERM_DTYPE; writing the fields of a structured array takes four times as long
_MOST_SCALES = 3
_UNUSED = [(0.0,) * (_MOST_SCALES - count) for count in range(_MOST_SCALES + 1)]


def float32(value: float) -> float:
    """Round to float32; a value that is too large becomes infinity, which :meth:`Optimizer.step` refuses."""
    return c_float(value).value


class Term(NamedTuple):
    """One direction: the factors that multiply it in turn, the decay after them, the rounding of 16-bit weights."""

    draw: int
    scales: tuple[float, ...]
    decay: float = 0.0
    rounding: int = NEAREST


@dataclass
class Part:
    """Weights that share their settings.

    Attributes
    ----------
    segments : Segments
        Their memory.
    lr, eps : float
        Factors of the optimizer's own.
    decays : bool
        Whether weight decay applies to them.
    is_16bit : bool
        Whether each scale of a term rounds.
    pending : bytes
        Terms that the next pass begins with.
    """

    segments: Segments
    lr: float
    eps: float
    decays: bool
    is_16bit: bool
    pending: bytes = b""

    def apply(self, terms: bytes = b"") -> None:
        """Apply the pending terms and these in one pass over the weights."""
        terms, self.pending = self.pending + terms, b""
        if terms:
            self.segments.apply(np.frombuffer(terms, TERM_DTYPE))


class Program:
    """The terms of one part, in order.

    The moves and updates of several passes may be put into one: a term that goes on with the direction of the term
    before it is merged into it, which changes no bit (cpp/SPEC.md, section 4).

    Parameters
    ----------
    part : Part
    eps, weight_decay : float
        Of the optimizer.
    """

    def __init__(self, part: Part, *, eps: float, weight_decay: float) -> None:
        self._is_16bit = part.is_16bit
        self._lr = part.lr
        self._eps = float32(eps * part.eps)
        self._weight_decay = weight_decay if part.decays else 0.0
        self._terms: list[Term] = []

    def move(self, before: Point, after: Point) -> None:
        """Shift the weights from one point to another."""
        for draw in {**before, **after}:
            start, end = before.get(draw, 0.0), after.get(draw, 0.0)
            # 16-bit weights return to where they were before they go on to the other side, so that both roundings undo
            # each other. Else each step would leave the roundings of three shifts, two thirds of a unit.
            legs = (-start, end) if self._is_16bit and start and end else (end - start,)
            for leg in legs:
                self._add(draw, leg * self._eps)

    def update(self, point: Point, coefficients: Mapping[int, float], lr: float) -> None:
        """Return from a point, move by ``-coefficient`` along each direction, then decay; round once, at the end."""
        decay = float32(lr * self._lr * self._weight_decay) if self._weight_decay else 0.0
        first, last = next(iter(coefficients)), next(reversed(coefficients))
        for draw, start in point.items():
            if draw != first:
                self.move({draw: start}, {})
        for draw, coefficient in coefficients.items():
            amount = -self._lr * coefficient
            if draw == first and point.get(draw):
                back = -point[draw] * self._eps
                if self._is_16bit:
                    self._add(draw, back)
                else:
                    amount += back
            end = draw == last
            self._add(draw, amount, decay if end else 0.0, STOCHASTIC if end else LATER)

    def _add(self, draw: int, scale: float, decay: float = 0.0, rounding: int = NEAREST) -> None:
        scales: tuple[float, ...] = (float32(scale),)
        if self._terms and self._terms[-1].draw == draw:
            _, earlier, earlier_decay, earlier_rounding = self._terms[-1]
            if len(earlier) < _MOST_SCALES and earlier_decay == 0.0 and earlier_rounding == NEAREST:
                scales = earlier + scales
                self._terms.pop()
        self._terms.append(Term(draw, scales, decay, rounding))

    def pack(self, seed: int, *, rademacher: bool) -> bytes:
        """Return the terms as the kernels read them."""
        return b"".join(
            [
                TERM.pack(seed, draw, *scales, *_UNUSED[len(scales)], decay, len(scales), rademacher, rounding)
                for draw, scales, decay, rounding in self._terms
            ]
        )
