"""Translation of a step into terms for the kernels."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from ctypes import c_float
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pocketzo._core import TERM as TERM_DTYPE
from pocketzo._core import Segments
from pocketzo.formats.bundle import TensorSpec

Point: TypeAlias = Mapping[int, float]
"""Position of the weights in a step: by draw, the shift along its direction as a multiple of eps."""

NEAREST, STOCHASTIC, LATER = range(3)  # pocketzo::Rounding
SHIFT, GATHER, FOLLOW = range(3)  # pocketzo::Role

# TERM_DTYPE; assigning the fields of a structured array takes four times as long.
TERM = struct.Struct("=QQ3ffBBBBB3xQ")
_MOST_SCALES = 3
_UNUSED = [(0.0,) * (_MOST_SCALES - count) for count in range(_MOST_SCALES + 1)]


def float32(value: float) -> float:
    """Round to float32; a value that is too large becomes infinity, and :meth:`Optimizer.step` undoes the step."""
    return c_float(value).value


class Term(NamedTuple):
    """One direction: the scales applied in turn, the decay after them, the rounding of 16-bit weights, the role."""

    draw: int
    scales: tuple[float, ...]
    decay: float = 0.0
    rounding: int = NEAREST
    role: int = SHIFT


@dataclass
class Part:
    """Weights that share their settings.

    Attributes
    ----------
    segments : Segments
        Their memory segments.
    lr, eps : float
        Factors of the optimizer's ``lr`` and ``eps``.
    decays : bool
        Whether weight decay applies to them.
    is_16bit : bool
        Whether each scale of a term rounds.
    pending : bytes
        Packed terms that the next pass applies first.
    memory : sequence of ndarray
        The arrays of the segments, for :meth:`keep`.
    tensors : sequence of TensorSpec
        The weights.
    """

    segments: Segments
    lr: float
    eps: float
    decays: bool
    is_16bit: bool
    pending: bytes = b""
    memory: Sequence[NDArray[Any]] = ()
    tensors: Sequence[TensorSpec] = ()
    _kept: Sequence[NDArray[Any]] = ()

    def keep(self) -> None:
        """Copy the weights."""
        self._kept = [array.copy() for array in self.memory]

    def restore(self) -> None:
        """Write back what :meth:`keep` copied."""
        for array, kept in zip(self.memory, self._kept, strict=True):
            array[...] = kept

    def apply(self, terms: bytes = b"") -> None:
        """Apply the pending terms and these in one pass over the weights."""
        terms, self.pending = self.pending + terms, b""
        if terms:
            self.segments.apply(np.frombuffer(terms, TERM_DTYPE))


class Program:
    """The terms of one part, in order.

    A program may hold the moves and updates of several passes. A term with the same direction as the previous term is
    merged into it, which changes no bit (cpp/SPEC.md, section 4).

    Parameters
    ----------
    part : Part
    eps, weight_decay : float
        The optimizer's.
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
            # 16-bit weights return to the origin before they move to the other side, so that the two roundings cancel.
            # Otherwise each step would leave the rounding errors of three shifts, two thirds of a unit.
            legs = (-start, end) if self._is_16bit and start and end else (end - start,)
            for leg in legs:
                self._add(draw, leg * self._eps)

    def update(self, point: Point, coefficients: Mapping[int, float], lr: float) -> None:
        """Return from a point, move by ``-coefficient`` along each direction, then decay; round once, at the end."""
        decay = self._decay(lr)
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

    def follow(self, point: Point, gains: Mapping[int, float], forget: float, lr: float) -> None:
        """Return from a point, take the directions into the momentum, move by ``-lr`` along it, then decay.

        Parameters
        ----------
        point : Point
        gains : mapping of int to float
            By draw, in order: the multiple of the direction to add to the momentum.
        forget : float
            The share of the momentum that is subtracted before.
        lr : float
            With 0, the momentum stays as it is, and the weights only return.
        """
        if not lr:
            self.move(point, {})
            return
        *_, last = gains
        self._terms.append(Term(last, (), float32(forget), NEAREST, GATHER))
        self.move(point, {})
        self._terms += [Term(draw, (float32(gain),), 0.0, NEAREST, GATHER) for draw, gain in gains.items()]
        self._terms.append(Term(last, (float32(-self._lr * lr),), self._decay(lr), STOCHASTIC, FOLLOW))

    def _decay(self, lr: float) -> float:
        return float32(lr * self._lr * self._weight_decay) if self._weight_decay else 0.0

    def _add(self, draw: int, scale: float, decay: float = 0.0, rounding: int = NEAREST) -> None:
        scales: tuple[float, ...] = (float32(scale),)
        if self._terms and (self._terms[-1].draw, self._terms[-1].role) == (draw, SHIFT):
            _, earlier, earlier_decay, earlier_rounding, _ = self._terms[-1]
            if len(earlier) < _MOST_SCALES and earlier_decay == 0.0 and earlier_rounding == NEAREST:
                scales = earlier + scales
                self._terms.pop()
        self._terms.append(Term(draw, scales, decay, rounding))

    def pack(self, seed: int, *, rademacher: bool, rank: int = 0, period: int = 1) -> bytes:
        """Return the terms in the binary format of the kernels.

        Parameters
        ----------
        seed : int
        rademacher : bool
        rank : int
            Of the directions of matrices; 0 for ordinary ones.
        period : int
            So many draws, from a multiple of it on, share the factor V of a direction with a rank.
        """
        return b"".join(
            [
                TERM.pack(
                    seed,
                    draw,
                    *scales,
                    *_UNUSED[len(scales)],
                    decay,
                    len(scales),
                    rademacher,
                    rounding,
                    role,
                    rank,
                    draw // period if rank else 0,
                )
                for draw, scales, decay, rounding, role in self._terms
            ]
        )
