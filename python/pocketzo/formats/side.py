"""What a bundle says about its side head, which reads the outputs of several layers; and the names in its graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from pocketzo.formats.fields import Fields

BIAS: Final = "side.bias"
EPSILON: Final = 1e-6
"""Added to the mean square of a token's state, by whose root it is divided where the graph does not normalise it."""


def queries_of(columns: int) -> int:
    """Return how many queries a layer has: one for up to two columns of scores, else one for each."""
    return 1 if columns <= 2 else columns


def weight_name(layer: int) -> str:
    """Return the name of a tap's weight, [hidden, columns]."""
    return f"side.{layer}.weight"


def query_name(layer: int) -> str:
    """Return the name of a tap's queries, [hidden, queries]."""
    return f"side.{layer}.query"


def last_name(layer: int) -> str:
    """Return the name of a tap's weight of the last token alone, [hidden, columns]; of causal models."""
    return f"side.{layer}.last"


def tap_name(layer: int) -> str:
    """Return the name of the value of a tap, float32 [batch, sequence, hidden]."""
    return f"side.{layer}.tap"


def sum_name(layer: int) -> str:
    """Return the name of the scores up to a tap, float32 [batch, columns]."""
    return f"side.{layer}.sum"


class Tap(NamedTuple):
    """The output of a layer of a model, as it is in the graph.

    Attributes
    ----------
    layer : int
        The number of layers that compute it, from 1.
    name : str
        Of the value in the graph: floats [batch, sequence, hidden].
    size : int
        Of a token's hidden state.
    normalised : bool
        Whether the graph has normalised it. A sum of the residual stream is not.
    """

    layer: int
    name: str
    size: int
    normalised: bool

    def states(self, value: NDArray[Any]) -> NDArray[np.float32]:
        """Return the value as a side head reads it: float32, divided by its root mean square if not normalised."""
        states: NDArray[np.float32] = value.astype(np.float32, copy=False)
        if not self.normalised:
            states = states / np.sqrt(np.square(states).mean(axis=-1, keepdims=True) + np.float32(EPSILON))
        return states


@dataclass(frozen=True)
class SideTap:
    """The output of a layer that the head may read: the layer's number from 1, and the size of a token's state."""

    layer: int
    size: int


@dataclass(frozen=True)
class SideHead:
    """The field ``side`` of ``bundle.json``.

    Attributes
    ----------
    taps : tuple of SideTap
        By layer.
    layers : int
        Of the model as it was exported.
    causal : bool
        Whether the last token has seen all others.
    """

    taps: tuple[SideTap, ...]
    layers: int
    causal: bool

    def described(self) -> dict[str, Any]:
        """Return the field as JSON."""
        return {"taps": [vars(tap) for tap in self.taps], "layers": self.layers, "causal": self.causal}

    @classmethod
    def parse(cls, fields: Fields) -> Self:
        """Check the field; raises :class:`FieldError`."""
        layers = fields.integer("layers", 1, 2**16)
        taps = [
            SideTap(item.integer("layer", 1, layers), item.integer("size", 1, 2**24)) for item in fields.objects("taps")
        ]
        numbers = [tap.layer for tap in taps]
        if not taps or numbers != sorted(set(numbers)):
            raise fields.error("taps", "layers in order")
        causal = fields.plain().get("causal")
        if type(causal) is not bool:
            raise fields.error("causal", "true or false")
        return cls(tuple(taps), layers, causal)
