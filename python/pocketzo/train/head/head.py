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
from pocketzo.formats.side import BIAS, LAST, ONLY_LAST, query_name, weight_name
from pocketzo.train.head.attention import Heads, Tokens, forward
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
    last : bool
        Whether it reads the last token of each text alone.
    """

    layers: tuple[int, ...]
    weights: list[Singles]
    queries: list[Singles]
    bias: Singles
    last: bool

    def scores(self, states: States, layers: Sequence[int]) -> Singles:
        """Return the scores, [rows, columns], of states of some layers."""
        taps = [states.taps[layers.index(layer)] for layer in self.layers]
        if self.last:
            pooled = [states.pooled(layers.index(layer), "last") for layer in self.layers]
            total: Singles = self.bias + sum(one @ weight for one, weight in zip(pooled, self.weights, strict=True))
            return total
        counts = states.real.sum(axis=1)
        tokens = Tokens([tap[states.real] for tap in taps], np.cumsum(counts) - counts)
        heads = Heads([one[:, None] for one in self.weights], [one[:, None] for one in self.queries], self.bias[None])
        return forward(heads, tokens).scores[:, 0]

    def tensors(self, *, causal: bool) -> dict[str, Singles]:
        """Return the parameters by the names that they have in a bundle's graph."""
        found = {BIAS: self.bias[None]}
        if causal:
            found[LAST] = np.full(1, ONLY_LAST if self.last else 0, np.float32)
        for layer, weight, query in zip(self.layers, self.weights, self.queries, strict=True):
            found |= {query_name(layer): query, weight_name(layer): weight}
        return found

    def save(self, path: Path) -> None:
        """Write the parameters to a safetensors file."""
        write(path, list(self.tensors(causal=True).items()))

    @classmethod
    def read(cls, path: Path, layers: Sequence[int]) -> Self:
        """Read what :meth:`save` wrote.

        Raises
        ------
        JournalError
            A parameter is missing.
        """
        found: Mapping[str, NDArray[Any]] = map_tensors(path)
        try:
            return cls(
                tuple(layers),
                [np.array(found[weight_name(layer)]) for layer in layers],
                [np.array(found[query_name(layer)]) for layer in layers],
                np.array(found[BIAS][0]),
                bool(found[LAST][0]),
            )
        except KeyError as error:
            raise JournalError(f"{path}: no tensor {error} of the head in it") from None
