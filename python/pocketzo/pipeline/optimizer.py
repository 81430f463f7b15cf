"""The optimizer of a pipeline: it computes a step's coefficients, and the stages move the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from pocketzo._core import Packing
from pocketzo.arguments import check_integer
from pocketzo.formats.journal import Entry
from pocketzo.optim.methods import METHODS
from pocketzo.optim.optimizer import Objective, Optimizer, StepInfo, Together
from pocketzo.optim.program import Part, Point
from pocketzo.pipeline.chain import Chain, chain_of
from pocketzo.runtime.model import Model
from pocketzo.tasks.objective import MetricObjective, OnBatch
from pocketzo.tasks.parts import Part as Rows
from pocketzo.tasks.parts import count_rows, joined, parts, sizes, take_rows


class Pooled(Optimizer):
    """What the optimizers of pipelines share; :func:`pooled_method` combines it with a method.

    A step sends all its forward passes to the first stage at once: the first stage computes the next point, or the next
    part of the batch, while the second one computes this. Only activations go forward, and only the losses come back.

    Attributes
    ----------
    microbatches : int
        In how many parts a batch goes through the stages.
    """

    def __init__(self, model: Model, *, microbatches: int = 1, **settings: Any) -> None:
        check_integer("microbatches", microbatches, 1)
        for name in ("pace", "candidates", "share"):
            if settings.get(name) is not None:
                raise ValueError(f"{name} is not for a pipeline: its stages know a step's directions before its losses")
        if settings.get("lr", "auto") == "auto":
            raise ValueError("lr must be a number for a pipeline: 'auto' measures on one device that has all weights")
        self.microbatches = microbatches
        self._at: Point = {}
        super().__init__(model, **settings)
        self._chain.begin(self.settings() | {"exact": self.exact})

    def step(self, objective: Objective | Together, record: Callable[[Entry], None] | None = None) -> StepInfo:
        """Take one step; see :meth:`Optimizer.step`.

        Parameters
        ----------
        objective : OnBatch
        record : callable, optional
        """
        if not isinstance(objective, OnBatch):
            raise TypeError(f"a pipeline minimises an objective on a batch, got {objective!r}")
        losses = self._losses(objective)

        def next_loss(_: Model) -> float:
            point, loss = next(losses)
            if point != self._at:
                raise ValueError(
                    f"{self.method} asked for the point {self._at}, and the stages are at {point}: its points depend "
                    "on the losses, which a pipeline does not allow"
                )
            return loss

        return super().step(next_loss, record)

    @property
    def _chain(self) -> Chain:
        return chain_of(cast(Model, self.model))

    def _losses(self, objective: OnBatch) -> Iterator[tuple[Point, float]]:
        """Begin all forward passes of a step, and yield its points and losses as they come."""
        model, chain = cast(Model, self.model), self._chain
        function, task = objective.objective.function, objective.objective.task
        names = (
            function.outputs
            if isinstance(function, MetricObjective)
            else [value.name for value in model.bundle.outputs]
        )
        slices, memory = model.slices, objective.objective.activation_memory
        cut = microbatches(objective, self.microbatches, slices.count)
        points = list(self._points(self._draws()))
        feeds = [{**part.batch, **slices.feed(memory)} for part in cut]  # each stage gets what is an input of it
        promises = [[chain.forward(index, names, feed) for feed in feeds] for index in range(len(points))]
        for point, passes in zip(points, promises, strict=True):
            outputs = joined(model.bundle, task, cut, [chain.result(promise) for promise in passes])
            yield point, float(function(outputs, objective.batch))

    def replay(self, entries: Sequence[Entry], *, average: bool = False) -> None:
        """Apply the steps of a journal to the weights of the stages."""
        if average:
            raise ValueError(
                "the stages of a pipeline do not average weights: replay the journal onto the whole bundle"
            )
        for call in self._chain.every("replay", list(entries)):
            self._chain.result(call)
        self.skip(entries)

    # ---- the weights are elsewhere ----

    def segments(self, name: str) -> Sequence[tuple[NDArray[Any], int, Packing | None, NDArray[Any] | None]]:
        """Return no memory."""
        return ()

    def _check_held(self) -> None:
        held = frozenset[str]().union(*(info.trained for info in self._chain.infos))
        if missing := [name for name in self.names if name not in held]:
            raise ValueError(
                f"no stage holds {missing[0]!r}: nothing reads it, so that it cannot be trained; leave it out"
            )

    def _move(self, parts: list[Part], before: Point, after: Point) -> None:
        self._at = after

    def _defer(self, parts: list[Part], at: Point, entry: Entry) -> None:
        self._chain.every("end", entry, self.step_number)


def pooled_method(name: str) -> type[Pooled]:
    """Return the optimizer of pipelines of a method of :data:`METHODS`."""
    method = METHODS[name]
    return type(f"Pooled{method.__name__}", (Pooled, method), {})


def microbatches(objective: OnBatch, count: int, slices: int) -> list[Rows]:
    """Return the parts of a batch that go through the stages one after the other.

    Parameters
    ----------
    objective : OnBatch
    count : int
        How many, or all rows if they are fewer; 1 for those that one device would compute one after the other.
    slices : int
        See :func:`pocketzo.tasks.parts.parts`.
    """
    task, batch = objective.objective.task, objective.batch
    if count == 1:
        return parts(task, batch, objective.objective.activation_memory, slices)
    bundle = task.bundle
    rows = count_rows(bundle, batch)
    widths, counts = sizes(bundle, batch, rows)
    groups = np.array_split(np.lexsort((counts, widths)), min(count, rows))
    return [take_rows(bundle, batch, np.sort(group), int(widths[group].max())) for group in groups]
