"""What a run will need: its longest batch is evaluated before the first step."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pocketzo import kernels
from pocketzo.data.order import Data
from pocketzo.errors import DataError, Error, MemoryLimitError
from pocketzo.machine.memory import process_memory
from pocketzo.optim.optimizer import Optimizer

Forward = Callable[[Mapping[str, NDArray[Any]]], object]
_SAMPLED = 50  # steps whose batches' lengths stand for all
_SLOW = 2.0  # seconds; a slower forward pass is timed once
_SCRATCH = 1 << 20  # elements, on which a pass over the weights is timed


@dataclass(frozen=True)
class Forecast:
    """What a run will need.

    Attributes
    ----------
    examples : int
        Examples of the longest batch.
    tokens : int
        Of its longest example.
    forward_seconds : float
        Seconds of a forward pass of the longest batch.
    peak : int or None
        Peak memory of this process in bytes, after that; None where the system does not report it.
    steps : int
        Steps that are left.
    seconds : float
        Estimate of the seconds that these will take, with their evaluations.
    """

    examples: int
    tokens: int
    forward_seconds: float
    peak: int | None
    steps: int
    seconds: float


class Longest(NamedTuple):
    """The longest examples that one batch can hold, and the time of a forward pass."""

    batch: Mapping[str, NDArray[Any]]
    tokens: int
    seconds: float


def check_longest(data: Data, batch_size: int, forward: Forward) -> Longest | None:
    """Evaluate the longest examples that one batch can hold; None if no lengths are known.

    Raises
    ------
    DataError
        The model cannot be run on an example of this length; names it, and the limit.
    Error
        The model cannot be run on these examples together.
    """
    lengths = _lengths(data)
    if lengths is None:
        return None
    chosen = np.resize(np.argsort(-lengths, kind="stable")[:batch_size], batch_size).astype(np.int64)
    batch = data.batch(chosen)
    tokens = int(lengths[chosen[0]])
    try:
        return Longest(batch, tokens, _timed(forward, batch))
    except MemoryLimitError as error:
        raise MemoryLimitError(f"the longest batch, up to {tokens} tokens: {error}") from None
    except Error as error:
        failure = error
    most = _most_tokens(data, lengths, forward)
    if most is None:  # a single example is no problem, or even the shortest is one
        raise failure
    first = int(np.flatnonzero(lengths > most)[0])
    others = int(np.count_nonzero(lengths > most)) - 1
    where = data.where(first) if hasattr(data, "where") else f"example {first}"
    raise DataError(
        f"{where}: {lengths[first]} tokens, and the model can be run on {most} at most"
        + (f" (and {others} other examples)" if others else "")
        + f"; to cut longer texts, prepare the model with --max-length {most}"
    )


def _most_tokens(data: Data, lengths: NDArray[np.integer[Any]], forward: Forward) -> int | None:
    """Return the largest length among the examples on which the model can be run; None if all or none can."""
    by_length = np.argsort(lengths, kind="stable")
    low, high = -1, len(by_length)  # runs, fails
    while high - low > 1:
        middle = (low + high) // 2
        try:
            forward(data.batch(by_length[middle : middle + 1]))
            low = middle
        except Error:
            high = middle
    return int(lengths[by_length[low]]) if -1 < low < len(by_length) - 1 else None


def forecast(
    *,
    optimizer: Optimizer,
    data: Data,
    order: Callable[[int], NDArray[np.int64]],
    steps: int,
    forward: Forward,
    evaluations: int,
    eval_data: Data | None,
    batch_size: int,
) -> Forecast | None:
    """Evaluate the longest batch and one of common length, and estimate the time of a run; None without lengths.

    Parameters
    ----------
    optimizer : Optimizer
    data : Data
        The training data.
    order : callable
        Returns the numbers of the examples of a step.
    steps : int
        The last step.
    forward : callable
        Runs the model on a batch as training does.
    evaluations : int
        The number of evaluations to come.
    eval_data : Data or None
    batch_size : int

    Raises
    ------
    DataError, Error
        As :func:`check_longest`.
    """
    longest, lengths = check_longest(data, batch_size, forward), _lengths(data)
    if longest is None or lengths is None:
        return None
    slowest = longest.seconds
    if slowest < _SLOW:
        slowest = min(slowest, _timed(forward, longest.batch))
    peak = process_memory()[1]
    first = optimizer.step_number
    sampled = range(first, max(first + 1, min(first + _SAMPLED, steps)))  # one at least
    widths = [int(lengths[order(step)].max()) for step in sampled]
    middle = int(np.argsort(widths)[len(widths) // 2])
    rate = _timed(forward, data.batch(order(first + middle))) / widths[middle]  # seconds a token of each example
    share = getattr(optimizer.subset, "share", 1.0)
    a_pass = share * optimizer.parameters * _seconds_per_element()
    a_step = optimizer.forwards * (rate * float(np.mean(widths)) + a_pass)
    an_evaluation = 0.0
    if eval_data is not None:
        eval_lengths = _lengths(eval_data)
        width = 1.0 if eval_lengths is None else float(eval_lengths.mean())
        an_evaluation = rate * width * len(eval_data) / batch_size
    return Forecast(
        examples=batch_size,
        tokens=longest.tokens,
        forward_seconds=slowest,
        peak=peak,
        steps=steps - first,
        seconds=(steps - first) * a_step + evaluations * an_evaluation,
    )


def _lengths(data: Data) -> NDArray[np.integer[Any]] | None:
    lengths = getattr(data, "lengths", None)
    return None if lengths is None else np.asarray(lengths)


def _timed(forward: Forward, batch: Mapping[str, NDArray[Any]]) -> float:
    started = time.perf_counter()
    forward(batch)
    return time.perf_counter() - started


def _seconds_per_element() -> float:
    """Return the seconds that a pass over the weights takes per element, from a pass over other memory."""
    scratch = np.zeros(_SCRATCH, np.float32)
    started = time.perf_counter()
    kernels.perturb(scratch, seed=0, tensor=0, draw=0, scale=1.0)
    return (time.perf_counter() - started) / _SCRATCH
