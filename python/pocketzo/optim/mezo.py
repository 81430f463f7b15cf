"""MeZO."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pocketzo.optim.optimizer import Objective, Optimizer, StepInfo
from pocketzo.optim.pending import uninterrupted
from pocketzo.optim.program import STOCHASTIC, Part, Use, float32


@dataclass(frozen=True)
class MeZOInfo(StepInfo):
    """Adds the two losses by name and the directional derivative (loss_plus - loss_minus) / (2 eps)."""

    loss_plus: float
    loss_minus: float
    projected_gradient: float


class MeZO(Optimizer):
    """MeZO (Malladi et al., arXiv 2305.17333): one direction a step, the loss on both sides of the weights.

    ``g = (loss(w + eps z) - loss(w - eps z)) / (2 eps)``, then ``w -= lr g z``. Parameters are those of
    :class:`Optimizer`.
    """

    method = "mezo"
    default_direction = "gaussian"

    draws = 1
    forwards = 2

    @uninterrupted()
    def step(self, objective: Objective) -> MeZOInfo:
        """Take one step; see :meth:`Optimizer.step`."""
        number = draw = self.step_number
        lr = self._lr()
        losses: list[float] = []
        coefficient = 0.0
        try:
            self._shift((draw, 1.0))
            losses.append(self._evaluate(objective))
            self._shift((draw, -2.0))
            losses.append(self._evaluate(objective))
            coefficient = float32(lr * (losses[0] - losses[1]) / (2 * self.eps))
        finally:
            # An objective that raised leaves the weights shifted up or down; both ways end as a step that is undone.
            if not losses:
                self._shift((draw, -2.0))
            skipped = len(losses) < 2 or not self._applicable([coefficient])
            if skipped:
                coefficient = lr = 0.0
            try:
                self._record([draw], [coefficient], lr)
            except BaseException:  # what is not on record must not move anything
                coefficient = lr = 0.0
                raise
            finally:
                self._owe(lambda part: [self._update(draw, coefficient, lr, part)])
        gradient = (losses[0] - losses[1]) / (2 * self.eps)
        return MeZOInfo(number, sum(losses) / 2, tuple(losses), lr, skipped, losses[0], losses[1], gradient)

    def uses(self, draws: Sequence[int], coefficients: Sequence[float], lr: float, part: Part) -> list[Use]:
        """See :meth:`Optimizer.uses`."""
        shifts = [*self._scales(1.0, part), *self._scales(-2.0, part)]
        update = self._update(draws[0], coefficients[0], lr, part)
        if part.half:
            return [Use(draws[0], shifts), update]
        return [update._replace(scales=[*shifts, *update.scales])]

    def _update(self, draw: int, coefficient: float, lr: float, part: Part) -> Use:
        """Restore and update, in fp32 at once."""
        eps = self._eps(part)
        scales = [eps, -part.lr * coefficient] if part.half else [eps - part.lr * coefficient]
        return Use(draw, [float32(scale) for scale in scales], self._decay(lr, part), STOCHASTIC)
