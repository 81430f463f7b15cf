"""Discriminative sampling: of several candidate directions, those that are most parallel to the last update."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pocketzo.formats.bundle import TensorSpec
from pocketzo.formats.journal import Entry
from pocketzo.kernels import Distribution, products


def cosines(
    candidates: Sequence[int],
    last: Entry,
    tensors: Sequence[tuple[TensorSpec, float]],
    *,
    seed: int,
    distribution: Distribution = "gaussian",
) -> list[float]:
    """Return the cosine of each candidate direction to a step's update, from the draws alone.

    The update moves a tensor by its factor of lr times ``sum_j coefficient_j z(draw_j)``, and one along a candidate
    moves it by that factor times ``z(candidate)``; weight decay is left out. Every operation is specified
    (cpp/SPEC.md, section 6; then float64, in the order of ``tensors``), so that any machine gets the same numbers.

    Parameters
    ----------
    candidates : sequence of int
        Draws.
    last : Entry
        The step.
    tensors : sequence of (TensorSpec, float)
        What is trained, and the factors of lr.
    seed : int
        Of the run.
    distribution : {"gaussian", "rademacher"}
        Of the directions' elements.

    Returns
    -------
    list of float
        0 where a direction or the update moves nothing.
    """
    vectors = [dict(last.coefficients), *({draw: 1.0} for draw in candidates)]
    sums = [(0.0, 0.0)] * len(vectors)
    for tensor, lr in tensors:
        size = math.prod(tensor.shape)
        if not size or not lr:
            continue
        found = products(size, vectors, seed=seed, tensor=tensor.id, distribution=distribution).tolist()
        sums = [(a + lr * lr * c, b + lr * lr * d) for (a, b), (c, d) in zip(sums, found, strict=True)]
    length = math.sqrt(sums[0][1])
    scales = [math.sqrt(square) * length for _, square in sums[1:]]
    values = [across / scale if scale else 0.0 for (across, _), scale in zip(sums[1:], scales, strict=True)]
    return [value if math.isfinite(value) else 0.0 for value in values]


def choose(
    candidates: Sequence[int],
    last: Entry | None,
    tensors: Sequence[tuple[TensorSpec, float]],
    *,
    count: int,
    seed: int,
    distribution: Distribution = "gaussian",
) -> list[int]:
    """Return the ``count`` candidates with the largest ``|cosine|`` to the last accepted update, in their own order.

    A pure function of its arguments, with the same result on any machine. Of equal ones the first are taken; without
    a last update all are equal. The other parameters are those of :func:`cosines`.

    Parameters
    ----------
    last : Entry or None
        The last step that was not undone; None before there is one.
    count : int
        At most the number of candidates.
    """
    if last is None:
        return list(candidates[:count])
    values = cosines(candidates, last, tensors, seed=seed, distribution=distribution)
    best = sorted(range(len(candidates)), key=lambda index: -abs(values[index]))  # sorting is stable
    return [candidates[index] for index in sorted(best[:count])]
