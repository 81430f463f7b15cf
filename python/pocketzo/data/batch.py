"""A batch: the model's inputs for some examples, and the numbers of these examples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Batch(Mapping[str, "NDArray[Any]"]):
    """A read-only mapping from the names of the model's inputs to arrays [batch, ...].

    The numbers of the examples are an attribute, not an item, so that they are not passed to the model as an input.

    Parameters
    ----------
    arrays : mapping of str to ndarray
        The inputs.
    examples : ndarray of int64, shape [batch]
        The number of each example in its dataset, from 0.

    Attributes
    ----------
    examples : ndarray of int64, shape [batch]
    """

    def __init__(self, arrays: Mapping[str, NDArray[Any]], examples: NDArray[np.int64]) -> None:
        self._arrays = dict(arrays)
        self.examples = examples

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def __repr__(self) -> str:
        inputs = ", ".join(f"{name} {value.dtype}{list(value.shape)}" for name, value in self._arrays.items())
        return f"Batch({inputs}; examples {self.examples.tolist()})"
