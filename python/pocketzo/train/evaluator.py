"""Evaluations of a run, on evaluation data or on some training data, and their lines in ``metrics.jsonl``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from pocketzo.data.dataset import fixed_batch
from pocketzo.data.order import Data
from pocketzo.runtime.model import Model
from pocketzo.tasks.culprit import where
from pocketzo.tasks.evaluate import Evaluation, evaluate_in_parts

PARTS: Final = 32
"""The most parts of the evaluation data, from which the standard error of a difference is computed."""


class Evaluator:
    """Evaluates one model on one dataset, always in the same batches.

    Parameters
    ----------
    model : Model
    data : Data
    batch_size : int
        Most examples per forward pass. There are fewer if the data has fewer than :data:`PARTS` batches.
    metrics : sequence of str or None
    activation_memory : int or None
        As for :func:`pocketzo.evaluate`.
    """

    def __init__(
        self,
        model: Model,
        data: Data,
        batch_size: int,
        metrics: Sequence[str] | None,
        activation_memory: int | None = None,
    ) -> None:
        self._model = model
        self._data = data
        self._metrics = metrics
        self._activation_memory = activation_memory
        parts = max(1, min(batch_size, -(-len(data) // PARTS)))
        self._batch_size = parts if fixed_batch(model.bundle) is None else batch_size

    def __call__(self) -> Evaluation:
        """Evaluate the model with its weights as they are."""
        return evaluate_in_parts(
            self._model,
            self._data,
            batch_size=self._batch_size,
            metrics=self._metrics,
            parts=PARTS,
            activation_memory=self._activation_memory,
        )


class Sample:
    """Some examples of a dataset, as a dataset.

    Parameters
    ----------
    data : Data
    indices : ndarray of integers, shape [n]
        The numbers of the examples.
    """

    def __init__(self, data: Data, indices: NDArray[np.int64]) -> None:
        self._data = data
        self._indices = indices
        self.fingerprint = f"{len(indices)} examples of {data.fingerprint}"

    def __len__(self) -> int:
        return len(self._indices)

    def batch(self, indices: NDArray[np.int64]) -> Mapping[str, NDArray[Any]]:
        """Return some of the examples as the graph's inputs."""
        return self._data.batch(self._indices[indices])

    def where(self, index: int) -> str:
        """Return the place of an example."""
        return where(self._data, int(self._indices[index]))

    @classmethod
    def of_run(cls, data: Data, order: Callable[[int], NDArray[np.int64]], steps: int, forwards: int) -> Self:
        """Return the examples of the first steps of a run, each once; whole batches, unless there is less than one.

        To evaluate them twice takes 2 % of the run's time, or less.
        """
        batches = [order(step) for step in range(min(steps * forwards // 100 + 1, steps, PARTS))]
        indices, size = np.unique(np.concatenate(batches)), len(batches[0])
        return cls(data, indices[: len(indices) // size * size or None])


def line_of(kind: str, step: int, evaluation: Evaluation) -> dict[str, Any]:
    """Return the line of an evaluation of a kind, :data:`EVAL` or :data:`SAMPLE`, after so many steps."""
    return {
        "step": step,
        kind: all_finite(evaluation.values),
        "without": {
            name: [finite(float(f"{value:.7g}")) for value in values] for name, values in evaluation.without.items()
        },
    }


def all_finite(values: Mapping[str, float | None] | None) -> dict[str, float | None] | None:
    """Return the values of an evaluation with None for infinity and NaN; None if there are none."""
    if values is None:
        return None
    return {name: None if value is None else finite(value) for name, value in values.items()}


def finite(value: float) -> float | None:
    """Return a number, or None for infinity and NaN, which JSON does not have."""
    return value if math.isfinite(value) else None
