"""The choice of the next token from the model's scores."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocketzo.arguments import check_integer, check_number
from pocketzo.errors import Error


def probabilities(logits: NDArray[Any], temperature: float, top_p: float) -> NDArray[np.float64]:
    """Return the distribution from which the next token is drawn.

    Parameters
    ----------
    logits : ndarray of floats, shape [vocabulary]
    temperature : float
        Divides the logits; greater than 0.
    top_p : float
        Only the most probable tokens, of at least this probability together, are kept: at least one.

    Returns
    -------
    ndarray of float64, shape [vocabulary]
    """
    scaled = logits.astype(np.float64) - logits.max()
    weights: NDArray[np.float64] = np.exp(scaled / temperature)
    weights /= weights.sum()
    if top_p < 1:
        order = np.argsort(-weights, kind="stable")
        kept = int(np.searchsorted(np.cumsum(weights[order]), top_p)) + 1
        weights[order[kept:]] = 0
        weights /= weights.sum()
    return weights


@dataclass
class Sampler:
    """Draws tokens; the same settings draw the same tokens from the same scores.

    Attributes
    ----------
    temperature : float
        0 takes the most probable token (the first of several). Greater values divide the logits before one is drawn.
    top_p : float
        In (0, 1]: see :func:`probabilities`.
    seed : int

    Raises
    ------
    TypeError, ValueError
        A setting is of the wrong type or out of range, or ``top_p`` is given and nothing is drawn.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    _random: np.random.Generator = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature)
        check_number("top_p", self.top_p, positive=True, most=1)
        check_integer("seed", self.seed, 0, 2**64 - 1)
        if self.top_p < 1 and not self.temperature:
            raise ValueError(f"top_p {self.top_p:g} has no effect at temperature 0: give a temperature, such as 1")
        self._random = np.random.Generator(np.random.PCG64(self.seed))

    def choose(self, logits: NDArray[Any]) -> int:
        """Return a token by its scores, shape [vocabulary].

        Raises
        ------
        Error
            A score is NaN, or the greatest is infinite: the weights are ruined.
        """
        if not np.isfinite(logits.max()):
            raise Error("the model's scores of the next token are not finite: its weights or its numbers overflowed")
        if not self.temperature:
            return int(logits.argmax())
        cumulative = np.cumsum(probabilities(logits, self.temperature, self.top_p))
        return int(np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right"))
