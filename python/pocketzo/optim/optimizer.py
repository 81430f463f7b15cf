"""Zeroth-order methods: the step that PocketZO exists for.

What it is not: there is no gradient, no optimizer state and no copy of a weight. A direction z is regenerated from
(seed, tensor, draw) whenever it is needed; what a step leaves behind is one number a direction.
"""

from __future__ import annotations

import math
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, ClassVar, cast

import numpy as np
from numpy.typing import NDArray

from pocketzo._core import Segments
from pocketzo.formats.bundle import TensorSpec
from pocketzo.formats.journal import Journal
from pocketzo.kernels import Direction
from pocketzo.optim.groups import Group, Tunable, select
from pocketzo.optim.pending import pay
from pocketzo.optim.program import TERM, Part, Use, float32
from pocketzo.optim.schedule import Schedule
from pocketzo.runtime.model import Model

Objective = Callable[[Model], float]


@dataclass(frozen=True)
class StepInfo:
    """What one step found.

    Attributes
    ----------
    step : int
        Its number, from 0.
    loss : float
        The best estimate that the step has of the loss where the weights were.
    losses : tuple of float
        All of them, in order.
    lr : float
        The learning rate used, 0 where the step was undone.
    skipped : bool
        A loss was not finite, and the step was undone.
    """

    step: int
    loss: float
    losses: tuple[float, ...]
    lr: float
    skipped: bool


class Optimizer(ABC):
    """What all methods share: which weights move and how, the draw numbers, the journal.

    Parameters
    ----------
    model : Model
        Its trainable weights are moved in place.
    lr : float
        Learning rate at its peak.
    eps : float
        How far weights are shifted along a direction to see the loss change.
    seed : int
        64-bit; with it, every direction of the run is fixed.
    weight_decay : float
        Each step takes ``lr * weight_decay`` of every matrix off; vectors (biases, norms) are spared.
    trainable : str or callable, optional
        Regular expression (``re.search``) or predicate on names that narrows what is trained.
    groups : sequence of Group
        The first whose pattern matches a name applies.
    direction : {"gaussian", "rademacher"}, optional
        How directions are drawn; each method has its own default.
    schedule : Schedule, optional
        Constant by default.

    Attributes
    ----------
    step_number : int
        Steps taken so far.
    names : tuple of str
        The weights that are trained.
    parameters : int
        How many numbers these are.
    """

    method: ClassVar[str]
    default_direction: ClassVar[Direction]

    def __init__(
        self,
        model: Tunable,
        *,
        lr: float,
        eps: float = 1e-3,
        seed: int = 0,
        weight_decay: float = 0.0,
        trainable: str | Callable[[str], bool] | None = None,
        groups: Sequence[Group] = (),
        direction: Direction | None = None,
        schedule: Schedule | None = None,
    ) -> None:
        for name, value, least in (("lr", lr, 0.0), ("weight_decay", weight_decay, 0.0)):
            if not (math.isfinite(value) and value >= least):
                raise ValueError(f"{name} must be finite and at least 0, got {value}")
        if not (math.isfinite(eps) and eps > 0):
            raise ValueError(f"eps must be finite and greater than 0, got {eps}")
        if not 0 <= seed < 1 << 64:
            raise ValueError(f"seed must be in 0 .. 2**64 - 1, got {seed}")
        self.model = model
        self.lr = lr
        self.eps = eps
        self.seed = seed
        self.weight_decay = weight_decay
        self.groups = tuple(groups)
        self.direction: Direction = direction or self.default_direction
        if self.direction not in ("gaussian", "rademacher"):
            raise ValueError(f"direction must be 'gaussian' or 'rademacher', got {self.direction!r}")
        self.schedule = schedule or Schedule()
        self.step_number = 0
        self.journal: Journal | None = None
        tensors = select(model, trainable)
        self.names = tuple(tensor.name for tensor in tensors)
        self.parameters = sum(math.prod(tensor.shape) for tensor in tensors)
        self._parts = self._make_parts(tensors)
        self._lock = threading.RLock()  # another thread may look at the weights just when a step begins

    @property
    @abstractmethod
    def draws(self) -> int:
        """Directions, and so records, a step."""

    @property
    @abstractmethod
    def forwards(self) -> int:
        """Evaluations of the objective a step."""

    @abstractmethod
    def step(self, objective: Objective) -> StepInfo:
        """Take one step; an interrupt (Ctrl-C) waits for its end.

        The last pass over the weights may be left to the next step, which does it and its own first shift in one.
        Whatever looks at the weights before that (reading, saving, running the model) has it done, and sees them
        unshifted.

        If the objective raises, or a loss is not finite, the step is undone as one with a gradient of zero.

        Parameters
        ----------
        objective : callable
            Gets the model, whose weights are shifted at that moment, and returns the loss as a float.
        """

    @abstractmethod
    def uses(self, draws: Sequence[int], coefficients: Sequence[float], lr: float, part: Part) -> list[Use]:
        """Return everything that one recorded step does to the weights of a part, to be replayed."""

    def settings(self) -> dict[str, Any]:
        """Return what, with the model, makes an equal optimizer through :func:`restore`."""
        return {
            "method": self.method,
            "lr": self.lr,
            "eps": self.eps,
            "seed": self.seed,
            "weight_decay": self.weight_decay,
            "groups": [asdict(group) for group in self.groups],
            "direction": self.direction,
            "schedule": asdict(self.schedule),
            "trained": list(self.names),
        }

    def replay(self, records: NDArray[np.void]) -> None:
        """Do to the weights what the recorded steps did, in one pass over them.

        Parameters
        ----------
        records : ndarray
            dtype :data:`pocketzo.formats.journal.RECORD`; whole steps, following the weights as they are.
        """
        if len(records) % self.draws:
            raise ValueError(f"whole steps have a multiple of {self.draws} records, got {len(records)}")

        def uses(part: Part) -> list[Use]:
            uses = []
            for at in range(0, len(records), self.draws):
                step = records[at : at + self.draws]
                lr = float(step["lr"][0])
                uses += self.uses(step["draw"].tolist(), step["coefficient"].tolist(), lr, part)
            return uses

        self._apply(uses)
        self.step_number += len(records) // self.draws

    def _make_parts(self, tensors: Sequence[TensorSpec]) -> list[Part]:
        plain = Group("")
        members: dict[tuple[float, float, bool, bool], list[Any]] = {}
        for tensor in tensors:
            group = next((group for group in self.groups if re.search(group.pattern, tensor.name)), plain)
            decay = self.weight_decay > 0 and len(tensor.shape) > 1
            key = group.lr, group.eps, decay, tensor.dtype == "float16"
            members.setdefault(key, []).extend(self.model.weights.segments(tensor.name))
        for group in self.groups:
            if not any(re.search(group.pattern, tensor.name) for tensor in tensors):
                raise ValueError(f"group {group.pattern!r} matches none of the {len(tensors)} trained weights")
        parts = [Part(Segments(weights), *key) for key, weights in members.items()]
        for part in parts:
            if not 0 < self._eps(part) < math.inf:
                raise ValueError(f"eps must be a positive float32, got {self.eps * part.eps}")
        return parts

    def _terms(self, uses: Sequence[Use]) -> bytes:
        rademacher = self.direction == "rademacher"
        return b"".join(
            TERM.pack(self.seed, draw, *scales, *(0.0,) * (3 - len(scales)), decay, len(scales), rademacher, rounding)
            for draw, scales, decay, rounding in uses
        )

    def _apply(self, uses: Callable[[Part], Sequence[Use]]) -> None:
        """Pay what is owed and do this, in one pass over the weights."""
        with self._lock:
            if not any(part.owed for part in self._parts):
                self.model.weights.settle()  # what another optimizer owes
            for part in self._parts:
                part.apply(self._terms(uses(part)))

    def _owe(self, uses: Callable[[Part], Sequence[Use]]) -> None:
        """Leave this to the next pass, or to whoever looks at the weights before it.

        A term rounds as in a pass of its own, so that looking does not change a bit of what follows.
        """
        # Nothing here refers back to the model, which would then be kept until the garbage collector came by.
        self.model.weights.defer(partial(pay, self._parts, self._lock))
        for part in self._parts:
            part.owed = self._terms(uses(part))

    def _evaluate(self, objective: Objective) -> float:
        return float(objective(cast(Model, self.model)))

    def _shift(self, *shifts: tuple[int, float]) -> None:
        """Shift the weights along directions, by multiples of eps."""
        self._apply(lambda part: self._shifts(shifts, part))

    def _shifts(self, shifts: Sequence[tuple[int, float]], part: Part) -> list[Use]:
        return [Use(draw, self._scales(factor, part)) for draw, factor in shifts]

    def _scales(self, factor: float, part: Part) -> list[float]:
        # fp16 weights go back to where they were before they go on to the other side, as both ways round alike: else
        # each step would leave the roundings of three shifts, two thirds of a unit.
        if part.half and abs(factor) > 1.0:
            return [factor / 2 * self._eps(part)] * 2
        return [factor * self._eps(part)]

    def _eps(self, part: Part) -> float:
        return float32(self.eps * part.eps)

    def _decay(self, lr: float, part: Part) -> float:
        return float32(lr * part.lr * self.weight_decay) if part.decay else 0.0

    def _record(self, draws: Sequence[int], coefficients: Sequence[float], lr: float) -> None:
        if self.journal is not None:
            self.journal.append([(d, c, lr) for d, c in zip(draws, coefficients, strict=True)])
        self.step_number += 1

    def _applicable(self, coefficients: Sequence[float]) -> bool:
        """Whether an update by these stays finite for every part."""
        largest = max(part.lr for part in self._parts)
        return all(math.isfinite(float32(largest * coefficient)) for coefficient in coefficients)

    def _lr(self) -> float:
        return float32(self.lr * self.schedule(self.step_number))
