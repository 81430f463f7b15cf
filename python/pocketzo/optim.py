"""Zeroth-order methods: the step that PocketZO exists for.

What it is not: there is no gradient, no optimizer state and no copy of a weight. A direction z is regenerated from
(seed, tensor, draw) whenever it is needed; what a step leaves behind is one number a direction.
"""

from __future__ import annotations

import math
import re
import signal
import struct
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from ctypes import c_float
from dataclasses import asdict, dataclass
from functools import partial
from types import FrameType
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from pocketzo import _core
from pocketzo.bundle import Bundle, TensorSpec
from pocketzo.journal import Journal
from pocketzo.kernels import Direction
from pocketzo.model import Model
from pocketzo.weights import Weights

__all__ = ["FZOO", "METHODS", "Group", "MeZO", "Optimizer", "Schedule", "StepInfo"]

Objective = Callable[[Model], float]


class Tunable(Protocol):
    """What can be replayed onto; a :class:`Model` can also be stepped."""

    @property
    def bundle(self) -> Bundle:
        """What it is."""

    @property
    def weights(self) -> Weights:
        """What is moved."""


@dataclass(frozen=True)
class Schedule:
    """How the learning rate changes over a run, as a factor of its peak.

    Attributes
    ----------
    kind : {"constant", "linear", "cosine"}
        Stay, or fall to 0 at ``steps`` along a line or half a cosine.
    steps : int
        Length of the run; not used by "constant".
    warmup : int
        Steps over which the rate first rises from 0 along a line.
    """

    kind: Literal["constant", "linear", "cosine"] = "constant"
    steps: int = 0
    warmup: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("constant", "linear", "cosine"):
            raise ValueError(f"schedule must be 'constant', 'linear' or 'cosine', got {self.kind!r}")
        if self.warmup < 0 or (self.kind != "constant" and self.steps <= self.warmup):
            raise ValueError(f"a {self.kind} schedule needs 0 <= warmup < steps, got {self.warmup} and {self.steps}")

    def __call__(self, step: int) -> float:
        """Return the factor for step number ``step``, which counts from 0."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        if self.kind == "constant":
            return 1.0
        progress = min(1.0, (step - self.warmup) / (self.steps - self.warmup))
        return 1.0 - progress if self.kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class Group:
    """Settings for the weights whose names match ``pattern`` (``re.search``), as factors of the optimizer's own.

    A new head wants a larger ``lr`` and ``eps`` than a pretrained body. A factor of 0 for ``lr`` keeps weights as they
    are but for the roundings of perturbing.
    """

    pattern: str
    lr: float = 1.0
    eps: float = 1.0

    def __post_init__(self) -> None:
        if not (self.lr >= 0 and self.eps > 0 and math.isfinite(self.lr) and math.isfinite(self.eps)):
            raise ValueError(f"group {self.pattern!r}: lr must be >= 0 and eps > 0, got {self.lr} and {self.eps}")


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


@dataclass(frozen=True)
class MeZOInfo(StepInfo):
    """Adds the two losses by name and the directional derivative (loss_plus - loss_minus) / (2 eps)."""

    loss_plus: float
    loss_minus: float
    projected_gradient: float


_NEAREST, _STOCHASTIC, _LATER = range(3)  # pocketzo::Rounding


class _Use(NamedTuple):
    """What is done with one direction: the factors that multiply it in turn, the decay after them, the rounding."""

    draw: int
    scales: Sequence[float]
    decay: float = 0.0
    rounding: int = _NEAREST


_TERM = struct.Struct("=QQ3ffBBB5x")  # _core.TERM; writing the fields of a structured array takes four times as long


@dataclass
class _Part:
    """Weights that share their settings, and what moves them."""

    segments: _core.Segments
    lr: float
    eps: float
    decay: bool
    half: bool  # fp16
    owed: bytes = b""  # terms that the next pass begins with

    def apply(self, terms: bytes = b"") -> None:
        terms, self.owed = self.owed + terms, b""
        if terms:
            self.segments.apply(np.frombuffer(terms, _core.TERM))


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Hold back Ctrl-C: between two passes over the weights an exception would leave them half shifted."""
    elsewhere = threading.current_thread() is not threading.main_thread()  # only the main thread gets signals
    if elsewhere or signal.getsignal(signal.SIGINT) is None:  # and a handler that is not Python's cannot be put back
        yield
        return
    held: list[tuple[int, FrameType | None]] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: held.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if callable(before):
        for number, frame in held:
            before(number, frame)
    elif held and before == signal.SIG_DFL:
        signal.raise_signal(signal.SIGINT)


def _pay(parts: Sequence[_Part], lock: threading.RLock) -> None:
    if any(part.owed for part in parts):
        with _uninterrupted(), lock:
            for part in parts:
                part.apply()


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
        tensors = _select(model, trainable)
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
    def uses(self, draws: Sequence[int], coefficients: Sequence[float], lr: float, part: _Part) -> list[_Use]:
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
            dtype :data:`pocketzo.journal.RECORD`; whole steps, following the weights as they are.
        """
        if len(records) % self.draws:
            raise ValueError(f"whole steps have a multiple of {self.draws} records, got {len(records)}")

        def uses(part: _Part) -> list[_Use]:
            uses = []
            for at in range(0, len(records), self.draws):
                step = records[at : at + self.draws]
                lr = float(step["lr"][0])
                uses += self.uses(step["draw"].tolist(), step["coefficient"].tolist(), lr, part)
            return uses

        self._apply(uses)
        self.step_number += len(records) // self.draws

    def _make_parts(self, tensors: Sequence[TensorSpec]) -> list[_Part]:
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
        parts = [_Part(_core.Segments(weights), *key) for key, weights in members.items()]
        for part in parts:
            if not 0 < self._eps(part) < math.inf:
                raise ValueError(f"eps must be a positive float32, got {self.eps * part.eps}")
        return parts

    def _terms(self, uses: Sequence[_Use]) -> bytes:
        rademacher = self.direction == "rademacher"
        return b"".join(
            _TERM.pack(self.seed, draw, *scales, *(0.0,) * (3 - len(scales)), decay, len(scales), rademacher, rounding)
            for draw, scales, decay, rounding in uses
        )

    def _apply(self, uses: Callable[[_Part], Sequence[_Use]]) -> None:
        """Pay what is owed and do this, in one pass over the weights."""
        with self._lock:
            if not any(part.owed for part in self._parts):
                self.model.weights.settle()  # what another optimizer owes
            for part in self._parts:
                part.apply(self._terms(uses(part)))

    def _owe(self, uses: Callable[[_Part], Sequence[_Use]]) -> None:
        """Leave this to the next pass, or to whoever looks at the weights before it.

        A term rounds as in a pass of its own, so that looking does not change a bit of what follows.
        """
        # Nothing here refers back to the model, which would then be kept until the garbage collector came by.
        self.model.weights.defer(partial(_pay, self._parts, self._lock))
        for part in self._parts:
            part.owed = self._terms(uses(part))

    def _evaluate(self, objective: Objective) -> float:
        return float(objective(cast(Model, self.model)))

    def _shift(self, *shifts: tuple[int, float]) -> None:
        """Shift the weights along directions, by multiples of eps."""
        self._apply(lambda part: self._shifts(shifts, part))

    def _shifts(self, shifts: Sequence[tuple[int, float]], part: _Part) -> list[_Use]:
        return [_Use(draw, self._scales(factor, part)) for draw, factor in shifts]

    def _scales(self, factor: float, part: _Part) -> list[float]:
        # fp16 weights go back to where they were before they go on to the other side, as both ways round alike: else
        # each step would leave the roundings of three shifts, two thirds of a unit.
        if part.half and abs(factor) > 1.0:
            return [factor / 2 * self._eps(part)] * 2
        return [factor * self._eps(part)]

    def _eps(self, part: _Part) -> float:
        return _float32(self.eps * part.eps)

    def _decay(self, lr: float, part: _Part) -> float:
        return _float32(lr * part.lr * self.weight_decay) if part.decay else 0.0

    def _record(self, draws: Sequence[int], coefficients: Sequence[float], lr: float) -> None:
        if self.journal is not None:
            self.journal.append([(d, c, lr) for d, c in zip(draws, coefficients, strict=True)])
        self.step_number += 1

    def _applicable(self, coefficients: Sequence[float]) -> bool:
        """Whether an update by these stays finite for every part."""
        largest = max(part.lr for part in self._parts)
        return all(math.isfinite(_float32(largest * coefficient)) for coefficient in coefficients)

    def _lr(self) -> float:
        return _float32(self.lr * self.schedule(self.step_number))


class MeZO(Optimizer):
    """MeZO (Malladi et al., arXiv 2305.17333): one direction a step, the loss on both sides of the weights.

    ``g = (loss(w + eps z) - loss(w - eps z)) / (2 eps)``, then ``w -= lr g z``. Parameters are those of
    :class:`Optimizer`.
    """

    method = "mezo"
    default_direction = "gaussian"

    draws = 1
    forwards = 2

    @_uninterrupted()
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
            coefficient = _float32(lr * (losses[0] - losses[1]) / (2 * self.eps))
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

    def uses(self, draws: Sequence[int], coefficients: Sequence[float], lr: float, part: _Part) -> list[_Use]:
        """See :meth:`Optimizer.uses`."""
        shifts = [*self._scales(1.0, part), *self._scales(-2.0, part)]
        update = self._update(draws[0], coefficients[0], lr, part)
        if part.half:
            return [_Use(draws[0], shifts), update]
        return [update._replace(scales=[*shifts, *update.scales])]

    def _update(self, draw: int, coefficient: float, lr: float, part: _Part) -> _Use:
        """Restore and update, in fp32 at once."""
        eps = self._eps(part)
        scales = [eps, -part.lr * coefficient] if part.half else [eps - part.lr * coefficient]
        return _Use(draw, [_float32(scale) for scale in scales], self._decay(lr, part), _STOCHASTIC)


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

    @_uninterrupted()
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

    def uses(self, draws: Sequence[int], coefficients: Sequence[float], lr: float, part: _Part) -> list[_Use]:
        """See :meth:`Optimizer.uses`."""
        eps = self._eps(part)
        return [*(_Use(draw, [eps, -eps]) for draw in draws), *self._update(draws, coefficients, lr, part)]

    def _coefficients(self, losses: Sequence[float], lr: float) -> list[float]:
        base, along = losses[0], np.array(losses[1:])
        spread = float(along.std(ddof=1))
        if spread == 0.0:  # all directions look alike: nothing to learn from
            return [0.0] * self.draws
        return [_float32(lr * (loss - base) / (self.draws * spread)) for loss in along.tolist()]

    def _update(self, draws: Sequence[int], coefficients: Sequence[float], lr: float, part: _Part) -> list[_Use]:
        factors = [_float32(-part.lr * coefficient) for coefficient in coefficients]
        uses = [_Use(draw, [factor], rounding=_LATER) for draw, factor in zip(draws, factors, strict=True)]
        return [*uses[:-1], uses[-1]._replace(decay=self._decay(lr, part), rounding=_STOCHASTIC)]


METHODS: Mapping[str, type[Optimizer]] = {cls.method: cls for cls in (MeZO, FZOO)}


def restore(model: Tunable, settings: Mapping[str, Any]) -> Optimizer:
    """Make the optimizer whose :meth:`Optimizer.settings` were recorded."""
    arguments = dict(settings)
    trained = set(arguments.pop("trained"))
    arguments["groups"] = [Group(**group) for group in arguments["groups"]]
    arguments["schedule"] = Schedule(**arguments["schedule"])
    return METHODS[arguments.pop("method")](model, trainable=trained.__contains__, **arguments)


def _select(model: Tunable, trainable: str | Callable[[str], bool] | None) -> list[TensorSpec]:
    tensors = [tensor for tensor in model.bundle.tensors if tensor.trainable]
    if trainable is None:
        chosen = tensors
    elif callable(trainable):
        chosen = [tensor for tensor in tensors if trainable(tensor.name)]
    else:
        pattern = re.compile(trainable)
        chosen = [tensor for tensor in tensors if pattern.search(tensor.name)]
    if not chosen:
        raise ValueError(f"trainable={trainable!r} matches none of the {len(tensors)} weights that could be trained")
    return chosen


def _float32(value: float) -> float:
    """Round; what is too large becomes infinity, which means a step to be undone."""
    return c_float(value).value
