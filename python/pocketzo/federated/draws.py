"""Which directions the clients of a round evaluate, and how their scalars become one step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pocketzo.federated.plan import Plan
from pocketzo.federated.protocol import Answer
from pocketzo.formats.journal import Entry
from pocketzo.optim.program import float32


def draws_of_round(plan: Plan, next_draw: int, clients: Sequence[str]) -> dict[str, range]:
    """Return the draws of each client of a round: ranges that follow each other, or the same for all."""
    count = plan.queries
    if plan.shared_draws:
        return dict.fromkeys(clients, range(next_draw, next_draw + count))
    return {
        client: range(next_draw + place * count, next_draw + (place + 1) * count)
        for place, client in enumerate(clients)
    }


def merge(answers: Mapping[str, Answer], draws: Mapping[str, range], *, lr: float, clip: float) -> Entry:
    """Return the step of all answers: their clipped scalars, weighted by examples.

    Every operation is in float64 and in this order: a coefficient is lr * (examples / all examples) * scalar, added up
    over the clients in the order of their names where they share a draw, and rounded to float32.

    Parameters
    ----------
    answers : mapping of str to Answer
        By client, at least one.
    draws : mapping of str to range
        The draws of each client.
    lr : float
        Of the step.
    clip : float
        The largest absolute value of a scalar.
    """
    total = sum(answer.examples for answer in answers.values())
    coefficients: dict[int, float] = {}
    for client in sorted(answers, key=lambda client: (draws[client].start, client)):
        weight = answers[client].examples / total
        for draw, scalar in zip(draws[client], answers[client].scalars, strict=True):
            clipped = min(max(scalar, -clip), clip)
            coefficients[draw] = coefficients.get(draw, 0.0) + lr * weight * clipped
    return Entry(lr, {draw: float32(value) for draw, value in coefficients.items()})
