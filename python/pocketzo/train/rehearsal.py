"""Before the first step: try the largest batch, measure it, and estimate the time of the run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocketzo import kernels
from pocketzo.data.order import Data
from pocketzo.errors import MemoryLimitError
from pocketzo.machine.memory import process_memory
from pocketzo.optim.optimizer import Optimizer
from pocketzo.runtime.model import Batch, Model
from pocketzo.tasks.culprit import naming_culprit, where

_SAMPLED = 256  # steps whose batches are looked at for their lengths
_QUICK = 0.2  # seconds; a shorter pass is timed twice, as the first one of a shape also allocates
_SCRATCH = 1 << 20  # elements on which the kernels are timed


@dataclass(frozen=True)
class Forecast:
    """What is known of a run before its first step.

    Attributes
    ----------
    longest : int or None
        Tokens of the longest example; None if the data has no lengths.
    where : str or None
        The file and line of that example.
    forward_seconds : float
        Seconds of a forward pass of the largest batch; of all directions, where they are evaluated together.
    seconds : float
        Estimated seconds of all steps and evaluations that are left.
    evaluations : int
        Evaluations that are left.
    memory : int or None
        Peak memory of this process so far, in bytes; None where the system does not report it.
    """

    longest: int | None
    where: str | None
    forward_seconds: float
    seconds: float
    evaluations: int
    memory: int | None


class Rehearsal:
    """Forward passes of the largest batch that a run can have, and of a usual one.

    The largest batch holds the longest examples. It also holds those with the largest value of an integer input, such
    as a token that a model of another tokenizer does not have. The weights are only read.

    Parameters
    ----------
    model : Model
    data : Data
        If it has ``lengths``, an integer array [n], these are the examples' numbers of tokens. Otherwise all examples
        count as equally large.
    batch_size : int
    forward : callable
        Runs the model on a batch, as a step does.

    Attributes
    ----------
    largest : float
        Seconds of a forward pass of the largest batch.

    Raises
    ------
    DataError
        The model cannot be run on an example; names file, line and reason.
    MemoryLimitError
        The largest batch takes more memory than ``max_memory``.
    """

    def __init__(self, model: Model, data: Data, batch_size: int, forward: Callable[[Batch], object]) -> None:
        self._model = model
        self._data = data
        self._batch_size = batch_size
        self._forward = forward
        self.lengths = lengths_of(data)
        first, *others = largest_batches(data, batch_size)
        self.largest = self._timed(first)
        for indices in others:
            self._timed(indices)

    def _timed(self, indices: NDArray[np.int64]) -> float:
        batch = self._data.batch(indices)
        try:
            with naming_culprit(self._model, self._data, indices):
                seconds = self._once(batch)
                return min(seconds, self._once(batch)) if seconds < _QUICK else seconds
        except MemoryLimitError as error:
            if self.lengths is None:
                raise
            longest = indices[self.lengths[indices].argmax()]
            raise MemoryLimitError(
                f"{error} (the longest example has {self.lengths[longest]} tokens: {where(self._data, int(longest))})"
            ) from None

    def _once(self, batch: Batch) -> float:
        started = time.perf_counter()
        self._forward(batch)
        return time.perf_counter() - started

    def mean(self, steps: Sequence[int], order: Callable[[int], NDArray[np.int64]]) -> float:
        """Estimate the mean seconds of a forward pass over some steps.

        The time is taken to grow linearly with the length of the longest example of a batch, between the batch of
        median length, which is timed, and the largest one.
        """
        if self.lengths is None:
            return self.largest
        batches = [order(step) for step in steps[:_SAMPLED]]
        widths = np.array([self.lengths[indices].max() for indices in batches])
        usual = int(np.argsort(widths, kind="stable")[len(widths) // 2])
        most, median = int(self.lengths.max()), int(widths[usual])
        if median == most:
            return self.largest
        seconds = min(self._timed(batches[usual]), self.largest)
        slope = (self.largest - seconds) / (most - median)
        return max(seconds + slope * (float(widths.mean()) - median), 0.0)

    def forecast(
        self,
        optimizer: Optimizer,
        steps: Sequence[int],
        order: Callable[[int], NDArray[np.int64]],
        evaluations: int,
        examples: int,
        evaluation_seconds: float | None,
    ) -> Forecast:
        """Return the forecast of a run.

        Parameters
        ----------
        optimizer : Optimizer
        steps : sequence of int
            The steps that are left.
        order : callable
            Returns the numbers of a step's examples.
        evaluations, examples : int
            The evaluations that are left, and the examples of each.
        evaluation_seconds : float or None
            Seconds of an evaluation, if one was timed.
        """
        forward = self.mean(steps, order) / (1 if optimizer.share is None else optimizer.forwards)
        seconds = len(steps) * (optimizer.forwards * forward + optimizer.passes * pass_seconds(optimizer))
        if evaluation_seconds is None:
            evaluation_seconds = forward * examples / self._batch_size
        seconds += evaluations * evaluation_seconds
        longest = None if self.lengths is None else int(self.lengths.argmax())
        return Forecast(
            longest=None if self.lengths is None or longest is None else int(self.lengths[longest]),
            where=None if longest is None else where(self._data, longest),
            forward_seconds=self.largest,
            seconds=seconds,
            evaluations=evaluations,
            memory=process_memory()[1],
        )


def lengths_of(data: Data) -> NDArray[np.integer[Any]] | None:
    """Return the numbers of tokens of the examples, shape [n]; None if the data does not have them."""
    lengths = np.asarray(getattr(data, "lengths", None))
    return lengths if lengths.shape == (len(data),) and lengths.dtype.kind in "iu" else None


def largest_batches(data: Data, batch_size: int) -> list[NDArray[np.int64]]:
    """Return the numbers of the longest examples that one batch can hold, and of those with extreme values.

    There is one batch, unless the examples with extreme values are more than a batch holds.
    """
    lengths = lengths_of(data)
    longest = np.arange(len(data)) if lengths is None else np.argsort(-lengths.astype(np.int64), kind="stable")
    extremes: list[int] = getattr(data, "extremes", list)()
    needed = dict.fromkeys([int(longest[0]), *extremes])
    batches = -(-len(needed) // batch_size)
    indices = list(dict.fromkeys([*needed, *longest[: batches * batch_size].tolist()]))
    return list(np.resize(np.array(indices[: batches * batch_size], np.int64), (batches, batch_size)))


def pass_seconds(optimizer: Optimizer) -> float:
    """Estimate the seconds of one pass of the kernels over the weights of a step, from a pass over a small array."""
    size = min(optimizer.parameters, _SCRATCH)
    dtype = next(tensor.dtype for tensor in optimizer.model.bundle.tensors if tensor.name in optimizer.names)
    scratch = np.ones(size, dtype)
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        kernels.perturb(scratch, seed=0, tensor=0, draw=0, scale=1e-3, distribution=optimizer.distribution)
        seconds.append(time.perf_counter() - started)
    share = 1.0
    if optimizer.subset is not None:
        count = len(optimizer.names)
        share = len(optimizer.subset(seed=optimizer.seed, step=optimizer.step_number, count=count)) / count
    return min(seconds) * share * optimizer.parameters / size
