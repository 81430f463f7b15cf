"""FZOO."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from pocketzo.optim.groups import Tunable
from pocketzo.optim.optimizer import Objective, Optimizer, StepInfo
from pocketzo.optim.pending import uninterrupted
from pocketzo.optim.program import LATER, STOCHASTIC, Part, Use, float32


class FZOO(Optimizer):
    """FZOO: the loss once where the weights are and once along each of N directions.

    ``w -= lr / (N std(l)) sum_i (l_i - l_0) u_i``: the spread of the losses sets the length of a step. Parameters are
    those of :class:`Optimizer`, and

    Parameters
    ----------
    directions : int
        N, at least 2.
    """

    method = "fzoo"
    default_direction = "rademacher"

    def __init__(self, model: Tunable, *, lr: float, directions: int = 8, **settings: Any) -> None:
        if directions < 2:
            raise ValueError(f"directions must be at least 2, got {directions}")
        self._directions = directions
        super().__init__(model, lr=lr, **settings)

    @property
    def draws(self) -> int:
        """Directions a step."""
        return self._directions

    @property
    def forwards(self) -> int:
        """Evaluations of the objective a step."""
        return self._directions + 1

    def settings(self) -> dict[str, Any]:
        """See :meth:`Optimizer.settings`."""
        return {**super().settings(), "directions": self._directions}

    @uninterrupted()
    def step(self, objective: Objective) -> StepInfo:
        """Take one step; see :meth:`Optimizer.step`."""
        number = self.step_number
        draws = range(number * self.draws, (number + 1) * self.draws)
        lr = self._lr()
        losses: list[float] = []
        coefficients: list[float] = []
        done = 0  # directions whose shift has been taken back
        shifted = False
        try:
            losses.append(self._evaluate(objective))
            self._shift((draws[0], 1.0))
            shifted = True
            for draw in draws:
                losses.append(self._evaluate(objective))
                if draw != draws[-1]:
                    self._shift((draw, -1.0), (draw + 1, 1.0))
                    done += 1
            if all(map(math.isfinite, losses)):
                coefficients = self._coefficients(losses, lr)
        finally:
            # If the objective raised, the directions that are left still leave their roundings: a step that is undone
            # has the same bits wherever it stopped.
            rest = [(draw, factor) for draw in draws[done:] for factor in (1.0, -1.0)][shifted:]
            skipped = not coefficients or not self._applicable(coefficients)
            if skipped:
                coefficients, lr = [0.0] * self.draws, 0.0
            try:
                self._record(draws, coefficients, lr)
            except BaseException:  # what is not on record must not move anything
                coefficients, lr = [0.0] * self.draws, 0.0
                raise
            finally:
                # Nothing is left to the next step, which begins with a look at the weights.
                self._apply(lambda part: [*self._shifts(rest, part), *self._update(draws, coefficients, lr, part)])
        return StepInfo(number, losses[0], tuple(losses), lr, skipped)

    def uses(self, draws: Sequence[int], coefficients: Sequence[float], lr: float, part: Part) -> list[Use]:
        """See :meth:`Optimizer.uses`."""
        eps = self._eps(part)
        return [*(Use(draw, [eps, -eps]) for draw in draws), *self._update(draws, coefficients, lr, part)]

    def _coefficients(self, losses: Sequence[float], lr: float) -> list[float]:
        base, along = losses[0], np.array(losses[1:])
        spread = float(along.std(ddof=1))
        if spread == 0.0:  # all directions look alike: nothing to learn from
            return [0.0] * self.draws
        return [float32(lr * (loss - base) / (self.draws * spread)) for loss in along.tolist()]

    def _update(self, draws: Sequence[int], coefficients: Sequence[float], lr: float, part: Part) -> list[Use]:
        factors = [float32(-part.lr * coefficient) for coefficient in coefficients]
        uses = [Use(draw, [factor], rounding=LATER) for draw, factor in zip(draws, factors, strict=True)]
        return [*uses[:-1], uses[-1]._replace(decay=self._decay(lr, part), rounding=STOCHASTIC)]
