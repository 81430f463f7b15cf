"""A head: the parameters that a bundle's graph reads, its scores in numpy, and its file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from pocketzo.errors import JournalError
from pocketzo.formats.safetensors import map_tensors, write
from pocketzo.formats.side import BIAS, last_name, query_name, weight_name
from pocketzo.train.head.attention import Heads, Tokens, forward
from pocketzo.train.head.pooled import Pooling
from pocketzo.train.head.states import States

Singles = NDArray[np.float32]


@dataclass(frozen=True)
class Head:
    """Parameters of a side head.

    Attributes
    ----------
    layers : tuple of int
        The taps that it reads.
    weights : list of ndarray of float32, shape [size, columns]
        By tap.
    queries : list of ndarray of float32, shape [size, queries]
        By tap.
    bias : ndarray of float32, shape [columns]
    last : list of ndarray of float32, shape [size, columns], or None
        By tap, the weights of the last token alone; None for models that are not causal.
    """

    layers: tuple[int, ...]
    weights: list[Singles]
    queries: list[Singles]
    bias: Singles
    last: list[Singles] | None

    def scores(self, states: States, layers: Sequence[int]) -> Singles:
        """Return the scores, [rows, columns], of states of some layers."""
        taps = [states.taps[layers.index(layer)] for layer in self.layers]
        counts = states.real.sum(axis=1)
        tokens = Tokens([tap[states.real] for tap in taps], np.cumsum(counts) - counts)
        heads = Heads([one[:, None] for one in self.weights], [one[:, None] for one in self.queries], self.bias[None])
        scores: Singles = forward(heads, tokens).scores[:, 0]
        for layer, weight in zip(self.layers, self.last or [], strict=False):
            scores = scores + states.pooled(layers.index(layer), "last") @ weight
        return scores

    def scores_of_pooled(self, pooled: Mapping[tuple[int, Pooling], Singles]) -> Singles:
        """Return the scores, [rows, columns], of pooled states, for a head without attention pooling."""
        scores = self.bias
        for layer, weight in zip(self.layers, self.weights, strict=True):
            scores = scores + pooled[layer, "mean"] @ weight
        for layer, weight in zip(self.layers, self.last or [], strict=False):
            scores = scores + pooled[layer, "last"] @ weight
        return scores

    def tensors(self) -> dict[str, Singles]:
        """Return the parameters by the names that they have in a bundle's graph."""
        found = {BIAS: self.bias[None]}
        for layer, weight, query in zip(self.layers, self.weights, self.queries, strict=True):
            found |= {query_name(layer): query, weight_name(layer): weight}
        return found | {last_name(layer): last for layer, last in zip(self.layers, self.last or [], strict=False)}

    def save(self, path: Path) -> None:
        """Write the parameters to a safetensors file."""
        write(path, list(self.tensors().items()))

    @classmethod
    def read(cls, path: Path, layers: Sequence[int]) -> Self:
        """Read what :meth:`save` wrote.

        Raises
        ------
        JournalError
            A parameter is missing.
        """
        found: Mapping[str, NDArray[Any]] = map_tensors(path)
        last = [np.array(found[last_name(layer)]) for layer in layers if last_name(layer) in found]
        try:
            return cls(
                tuple(layers),
                [np.array(found[weight_name(layer)]) for layer in layers],
                [np.array(found[query_name(layer)]) for layer in layers],
                np.array(found[BIAS][0]),
                last or None,
            )
        except KeyError as error:
            raise JournalError(f"{path}: no tensor {error} of the head in it") from None
