"""Selection of the trained weights, and settings per group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from pocketzo.arguments import check_number, compile_pattern
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
        check_number(f"group {self.pattern!r}: lr", self.lr)
        check_number(f"group {self.pattern!r}: eps", self.eps, positive=True)
        compile_pattern("a group's pattern", self.pattern)


def select(bundle: Bundle, trainable: str | Callable[[str], bool] | None) -> list[TensorSpec]:
    """Return the tensors to train."""
    tensors = [tensor for tensor in bundle.tensors if tensor.trainable]
    if trainable is None:
        chosen = tensors
    elif callable(trainable):
        chosen = [tensor for tensor in tensors if trainable(tensor.name)]
    else:
        pattern = compile_pattern("trainable", trainable)
        chosen = [tensor for tensor in tensors if pattern.search(tensor.name)]
    if not chosen:
        raise ValueError(f"trainable={trainable!r} matches none of the {len(tensors)} weights that could be trained")
    return chosen
