"""Selection of the trained weights, and settings per group."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from pocketzo.formats.bundle import Bundle, TensorSpec
from pocketzo.runtime.weights import Weights


class Tunable(Protocol):
    """Target of a replay; a :class:`Model` is one that can also be stepped."""

    @property
    def bundle(self) -> Bundle:
        """The bundle that the weights belong to."""

    @property
    def weights(self) -> Weights:
        """The weights that are updated."""


@dataclass(frozen=True)
class ParamGroup:
    """Settings for the weights whose names match ``pattern`` (``re.search``), as factors of the optimizer's own.

    A new head needs a larger ``lr`` and ``eps`` than a pretrained body. With a factor of 0 for ``lr``, weights change
    only by the rounding of the perturbations.
    """

    pattern: str
    lr: float = 1.0
    eps: float = 1.0

    def __post_init__(self) -> None:
        if not (self.lr >= 0 and self.eps > 0 and math.isfinite(self.lr) and math.isfinite(self.eps)):
            raise ValueError(f"group {self.pattern!r}: lr must be >= 0 and eps > 0, got {self.lr} and {self.eps}")


def select(model: Tunable, trainable: str | Callable[[str], bool] | None) -> list[TensorSpec]:
    """Return the tensors to train."""
    tensors = [tensor for tensor in model.bundle.tensors if tensor.trainable]
    if trainable is None:
        chosen = tensors
    elif callable(trainable):
        chosen = [tensor for tensor in tensors if trainable(tensor.name)]
    else:
        pattern = re.compile(trainable)
        chosen = [tensor for tensor in tensors if pattern.search(tensor.name)]
    if not chosen:
        raise ValueError(f"trainable={trainable!r} matches none of the {len(tensors)} weights that could be trained")
    return chosen
