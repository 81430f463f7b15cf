"""A stage on its device: a part of the model, and the optimizer of the trained tensors in it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from pocketzo.errors import BundleError, Error, joined_lines
from pocketzo.formats.bundle import Bundle
from pocketzo.formats.journal import Entry
from pocketzo.formats.stage import StageSpec
from pocketzo.machine.memory import process_memory
from pocketzo.optim.follower import Follower
from pocketzo.runtime.load import load
from pocketzo.runtime.slices import Slices

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class StageInfo:
    """What the device that leads the run has to know of a stage.

    Attributes
    ----------
    spec : StageSpec
    inputs : frozenset of str
        The inputs of its graph.
    trained : frozenset of str
        The tensors in it that can be trained.
    threads : int
    not_prepacked_because : str or None
    slices : Slices
    """

    spec: StageSpec
    inputs: frozenset[str]
    trained: frozenset[str]
    threads: int
    not_prepacked_because: str | None
    slices: Slices


class Stage:
    """A stage that is loaded.

    Parameters
    ----------
    path : path
        A folder that :func:`pocketzo.pipeline.split.split` wrote.
    threads : int, optional
        See :func:`pocketzo.load`.
    max_memory : int, optional
        See :func:`pocketzo.load`.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, threads: int | None = None, max_memory: int | None = None
    ) -> None:
        bundle = Bundle.read(path)
        if bundle.stage is None:
            raise BundleError(
                f"{path}: a whole bundle, and no stage of one; make stages with 'pocketzo pipeline split'"
            )
        self.spec = bundle.stage
        self.model = load(bundle, threads=threads, max_memory=max_memory)
        self._inputs = frozenset(value.name for value in bundle.inputs)
        self._follower: Follower | None = None
        self._path = Path(path)

    def info(self) -> StageInfo:
        """Describe the stage."""
        model = self.model
        return StageInfo(
            spec=self.spec,
            inputs=self._inputs,
            trained=frozenset(tensor.name for tensor in model.bundle.tensors if tensor.trainable),
            threads=model.threads,
            not_prepacked_because=model.not_prepacked_because,
            slices=model.slices,
        )

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Set the weights to those of the bundle, and get ready for the first step.

        Parameters
        ----------
        settings : mapping
            Of the optimizer of the whole model, with ``exact``.
        """
        self.model.weights.read()
        self._follower = Follower.from_settings(self.model, settings)

    def forward(
        self, point: int | None, feed: Arrays, given: Arrays, outputs: Sequence[str]
    ) -> dict[str, NDArray[Any]]:
        """Run the stage.

        Parameters
        ----------
        point : int or None
            The point of the current step at which the weights have to be; None for where they are.
        feed : mapping of str to ndarray
            The inputs of the whole model that the stage has.
        given : mapping of str to ndarray
            What the stage before gives.
        outputs : sequence of str
            Which outputs of the model the last stage computes.

        Returns
        -------
        dict of str to ndarray
            What the next stage takes, or the outputs.
        """
        if point is not None and self._follower is not None:
            self._follower.move(point)
        spec, model = self.spec, self.model
        model.weights.flush()
        names = list(outputs) if spec.is_last else [name for name in spec.gives if name not in spec.passed]
        fed = {**feed, **{name: array for name, array in given.items() if name in self._inputs}}
        try:
            found = dict(zip(names, model._run(names, fed, {}), strict=True)) if names else {}
        except (ValueError, Error):
            raise
        except Exception as error:  # onnxruntime's own exceptions share no public base
            raise Error(f"{self._path}: the stage cannot be run on this batch: {joined_lines(error)}") from error
        if spec.is_last:
            return found
        return {name: given[name] if name in spec.passed else found[name] for name in spec.gives}

    def end(self, entry: Entry, step: int) -> None:
        """Take the update of the current step, after which so many are taken; see :meth:`Follower.end`."""
        if self._follower is not None:
            self._follower.end(entry, step)

    def replay(self, entries: Sequence[Entry]) -> None:
        """Take the steps of a journal."""
        if self._follower is not None and entries:
            self._follower.replay(entries)

    def trained(self) -> dict[str, NDArray[Any]]:
        """Return the trained tensors as they are now."""
        return {
            tensor.name: self.model.weights[tensor.name] for tensor in self.model.bundle.tensors if tensor.trainable
        }

    def process(self) -> int:
        """Return the id of the process."""
        return os.getpid()

    def peak(self) -> int | None:
        """Return the largest memory of this process so far, in bytes; None if the system does not report it."""
        return process_memory()[1]
