"""Momentum: the exponential mean of MeZO's estimates, each divided by the running size of the slopes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from pocketzo._core import Packing
from pocketzo.arguments import check_number
from pocketzo.errors import MemoryLimitError
from pocketzo.formats.journal import Entry
from pocketzo.machine.memory import megabytes, resident_memory, system_memory
from pocketzo.optim.groups import Tunable
from pocketzo.optim.mezo import MeZO
from pocketzo.optim.optimizer import Update
from pocketzo.optim.program import Program, float32
from pocketzo.optim.slopes import MeanSquare, slopes_of

_SQUARE, _WEIGHT, _MOMENTUM = "mean_square", "weight", "momentum."


class Momentum(MeZO):
    """MeZO's estimate with momentum, and steps whose size does not depend on the scale of the loss.

    ``m = momentum m + (1 - momentum) g / rms(g) z``, then ``w -= lr m``. Here g is the slope of the loss along z, as
    MeZO takes it, and rms(g) the root of the running mean of its square, with Adam's correction of the first steps. m
    takes a float32 for each trained parameter, so that the method is for small trained sets.

    A step that is undone leaves m and rms(g) as they are. With a ``subset``, so does a step the m of the tensors that
    it does not choose.

    Parameters
    ----------
    model : Model
        Its trainable weights are updated in place.
    momentum : float
        Share of m that a step keeps, in [0, 1).
    **settings
        Those of :class:`Optimizer`; by default a step uses one Gaussian direction. The mean over several ``queries``
        is taken into m.

    Raises
    ------
    MemoryLimitError
        m takes more memory than there is, or than the model's ``max_memory`` leaves; with figures.
    """

    method: ClassVar[str] = "momentum"
    default_lr: ClassVar[float] = 3e-3

    def __init__(self, model: Tunable, *, momentum: float = 0.9, **settings: Any) -> None:
        check_number("momentum", momentum, most=1.0)
        if momentum == 1.0:
            raise ValueError("momentum must be less than 1: with 1 no step would have an effect")
        self.momentum = momentum
        self._mean_square = MeanSquare()  # of the slopes
        super().__init__(model, **settings)

    def update(self, entry: Entry, share: float = 1.0) -> Update:
        """See :meth:`Optimizer.update`."""
        gains = self._gains(entry) if entry.lr else {}
        return partial(Program.follow, gains=gains, forget=1.0 - self.momentum, lr=float32(share * entry.lr))

    def multiples(self, entry: Entry) -> Mapping[int, float]:
        """See :meth:`Optimizer.multiples`."""
        gains = self._gains(entry) if entry.lr else {}
        return {draw: entry.lr * gain / (1.0 - self.momentum) for draw, gain in gains.items()}

    def _gains(self, entry: Entry) -> dict[int, float]:
        """Return the multiples of the directions that the momentum takes in."""
        self._mean_square.take(entry)
        rms, slopes = self._mean_square.root, slopes_of(entry)
        share = 1.0 - self.momentum
        return {draw: share * (slope / rms) / len(slopes) if rms else 0.0 for draw, slope in slopes.items()}

    def _finite(self, coefficients: Mapping[int, float]) -> bool:
        largest = max(part.lr for part in self._parts) * self.lr
        return math.isfinite(float32(largest)) and super()._finite(coefficients)

    # ---- the momentum ------------------------------------------------------------------------------------------------

    def segments(self, name: str) -> Sequence[tuple[NDArray[Any], int, Packing | None, NDArray[Any] | None]]:
        """See :meth:`Optimizer.segments`."""
        pairs = zip(self.model.weights.segments(name), self._momenta[name], strict=True)
        return [(*segment, momentum) for segment, momentum in pairs]

    @cached_property
    def _momenta(self) -> dict[str, list[NDArray[np.float32]]]:
        """By name, one for each place in which a weight is kept, so that all of them get the same bits."""
        shapes = {tensor.name: tensor.shape for tensor in self._tensors}
        counts = {name: len(self.model.weights.segments(name)) for name in shapes}
        _check_room(
            4 * sum(counts[name] * math.prod(shape) for name, shape in shapes.items()),
            self.parameters,
            getattr(self.model, "max_memory", None),
        )
        return {name: [np.zeros(shape, np.float32) for _ in range(counts[name])] for name, shape in shapes.items()}

    def settings(self) -> dict[str, Any]:
        """See :meth:`Optimizer.settings`."""
        return {**super().settings(), "momentum": float(self.momentum)}

    def state(self) -> dict[str, NDArray[Any]]:
        """See :meth:`Optimizer.state`. The momenta are those of the optimizer itself, not copies."""
        self.model.weights.flush()
        numbers = {_SQUARE: np.array(self._mean_square.total), _WEIGHT: np.array(self._mean_square.weight)}
        return numbers | {_MOMENTUM + name: momenta[0] for name, momenta in self._momenta.items()}

    def set_state(self, state: Mapping[str, NDArray[Any]]) -> None:
        """See :meth:`Optimizer.set_state`."""
        expected = self.state()
        for name in expected.keys() | state.keys():
            want, got = (
                f"{array.dtype} {list(array.shape)}" if array is not None else "none"
                for array in (expected.get(name), state.get(name))
            )
            if want != got:
                raise ValueError(f"state {name!r} of {self.method}: expected {want}, got {got}")
        self._mean_square.total, self._mean_square.weight = float(state[_SQUARE]), float(state[_WEIGHT])
        for name, momenta in self._momenta.items():
            for momentum in momenta:
                momentum[...] = state[_MOMENTUM + name]


def _check_room(size: int, parameters: int, most: int | None) -> None:
    needs = f"momentum takes {megabytes(size)} for {parameters:,} trained parameters"
    instead = "Train fewer weights, take a method without momentum, such as mezo, or"
    if most is not None and (resident := resident_memory()) + size > most:
        raise MemoryLimitError(
            f"{needs}, {megabytes(resident)} are in use already, and the limit is {megabytes(most)}. {instead} allow "
            "more"
        )
    available = system_memory()[1]
    if available is not None and size > available:
        raise MemoryLimitError(
            f"{needs}, and this machine has {megabytes(available)} left. {instead} end other programs"
        )
