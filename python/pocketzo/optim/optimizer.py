"""The step and its replay, shared by all zeroth-order methods.

A method (:mod:`pocketzo.optim.mezo`, :mod:`pocketzo.optim.fzoo`) defines the points at which the loss is evaluated and
the coefficients of the update, and :mod:`pocketzo.optim.momentum` also what the update does with them. Everything else
is here: updating the weights in place, undoing a failed step, the entry for the journal, replay. No gradient is stored,
and a copy of the weights only where they are few. A direction z is regenerated from (seed, tensor, draw) whenever it is
needed, and a step is saved as one number per direction.
"""

from __future__ import annotations

import math
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, ClassVar, Literal, Protocol, TypeAlias, cast, get_args

import numpy as np
from numpy.typing import NDArray

from pocketzo._core import TERM as TERM_DTYPE
from pocketzo._core import Packing, Segments
from pocketzo.arguments import check_integer, check_number, plain
from pocketzo.formats.bundle import TensorSpec
from pocketzo.formats.journal import Entry
from pocketzo.kernels import Distribution
from pocketzo.optim.candidates import choose
from pocketzo.optim.groups import ParamGroup, Tunable, select
from pocketzo.optim.pace import Growing, Pace
from pocketzo.optim.pending import flush, uninterrupted
from pocketzo.optim.program import Part, Point, Program, float32
from pocketzo.optim.schedule import Schedule
from pocketzo.optim.slopes import MeanSquare
from pocketzo.runtime.frozen import frozen_base
from pocketzo.runtime.model import Model

Objective: TypeAlias = Callable[[Model], float]
Share: TypeAlias = Literal["batch", "split"]
Update: TypeAlias = Callable[[Program, Point], None]
"""Adds to a program the return from a point and the update of a step."""
_DRAWS = 2**64


class Together(Protocol):
    """An objective that is evaluated at several points in one forward pass, as an optimizer with ``share`` does."""

    def together(
        self, model: Model, weights: Mapping[str, NDArray[Any]], shares: Sequence[int | None]
    ) -> Sequence[float]:
        """Return the objective at each point.

        Parameters
        ----------
        model : Model
        weights : mapping of str to ndarray
            By name, the values [points, ...] of all trained tensors.
        shares : sequence of int or None
            Which share of the batch each point sees; None for the whole batch.
        """


class Subset(Protocol):
    """Chooses the trained tensors that a step perturbs and updates, such as :class:`pocketzo.optim.block.Block`."""

    def __call__(self, *, seed: int, step: int, count: int) -> Sequence[int]:
        """Return the indices, below ``count``, of a step's tensors; a pure function of the arguments."""

    def settings(self) -> dict[str, Any]:
        """Return the name in :data:`pocketzo.optim.methods.SUBSETS` and the constructor's arguments."""


@dataclass(frozen=True)
class StepInfo:
    """Result of one step.

    Attributes
    ----------
    step : int
        Its number, from 0.
    loss : float
        The step's best estimate of the loss at its initial weights.
    losses : tuple of float
        All losses, in the order of evaluation.
    lr : float
        The learning rate used; 0 if the step was undone.
    skipped : bool
        Whether the step was undone, because a loss or an update was not finite.
    coefficients : dict of int to float
        By draw, the multiple of the direction that was subtracted from the weights: lr times the projected gradient
        for MeZO.
    """

    step: int
    loss: float
    losses: tuple[float, ...]
    lr: float
    skipped: bool
    coefficients: Mapping[int, float]


class Optimizer(ABC):
    """Base class of the methods: selection of the weights, draws, the step and its replay.

    Parameters
    ----------
    model : Model
        Its trainable weights are updated in place.
    lr : float or "auto"
        Peak learning rate. With "auto", :class:`pocketzo.Trainer` finds it before the first step
        (:mod:`pocketzo.train.sweep`).
    eps : float
        Size of the perturbation along a direction.
    seed : int
        Unsigned, 64-bit; determines every direction of the run.
    weight_decay : float
        Each step subtracts ``lr * weight_decay`` of every matrix; vectors (biases, norms) do not decay.
    trainable : str or callable, optional
        Regular expression (``re.search``) or predicate on names; only matching weights are trained. By default all.
    groups : sequence of ParamGroup
        The first whose pattern matches a name applies.
    distribution : {"gaussian", "rademacher"}, optional
        Distribution of the directions' elements; each method has its own default.
    queries : int, optional
        Directions per step; each method has its own default.
    schedule : Schedule, optional
        Constant by default.
    subset : Subset, optional
        Chooses the tensors that each step perturbs and updates, such as ``Block(0.25)``; all by default.
    exact : bool, optional
        Whether weights return from each point by a copy, and so to the same bits; otherwise they are shifted back,
        which rounds. A step then holds a copy of the trained weights. By default over a frozen base
        (:func:`pocketzo.runtime.frozen.frozen_base`), where they are few, and with `share`.
    share : {"batch", "split"}, optional
        Evaluate the points of a step together, each on the whole batch, or each direction on its own share of it. The
        objective has to be one for several points (:class:`Together`), and the model loaded with ``queries=True``. By
        default the points are evaluated one after the other.
    pace : Pace, optional
        Let a step take another `queries` directions while the variance of its estimate is too large. For methods with
        :meth:`slopes`, and not with `share`. By default a step takes `queries`.
    candidates : int, optional
        Of so many draws, use the `queries` whose directions are most parallel to the last update
        (:func:`pocketzo.optim.candidates.choose`); the others are never evaluated. Not with `subset`.

    Attributes
    ----------
    lr : float
        NaN before it is found.
    step_number : int
        Steps taken so far.
    next_draw : int
        The first draw of the next step; the draws of a run count up from 0.
    names : tuple of str
        Names of the trained weights.
    parameters : int
        Number of trained parameters.
    """

    method: ClassVar[str]
    default_distribution: ClassVar[Distribution]
    default_queries: ClassVar[int]
    least_queries: ClassVar[int] = 1
    no_pace: ClassVar[str] = "it does not estimate slopes"
    """Why the method cannot have a pace, if it has no :meth:`slopes`."""
    default_lr: ClassVar[float]
    """For runs that are too short to find one."""

    def __init__(
        self,
        model: Tunable,
        *,
        lr: float | Literal["auto"] = "auto",
        eps: float = 1e-3,
        seed: int = 0,
        weight_decay: float = 0.0,
        trainable: str | Callable[[str], bool] | None = None,
        groups: Sequence[ParamGroup] = (),
        distribution: Distribution | None = None,
        queries: int | None = None,
        schedule: Schedule | None = None,
        subset: Subset | None = None,
        exact: bool | None = None,
        share: Share | None = None,
        pace: Pace | None = None,
        candidates: int | None = None,
    ) -> None:
        if isinstance(lr, str) and lr != "auto":
            raise TypeError(f"lr must be a number or 'auto', got {lr!r}")
        self.lr = math.nan if lr == "auto" else lr
        if lr != "auto":
            check_number("lr", lr)
        check_number("weight_decay", weight_decay)
        check_number("eps", eps, positive=True)
        check_integer("seed", seed, 0, 2**64 - 1)
        self.model = model
        self.eps = eps
        self.seed = seed
        self.weight_decay = weight_decay
        self.groups = tuple(groups)
        self.distribution: Distribution = distribution or self.default_distribution
        if self.distribution not in ("gaussian", "rademacher"):
            raise ValueError(f"distribution must be 'gaussian' or 'rademacher', got {self.distribution!r}")
        self.queries = self.default_queries if queries is None else queries
        check_integer(f"queries of {self.method}", self.queries, self.least_queries)
        self.schedule = schedule or Schedule()
        self.subset = subset
        if share not in (None, *get_args(Share)):
            raise ValueError(f"share must be 'batch', 'split' or None, got {share!r}")
        if share is not None and exact is False:
            raise ValueError(f"exact must be True with share={share!r}: the weights stay where they are")
        self.share = share
        self.exact = share is not None or bool(frozen_base(model.bundle)) if exact is None else exact
        if pace is not None:
            if type(self).slopes is Optimizer.slopes:
                raise ValueError(f"pace is not for {self.method}: {self.no_pace}")
            if share is not None:
                raise ValueError(f"pace is not for share={share!r}: it needs losses before it knows the directions")
            if pace.most < 2 * self.queries:
                raise ValueError(
                    f"pace must allow at least 2 * queries directions a step, {2 * self.queries}; got {pace.most}"
                )
        if candidates is not None:
            check_integer(f"candidates for {self.queries} directions a step", candidates, self.queries)
            if subset is not None:
                raise ValueError("candidates are not for a subset: the last update moved other tensors")
        self.pace = pace
        self.candidates = candidates
        self.step_number = 0
        self.next_draw = 0
        self._last: Entry | None = None  # that was not undone
        self._usual = MeanSquare()
        self._choice: tuple[int, Sequence[int]] = -1, ()
        self._tensors = select(model.bundle, trainable)
        self.names = tuple(tensor.name for tensor in self._tensors)
        self._check_held()
        self.parameters = sum(math.prod(tensor.shape) for tensor in self._tensors)
        for group in self.groups:
            if not any(re.search(group.pattern, name) for name in self.names):
                raise ValueError(f"group {group.pattern!r} matches none of the {len(self.names)} trained weights")
        self._parts = self._make_parts(self._tensors)
        self._pending = self._parts  # those that the last step moved
        self._values: dict[str, NDArray[Any]] = {}  # of the trained tensors at several points
        self._lock = threading.RLock()  # another thread may read the weights while a step begins

    # ---- a method ----------------------------------------------------------------------------------------------------

    @abstractmethod
    def probe(self, draws: Sequence[int], lr: float) -> Generator[Point, float, dict[int, float]]:
        """Yield the points at which to evaluate the loss, receive each loss, return the coefficients of the update.

        The weights start and end at the point ``{}``. In replay, and after a failure, every loss is NaN. The points
        must therefore not depend on the losses, except for the number of draws used.

        Parameters
        ----------
        draws : sequence of int
            The step's directions. With a pace, iteration decides after each round whether there are more, and the
            length is known only then.
        lr : float
            The coefficients are proportional to it; with 1 they are the gradient estimate itself.

        Returns
        -------
        dict of int to float
            By draw, in order: the multiple of the direction to subtract from the weights.
        """

    def loss(self, losses: Sequence[float]) -> float:
        """Return the best estimate of the loss at the point ``{}``."""
        return sum(losses) / len(losses)

    def slopes(self, losses: Sequence[float]) -> list[float]:
        """Return the slopes along a step's directions, in order, from the losses so far; their mean is the estimate.

        A method that overrides it can have a pace; its coefficients are lr times the mean.
        """
        raise NotImplementedError

    def update(self, entry: Entry, share: float = 1.0) -> Update:
        """Return the update of a step, or a share of it. It is called once a step, in order, also in replay."""
        if share != 1.0:
            shared = {draw: float32(share * value) for draw, value in entry.coefficients.items()}
            entry = Entry(float32(share * entry.lr), shared)
        return lambda program, at: program.update(at, entry.coefficients, entry.lr)

    def multiples(self, entry: Entry) -> Mapping[int, float]:
        """Return by draw what a step moves the weights by in the end. It is called once a step, in order."""
        return entry.coefficients

    def segments(self, name: str) -> Sequence[tuple[NDArray[Any], int, Packing | None, NDArray[Any] | None]]:
        """Return the memory of a trained weight, and its momentum or None, as :class:`_core.Segments` takes them."""
        return [(*segment, None) for segment in self.model.weights.segments(name)]

    def state(self) -> dict[str, NDArray[Any]]:
        """Return the method's state between steps, without the counts, for a snapshot."""
        return {}

    def set_state(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Restore what :meth:`state` returned."""
        if state:
            raise ValueError(f"{self.method} keeps no state, got {', '.join(state)}")

    # ---- a step ------------------------------------------------------------------------------------------------------

    @uninterrupted()
    def step(self, objective: Objective | Together, record: Callable[[Entry], None] | None = None) -> StepInfo:
        """Take one step; an interrupt (Ctrl-C) waits for its end.

        The last pass over the weights is deferred to the next step, which merges it with its own first shift. Reading,
        saving and running the model apply it first, so that shifted weights are never visible.

        If the objective raises, or a loss is not finite, the step is undone: it becomes a step whose coefficients are
        0. The resulting bits do not depend on the point of failure.

        Parameters
        ----------
        objective : callable
            Gets the model, whose weights are shifted during the call, and returns the loss as a float. With `share`, a
            :class:`Together`.
        record : callable, optional
            Gets the step's entry before any weight is updated. If it raises, the weights are as if the step had been
            undone.
        """
        number = self.step_number
        if math.isnan(self.lr):
            raise ValueError(
                "lr is 'auto', and no step can be taken before a Trainer has found it: give a number, or fit"
            )
        most = self.queries if self.pace is None else self.pace.most
        if self.next_draw + -(-most // self.queries) * self._span > _DRAWS:
            raise ValueError(f"no draws are left after draw {self.next_draw - 1}: they are 64-bit numbers")
        lr = self.lr_of(number)
        parts = self._parts_of(number)
        losses: list[float] = []
        failure: BaseException | None = None
        at: Point = {}
        draws = self._draws() if self.pace is None else Growing(lambda count: self._more(count, losses))
        walk = self.probe(draws, lr)
        ahead = None if self.share is None else _Ahead(self, parts, objective)
        try:
            point = next(walk)
            while True:
                if ahead is None:
                    self._move(parts, at, point)
                    at = point
                loss = math.nan
                if failure is None:
                    try:
                        if ahead is None:
                            loss = float(cast(Objective, objective)(cast(Model, self.model)))
                        else:
                            loss = ahead.at(point)
                        losses.append(loss)
                    except BaseException as error:  # the rest of the walk must still round the weights
                        failure = error
                point = walk.send(loss if math.isfinite(loss) else math.nan)
        except StopIteration as stop:
            coefficients = {draw: float32(value) for draw, value in stop.value.items()}
        except BaseException:  # raised by the method itself
            self._move(parts, at, {})
            raise
        skipped = failure is not None or not self._finite(coefficients)
        undone = Entry(0.0, dict.fromkeys(coefficients, 0.0))
        entry = undone if skipped else Entry(lr, coefficients)
        try:
            if record is not None:
                record(entry)
            self._advance(entry)
        except BaseException:  # a step that is not in the journal may not update the weights
            entry = undone
            raise
        finally:
            self._defer(parts, at, entry)
        if failure is not None:
            raise failure
        return StepInfo(number, self.loss(losses), tuple(losses), entry.lr, skipped, entry.coefficients)

    @uninterrupted()
    def estimate(self, draws: Sequence[int], objective: Objective) -> tuple[dict[int, float], list[float]]:
        """Evaluate directions at the weights as they are, which keep their bits: no step is taken.

        Needs ``exact``. It takes the tensors that the next step moves. If the objective raises, the weights have
        returned, too.

        Parameters
        ----------
        draws : sequence of int
        objective : callable
            As for :meth:`step`.

        Returns
        -------
        estimate : dict of int to float
            By draw, the estimate of the slope over the number of draws: what :meth:`probe` returns for an lr of 1.
        losses : list of float
            In the order of evaluation.
        """
        if not self.exact or self.share is not None:
            raise ValueError(
                f"estimate needs exact=True and share=None, got exact={self.exact} and share={self.share!r}"
            )
        parts = self._parts_of(self.step_number)
        losses: list[float] = []
        at: Point = {}
        walk = self.probe(draws, 1.0)
        try:
            point = next(walk)
            while True:
                self._move(parts, at, point)
                at = point
                losses.append(float(objective(cast(Model, self.model))))
                point = walk.send(losses[-1] if math.isfinite(losses[-1]) else math.nan)
        except StopIteration as stop:
            return stop.value, losses
        finally:
            self._move(parts, at, {})

    @classmethod
    def evaluations(cls, queries: int | None = None, share: Share | None = None) -> int:
        """Return what :attr:`forwards` is without a pace, for planning before a model is loaded."""
        return 2 if share == "split" else 2 * (queries or cls.default_queries)

    def lr_of(self, step: int) -> float:
        """Return the learning rate of a step, a float32."""
        return float32(self.lr * self.schedule(step))

    def group_of(self, name: str) -> ParamGroup:
        """Return the settings of a trained weight: the first group whose pattern matches, or one of factors 1."""
        return next((group for group in self.groups if re.search(group.pattern, name)), ParamGroup(""))

    @property
    def forwards(self) -> int:
        """Evaluations of the objective on a whole batch per step; with a pace, in a step of usual slopes."""
        draws = self.queries if self.pace is None else self.pace.usual(self.queries)
        points = sum(1 for _ in self._points(range(draws)))
        return points if self.share != "split" else -(-points // self.queries)

    @property
    def passes(self) -> int:
        """Passes of the kernels over the trained weights per step: one for each evaluation, and those for cosines."""
        if self.candidates is None:
            return self.forwards
        directions = self.queries if self.pace is None else self.pace.usual(self.queries)
        return self.forwards + directions // self.queries * (self.candidates + directions)

    def points(self) -> tuple[dict[str, NDArray[Any]], list[int | None]]:
        """Return the values of the trained tensors at the points of the next step, and the shares of a batch there.

        Returns
        -------
        weights : dict of str to ndarray, [points, ...]
            They are overwritten by the next step.
        shares : list of int or None
        """
        points = list(self._points(self._draws()))
        return self._values_at(self._parts_of(self.step_number), points), self._shares(points)

    def _shares(self, points: Sequence[Point]) -> list[int | None]:
        if self.share != "split":
            return [None] * len(points)
        for point in points:
            if len(point) != 1:
                raise ValueError(
                    f"share='split' needs points along one direction each, and {self.method} has one along "
                    f"{len(point)}: take share='batch'"
                )
        shares = {draw: index for index, draw in enumerate(self._draws())}
        return [shares[draw] for point in points for draw in point]

    def _values_at(self, parts: list[Part], points: Sequence[Point]) -> dict[str, NDArray[Any]]:
        """Return the values of the trained tensors at some points, [points, ...]; the weights stay where they are."""
        self._apply(parts, [self._program(part) for part in parts])
        trained = [tensor for tensor in self.model.bundle.tensors if tensor.trainable]
        if len(self._values.get(trained[0].name, ())) != len(points):
            self._values = {tensor.name: np.empty((len(points), *tensor.shape), tensor.dtype) for tensor in trained}
        with self._lock:
            for tensor in trained:
                self._values[tensor.name][:] = self.model.weights[tensor.name]
            for index, point in enumerate(points):
                for part in parts:
                    program = self._program(part)
                    program.move({}, {draw: shift for draw, shift in point.items() if shift})
                    if terms := self._pack(program):
                        segments = [(self._values[one.name][index], one.id, None, None) for one in part.tensors]
                        Segments(segments).apply(np.frombuffer(terms, TERM_DTYPE))
        return self._values

    def _points(self, draws: Sequence[int]) -> Iterator[Point]:
        walk = self.probe(draws, 0.0)
        with suppress(StopIteration):
            point = next(walk)
            while True:
                yield point
                point = walk.send(math.nan)

    @property
    def _span(self) -> int:
        """Draws that a round of directions is chosen from."""
        return self.queries if self.candidates is None else self.candidates

    def _draws(self, count: int = 0) -> Sequence[int]:
        """Return the draws of a step's next round of directions, after ``count`` of them."""
        first = self.next_draw + count // self.queries * self._span
        candidates = range(first, first + self._span)
        if self.candidates is None:
            return candidates
        if self._choice[0] != first:
            tensors = [(tensor, self.group_of(tensor.name).lr) for tensor in self._tensors]
            chosen = choose(
                candidates,
                self._last,
                tensors,
                count=self.queries,
                seed=self.seed,
                distribution=self.distribution,
            )
            self._choice = first, chosen
        return self._choice[1]

    def _more(self, count: int, losses: Sequence[float]) -> Sequence[int]:
        """Return the next directions of a step with a pace, after ``count`` of them; none if there are enough.

        A step that will be undone takes no more.
        """
        assert self.pace is not None
        if count:
            if not all(map(math.isfinite, losses)):
                return ()
            slopes = self.slopes(losses)
            if len(slopes) < count or count + self.queries > self.pace.most:
                return ()
            if self.pace.variance(slopes, self._usual) <= self.pace.threshold:
                return ()
        return self._draws(count)

    def _finite(self, coefficients: Mapping[int, float]) -> bool:
        largest = max(part.lr for part in self._parts)
        return all(math.isfinite(float32(largest * coefficient)) for coefficient in coefficients.values())

    def _advance(self, entry: Entry) -> None:
        self.step_number += 1
        after = max(entry.coefficients) + 1
        if self.candidates is not None:  # those that were not chosen are passed over
            after = self.next_draw + -((self.next_draw - after) // self.candidates) * self.candidates
        self.next_draw = after
        if any(entry.coefficients.values()):
            self._last = entry
            if self.pace is not None and entry.lr:
                self._usual.take(entry)

    # ---- replay ------------------------------------------------------------------------------------------------------

    def replay(self, entries: Sequence[Entry], *, average: bool = False) -> None:
        """Apply the steps of a journal to the weights, in one pass over them.

        Parameters
        ----------
        entries : sequence of Entry
            The steps after those taken so far.
        average : bool
            Set the weights to the mean of those after each of these steps instead: each update counts by the share of
            them that come after it, and no shift is repeated. No step can follow.
        """
        count = len(entries)
        walks = []
        for i, entry in enumerate(entries):
            update = self.update(entry, (count - i) / count if average else 1.0)
            points = [] if self.exact or average else list(self._points([*entry.coefficients]))
            walks.append((self.step_number + i, update, points))
        parts, steps = self._parts, None
        if self.subset is not None:
            parts = [part for tensor in self._tensors for part in self._make_parts([tensor])]
            steps = [set(self._chosen(number)) for number, _, _ in walks]
        programs = []
        for index, part in enumerate(parts):
            program = self._program(part)
            for i, (_, update, points) in enumerate(walks):
                if steps is None or index in steps[i]:
                    at: Point = {}
                    for point in points:
                        program.move(at, point)
                        at = point
                    update(program, at)
            programs.append(program)
        self._apply(parts, programs)
        self.skip(entries)

    def skip(self, entries: Sequence[Entry]) -> None:
        """Count steps of a journal as taken, when the weights already include them."""
        for entry in entries:
            self._advance(entry)

    def settings(self) -> dict[str, Any]:
        """Return the settings from which :func:`pocketzo.optim.methods.from_settings` makes an equal optimizer."""
        settings: dict[str, Any] = plain(
            {
                "method": self.method,
                "lr": "auto" if math.isnan(self.lr) else self.lr,
                "eps": self.eps,
                "seed": self.seed,
                "weight_decay": self.weight_decay,
                "groups": [asdict(group) for group in self.groups],
                "distribution": self.distribution,
                "queries": self.queries,
                "schedule": asdict(self.schedule),
                "subset": None if self.subset is None else self.subset.settings(),
                "trained": list(self.names),
            }
        )
        added: dict[str, Any] = plain(
            {
                "exact": self.exact or None,
                "share": self.share,
                "pace": None if self.pace is None else asdict(self.pace),
                "candidates": self.candidates,
            }
        )
        return settings | {name: value for name, value in added.items() if value is not None}  # as journals before them

    def _check_held(self) -> None:
        """Check that all trained weights are in memory that the kernels write."""
        before = [name for name in self.names if not self.model.weights.segments(name)]
        if before:
            raise ValueError(
                f"{self.model.bundle.path}: {before[0]!r} cannot be trained, as the model was loaded with a cut behind "
                f"it: name what is trained in plan_cut, or give trainable"
            )

    # ---- passes over the weights -------------------------------------------------------------------------------------

    def _make_parts(self, tensors: Sequence[TensorSpec]) -> list[Part]:
        members: dict[tuple[float, float, bool, bool], list[TensorSpec]] = {}
        for tensor in tensors:
            group = self.group_of(tensor.name)
            if not 0 < float32(self.eps * group.eps) < math.inf:
                raise ValueError(f"eps must be a positive float32, got {self.eps * group.eps}")
            decays = self.weight_decay > 0 and len(tensor.shape) > 1
            key = group.lr, group.eps, decays, tensor.dtype != "float32"
            members.setdefault(key, []).append(tensor)
        parts = []
        for key, chosen in members.items():
            segments = [segment for tensor in chosen for segment in self.segments(tensor.name)]
            memory = [segment[0] for segment in segments]
            parts.append(Part(Segments(segments), *key, memory=memory, tensors=chosen))
        return parts

    def _parts_of(self, step: int) -> list[Part]:
        if self.subset is None:
            return self._parts
        return self._make_parts([self._tensors[i] for i in self._chosen(step)])

    def _chosen(self, step: int) -> Sequence[int]:
        assert self.subset is not None
        return self.subset(seed=self.seed, step=step, count=len(self._tensors))

    def _program(self, part: Part) -> Program:
        return Program(part, eps=self.eps, weight_decay=self.weight_decay)

    def _move(self, parts: list[Part], before: Point, after: Point) -> None:
        if self.exact:
            self._return(parts, before)
            before = {}
        programs = []
        for part in parts:
            programs.append(self._program(part))
            programs[-1].move(before, after)
        self._apply(parts, programs)

    def _return(self, parts: list[Part], at: Point) -> None:
        """Return from a point by the copy that was made when the weights left the point ``{}``; there, make it."""
        if not at:
            self._apply(parts, [self._program(part) for part in parts])
        with self._lock:
            for part in parts:
                if at:
                    part.restore()
                else:
                    part.keep()

    def _pack(self, program: Program) -> bytes:
        return program.pack(self.seed, rademacher=self.distribution == "rademacher")

    def _apply(self, parts: list[Part], programs: Sequence[Program]) -> None:
        """Apply the pending terms and these programs; in one pass over the weights if the parts are the same."""
        with self._lock:
            if not any(part.pending for part in self._pending):
                self.model.weights.flush()  # pending terms of another optimizer
            if parts is not self._pending:
                for part in self._pending:
                    part.apply()
            for part, program in zip(parts, programs, strict=True):
                part.apply(self._pack(program))

    def _defer(self, parts: list[Part], at: Point, entry: Entry) -> None:
        """Defer the return from a point, and the update, to the next pass.

        A term rounds as in a pass of its own, so the bits do not depend on the pass that applies it.
        """
        if self.exact and at:
            self._return(parts, at)
            at = {}
        # No reference to the model: a cycle would keep it alive until the garbage collector ran.
        self.model.weights.defer(partial(flush, parts, self._lock))
        update = self.update(entry)
        for part in parts:
            program = self._program(part)
            update(program, at)
            part.pending = self._pack(program)
        self._pending = parts


class _Ahead:
    """The losses at a step's points, which are evaluated together: those that a method yields when losses are NaN.

    It may leave some of them out, or add others, as it gets the losses; those are evaluated by themselves.
    """

    def __init__(self, optimizer: Optimizer, parts: list[Part], objective: Objective | Together) -> None:
        if not hasattr(objective, "together"):
            raise TypeError(
                f"with share={optimizer.share!r} the objective needs a method 'together', got {objective!r}"
            )
        self._optimizer = optimizer
        self._parts = parts
        self._objective = objective
        self._planned = list(optimizer._points(optimizer._draws()))
        self._losses: list[float] = []

    def at(self, point: Point) -> float:
        """Return the loss at the next point."""
        if not self._losses or not self._planned or self._planned[0] != point:
            self._planned = self._planned if not self._losses and self._planned else [point]
            self._losses = self._evaluate()
        self._planned.pop(0)
        return self._losses.pop(0)

    def _evaluate(self) -> list[float]:
        optimizer = self._optimizer
        weights = optimizer._values_at(self._parts, self._planned)
        shares = optimizer._shares(self._planned)
        losses = [float(loss) for loss in self._objective.together(cast(Model, optimizer.model), weights, shares)]
        if len(losses) != len(shares):
            raise ValueError(f"the objective returned {len(losses)} losses for {len(shares)} points")
        return losses
