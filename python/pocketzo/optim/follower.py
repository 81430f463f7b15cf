"""The part of a step that moves weights, for devices that do not see the losses."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from pocketzo.formats.journal import Entry
from pocketzo.optim.groups import Tunable
from pocketzo.optim.methods import from_settings
from pocketzo.optim.optimizer import Optimizer, Subset
from pocketzo.optim.program import Part, Point


@dataclass(frozen=True)
class Within:
    """A subset of all trained tensors, as far as this device holds them.

    Attributes
    ----------
    whole : Subset
    places : tuple of int
        The place of each tensor of this device among all.
    count : int
        Of all.
    """

    whole: Subset
    places: tuple[int, ...]
    count: int

    def __call__(self, *, seed: int, step: int, count: int) -> Sequence[int]:
        """Return the indices, below ``count``, of a step's tensors."""
        chosen = {*self.whole(seed=seed, step=step, count=self.count)}
        return [index for index, place in enumerate(self.places[:count]) if place in chosen]

    def settings(self) -> dict[str, Any]:
        """Return the settings of the whole subset."""
        return self.whole.settings()


class Follower:
    """Moves an optimizer's weights as :meth:`Optimizer.step` does, with coefficients that are computed elsewhere.

    The weights have the bits that the same tensors have where one process takes the step.

    Parameters
    ----------
    optimizer : Optimizer
        Of the tensors that this device holds. Its directions do not depend on losses: it has neither a pace nor
        candidates, and evaluates one point after the other.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        if optimizer.pace is not None or optimizer.candidates is not None or optimizer.share is not None:
            raise ValueError("a follower has no pace, no candidates and no share: its directions are known beforehand")
        self.optimizer = optimizer
        self._parts: list[Part] = []
        self._points: list[Point] = []
        self._at: Point = {}
        self._next = 0

    @classmethod
    def from_settings(cls, model: Tunable, settings: Mapping[str, Any]) -> Self | None:
        """Make the follower of an optimizer of a whole model, by its settings with ``exact``; None if it has no tensor.

        Parameters
        ----------
        model : Tunable
            That holds some of the trained tensors.
        settings : mapping
            Of the optimizer of all.
        """
        own = [tensor.name for tensor in model.bundle.tensors if tensor.trainable]
        trained: list[str] = settings["trained"]
        names = [name for name in own if name in {*trained}]
        if not names:
            return None
        groups = [group for group in settings["groups"] if any(re.search(group["pattern"], name) for name in names)]
        optimizer = from_settings(model, {**settings, "trained": names, "groups": groups})
        if optimizer.subset is not None:
            places = tuple(trained.index(name) for name in optimizer.names)
            optimizer.subset = Within(optimizer.subset, places, len(trained))
        return cls(optimizer)

    def move(self, index: int) -> None:
        """Move the weights to the point of this index of the current step, if they are not at it or at a later one."""
        if not self._points:
            optimizer = self.optimizer
            self._parts = optimizer._parts_of(optimizer.step_number)
            self._points = list(optimizer._points(optimizer._draws()))
        while self._next <= index:
            self.optimizer._move(self._parts, self._at, self._points[self._next])
            self._at = self._points[self._next]
            self._next += 1

    def end(self, entry: Entry, step: int) -> None:
        """Take the step's update. The rest of its points come first, so that all roundings are those of a whole step.

        Parameters
        ----------
        entry : Entry
        step : int
            How many steps are taken then: one that is not in the journal does not count.
        """
        optimizer = self.optimizer
        self.move(0)
        self.move(len(self._points) - 1)
        if step > optimizer.step_number:
            optimizer._advance(entry)
        optimizer._defer(self._parts, self._at, entry)
        self._points, self._at, self._next = [], {}, 0

    def replay(self, entries: Sequence[Entry]) -> None:
        """Apply the steps of a journal."""
        self.optimizer.replay(entries)
