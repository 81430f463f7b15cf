"""The learning rate of a run, found before its first step.

The steps that begin a run are evaluated at the start, where their directions, losses and coefficients do not depend on
the learning rate. Then the weights move by all of them at once, forth and back, at several rates, and each time the
loss on other training examples is evaluated. Nothing of it stays: the weights return to the same bits.

In a quadratic model, moving by ``lr`` changes that loss by ``-gain lr + rise lr^2``. The two parts are the odd and
the even one of what is measured. The gain is the slope along the mean of the steps. The rise comes from the noise,
which is nearly all of a zeroth-order step: each of the K steps has ``rise / K`` of it, whatever the method. A run of
T steps adds up ``T rise lr^2 / K``, less with a schedule that decays. Two limits follow. A step goes half as far as
the minimum at most, in the mean over the schedule. The noise of the whole run may cost a small share of the loss
(:data:`NOISE`). The gain of few steps is itself a random number, so that the first limit counts down to half of the
second one only. So is the rise along the sum of all steps, which meets the curvature down the slope besides: it is
one of K sums with orthogonal signs, and only the mean over all of them is the rise by noise. Some of the others, in
which half of the steps are reversed, are measured and stand for the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pocketzo.data.order import Data, Order
from pocketzo.formats.journal import Entry
from pocketzo.optim.methods import from_settings
from pocketzo.optim.optimizer import Objective, Optimizer, Together
from pocketzo.optim.program import float32
from pocketzo.optim.schedule import Schedule
from pocketzo.runtime.model import Batch, Model
from pocketzo.train.soundness import base_of

MOST: Final = 0.1
"""The most that a sweep takes, as a share of the forward passes of the run's steps."""
NOISE: Final = 0.1
"""What the noise of a run's steps may cost, as a share of the loss before it."""

_MOST_STEPPED, _LEAST_STEPS = 512, 2  # examples of all steps; steps
_LEAST_QUERIES = 4
_MOST_EVALUATED = 128  # examples on which the loss is evaluated at each rate
_EVALUATIONS = 17  # that are planned for: at the start, and forth and back for eight rates or sums of steps
_LEAST_EVALUATIONS = 11  # the same for five
_SUMS = 6  # of steps, some of them reversed, along which the rise is measured again
_FACTOR = 3.0  # between two rates, the loss having risen too much
_FARTHEST = 30.0  # factor between two rates
_BEYOND = 1.2  # how far behind the expected limit a rate is tried
_SHARE = 0.5  # of the rate at the minimum; it has three quarters of the decrease
_HELD_BACK = 0.2  # most of the training data
_LEAST = 0.5  # of the second limit, where the first is lower
_NONE = 1e-12  # a rate at which weights do not move


@dataclass(frozen=True)
class Sweep:
    """How a learning rate was found.

    Attributes
    ----------
    lr : float
    forwards : int
        Forward passes of a batch that it took.
    steps : int
        Steps whose directions were used.
    held_back : int
        Training examples on which the loss was evaluated. They are in no batch of these steps, unless there are too
        few examples.
    start : float or None
        The loss at the start.
    curve : list of (float, float or None, float or None)
        Learning rates, and the changes of that loss forth and back; None if the loss was not finite.
    rises : list of float or None
        At the highest rate at which the loss rose by less than :data:`NOISE`: the mean of both changes, by all
        steps, and by sums in which some of them are reversed.
    minimum : float or None
        The rate at which the loss falls most, of the quadratic model.
    noise : float or None
        The rate at which the noise of the run costs :data:`NOISE`.
    because : str or None
        Why the rate is the method's default instead.
    """

    lr: float
    forwards: int = 0
    steps: int = 0
    held_back: int = 0
    start: float | None = None
    curve: Sequence[tuple[float, float | None, float | None]] = ()
    rises: Sequence[float | None] = ()
    minimum: float | None = None
    noise: float | None = None
    because: str | None = None

    def settings(self) -> dict[str, Any]:
        """Return the fields for the header of the run."""
        return asdict(self)


class Start:
    """The weights as they are, for returning to them with the same bits.

    They are copied where steps keep a copy, too; otherwise they are read again from the bundle.

    Raises
    ------
    ValueError
        They are neither copied nor those of the bundle.
    """

    def __init__(self, optimizer: Optimizer, model: Model) -> None:
        self._model = model
        self._kept = {name: model.weights[name] for name in optimizer.names} if optimizer.exact else None
        if self._kept is None:
            base_of(model)

    def restore(self) -> None:
        """Set the weights."""
        weights = self._model.weights
        if self._kept is None:
            weights.read()
        for name, values in (self._model.init if self._kept is None else self._kept).items():
            weights[name] = values


def find_lr(
    optimizer: Optimizer,
    model: Model,
    train: Data,
    on: Callable[[Batch], Objective | Together],
    evaluate: Callable[[Batch], float],
    *,
    batch_size: int,
    steps: int,
    lengths: NDArray[np.integer[Any]] | None = None,
    told: Callable[[int, int], None] | None = None,
) -> Sweep:
    """Find the learning rate of a run.

    Parameters
    ----------
    optimizer : Optimizer
        Its settings are used, but for ``lr``. It takes no step.
    model : Model
        The optimizer's. The weights are those before the first step, also after an exception.
    train : Data
        Training data.
    on : callable
        Returns the objective of a step on a batch.
    evaluate : callable
        Returns the value to minimise on a batch, of the model as it is.
    batch_size, steps : int
        Those of the run.
    lengths : array of int, shape [len(train)], optional
        Of the examples, if the run batches by length.
    told : callable, optional
        Called with how many forward passes are done, and how many there may be.

    Raises
    ------
    ValueError
        The weights in memory are not those of the bundle, so that they could not be read again.
    """
    budget = int(MOST * steps * optimizer.forwards)
    scratch = _scratch(optimizer, _NONE)
    plan = _Plan.of(budget, scratch, len(train), batch_size)
    if plan is None:
        return Sweep(
            optimizer.default_lr,
            because=f"the {steps * optimizer.forwards} forward passes of the run are too few to try others in a tenth "
            "of them",
        )
    held, batches = _divide(train, optimizer.seed, batch_size, plan, lengths)
    start = Start(optimizer, model)
    try:
        entries: list[Entry] = []
        for batch in batches:
            scratch.step(on(train.batch(batch)), entries.append)
            if told is not None:
                told(len(entries) * scratch.forwards, budget)
        moves = map(_scratch(optimizer, _NONE).multiples, entries)
        length = math.sqrt(sum((multiple / _NONE) ** 2 for move in moves for multiple in move.values()))
        forwards = len(entries) * scratch.forwards
        found = _Curve(optimizer.default_lr, forwards, len(entries), np.unique(np.concatenate(held)).size)
        if not length:
            return found.default("all losses of a step were equal, or not finite, so that nothing was learnt from them")

        def loss() -> float:
            found.forwards += len(held)
            total = 0.0
            for number, batch in enumerate(held):
                total += evaluate(train.batch(batch))
                if told is not None:
                    told(found.forwards - len(held) + number + 1, budget)
            return total / len(held)

        def changes(lr: float, reversed_: int = 0) -> tuple[float, float]:
            """Move by all steps, of which half are reversed if a number is given: other ones for each."""
            both = []
            for signed in (lr, -lr):
                start.restore()
                signs = [-1 if (step & reversed_).bit_count() % 2 else 1 for step in range(len(entries))]
                moved = [_scaled(entry, sign * signed) for entry, sign in zip(entries, signs, strict=True)]
                _scratch(optimizer, lr).replay(moved)
                both.append(loss() - found.start)
            return both[0], both[1]

        start.restore()
        found.start = loss()
        if not math.isfinite(found.start) or not found.start:
            return found.default(f"the loss on the examples that were held back is {found.start} before the first step")
        found.follow(changes, optimizer.eps / length, (budget - found.forwards) // (2 * len(held)))
        found.average(changes, (budget - found.forwards) // (2 * len(held)))
        return found.choose(steps, optimizer.schedule)
    finally:
        start.restore()


@dataclass
class _Plan:
    """How many steps to evaluate, and how many batches at each rate."""

    steps: int
    batches: int

    @classmethod
    def of(cls, budget: int, optimizer: Optimizer, examples: int, batch_size: int) -> _Plan | None:
        """Return the plan for so many forward passes; None if they are too few."""
        forwards = optimizer.forwards
        spent = min(max(budget // 2, _LEAST_STEPS * forwards), budget - _LEAST_EVALUATIONS)
        steps = min(spent // forwards, max(_MOST_STEPPED // batch_size, _LEAST_STEPS))
        batches = min(max((budget - steps * forwards) // _EVALUATIONS, 1), max(_MOST_EVALUATED // batch_size, 1))
        batches = min(batches, max(1, int(_HELD_BACK * examples) // batch_size))
        if steps < _LEAST_STEPS or steps * optimizer.queries < _LEAST_QUERIES:
            return None
        return cls(steps, batches)


def _divide(
    train: Data, seed: int, batch_size: int, plan: _Plan, lengths: NDArray[np.integer[Any]] | None
) -> tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]]:
    """Return the batches that are held back, and those of the steps; all are whole."""
    shuffled = Order(seed=seed, size=len(train), batch_size=len(train))(0)
    count = min(plan.batches * batch_size, int(_HELD_BACK * len(train)))
    held, others = shuffled[:count], shuffled[count:]
    if not count:
        held = others
    order = Order(
        seed=seed, size=len(others), batch_size=batch_size, lengths=None if lengths is None else lengths[others]
    )
    held = np.resize(held, -(-min(len(held), plan.batches * batch_size) // batch_size) * batch_size)
    if lengths is not None:
        held = held[np.argsort(lengths[held], kind="stable")]
    return list(held.reshape(-1, batch_size)), [others[order(step)] for step in range(plan.steps)]


def _scratch(optimizer: Optimizer, lr: float) -> Optimizer:
    """Return another optimizer with the same directions.

    Without momentum, a step moves the weights at once by what it moves them with momentum in many steps.
    """
    settings = optimizer.settings() | {"lr": lr, "schedule": asdict(Schedule())}
    for name in "pace", "candidates":  # which depend on the steps before
        settings.pop(name, None)
    return from_settings(optimizer.model, settings | ({"momentum": 0.0} if "momentum" in settings else {}))


def _scaled(entry: Entry, lr: float) -> Entry:
    if not entry.lr:
        return entry
    return Entry(float32(lr), {draw: float32(value / _NONE * lr) for draw, value in entry.coefficients.items()})


class _Curve:
    """The change of the loss by learning rate, and what follows from it."""

    def __init__(self, default: float, forwards: int, steps: int, held_back: int) -> None:
        self.forwards = forwards
        self.start = math.nan
        self._default = default
        self._steps = steps
        self._held_back = held_back
        self._changes: dict[float, tuple[float, float]] = {}
        self._rises: list[float] = []

    def follow(self, changes: Callable[[float], tuple[float, float]], first: float, most: int) -> None:
        """Raise the rate until the loss rises by :data:`NOISE`, or lower it until it does not.

        The first rate moves the weights by about as much as a perturbation does.
        """
        lr, falls = first, False
        for number in range(most):
            lr = _rounded(lr)
            self._changes[lr] = changes(lr)
            falls = falls or (not number and not self._is_low(lr))
            if self._is_low(lr) == falls:
                return
            lr *= 1 / _FACTOR if falls else max(_BEYOND * self._to_limit(lr), _BEYOND)

    def average(self, changes: Callable[[float, int], tuple[float, float]], most: int) -> None:
        """Measure the rise at the highest rate along other sums of the steps."""
        if low := self._low():
            self._rises = [self._rise(max(low))]
            for number in range(1, min(most, _SUMS, self._steps - 1) + 1):
                self._rises.append(sum(changes(max(low), number)) / 2)

    def _low(self) -> list[float]:
        return [lr for lr in self._changes if self._is_low(lr)]

    def _to_limit(self, lr: float) -> float:
        """Return the factor from a rate to that at which the loss rises by :data:`NOISE`, in the quadratic model."""
        rise = self._rise(lr)
        return min(math.sqrt(NOISE * abs(self.start) / rise), _FARTHEST) if rise > 0 else _FARTHEST

    def _rise(self, lr: float) -> float:
        forth, back = self._changes[lr]
        return (forth + back) / 2

    def _is_low(self, lr: float) -> bool:
        return self._rise(lr) < NOISE * abs(self.start)

    def choose(self, steps: int, schedule: Schedule) -> Sweep:
        """Return the rate for a run."""
        low = self._low()
        if not low:
            return self.default("the loss rose at all rates that were tried")
        gain = float(np.mean([(back - forth) / (2 * lr) for lr, (forth, back) in self._changes.items() if lr in low]))
        limit = NOISE * abs(self.start)
        reached = max(low)  # the rate at which the loss rises by the limit: no less than this one
        above = [lr for lr in self._changes if lr > reached]
        if not above:
            reached *= self._to_limit(reached) if self._rise(reached) > 0 else 1
        elif math.isfinite(self._rise(min(above))):
            reached = max(reached, min(above) * self._to_limit(min(above)))
        first, *others = self._rises
        mean = (first + (self._steps - 1) * float(np.mean(others))) / self._steps if others else first
        if not math.isfinite(mean):
            reached /= _FACTOR
        elif first > 0 and mean > 0:  # otherwise roundings are larger than what is measured
            reached *= math.sqrt(first / mean)
        minimum = max(0.0, gain) * reached**2 / (2.0 * limit) if limit else 0.0
        noise = reached * math.sqrt(self._steps / sum(schedule(step) ** 2 for step in range(steps)))
        mean_of_schedule = sum(schedule(step) for step in range(steps)) / steps
        lr = min(max(_SHARE * minimum / mean_of_schedule, _LEAST * noise), noise)
        return self._sweep(_rounded(lr), minimum=_rounded(minimum), noise=_rounded(noise))

    def default(self, because: str) -> Sweep:
        """Return the method's default."""
        return self._sweep(self._default, because=because)

    def _sweep(self, lr: float, **more: Any) -> Sweep:
        return Sweep(
            lr,
            self.forwards,
            self._steps,
            self._held_back,
            _finite(self.start),
            [(lr, _finite(forth), _finite(back)) for lr, (forth, back) in sorted(self._changes.items())],
            [_finite(rise) for rise in self._rises],
            **more,
        )


def _rounded(lr: float) -> float:
    """Return a rate with two digits."""
    return float(f"{lr:.1e}")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
