"""Noise in place of weights, to check a session with values that do not depend on what is stored."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from pocketzo._core import TERM, Segments
from pocketzo.formats.bundle import Bundle, TensorSpec
from pocketzo.runtime.weights import Weights


def read_as_noise(weights: Weights, bundle: Bundle, draw: int = 0) -> None:
    """Read weights that are not trainable, and write noise to those that are."""
    if not all(tensor.trainable for tensor in bundle.tensors):
        weights.read()
    write_noise(weights, trainable(bundle), draw)


def write_noise(weights: Weights, tensors: Iterable[TensorSpec], draw: int = 0) -> None:
    """Write noise, scaled so that activations stay moderate and every weight matters: a stored head may be zeros."""
    for tensor in tensors:
        shape = tensor.shape
        terms = np.zeros(1, TERM)
        terms["draw"] = draw
        terms["count"] = 1
        factors = shape[:1] if len(shape) == 2 else shape[1:]
        terms["scale"][0, 0] = 0.5 if len(shape) < 2 else 1 / np.sqrt(np.prod(factors))
        weights.fill(tensor.name, 0)
        Segments(weights.segments(tensor.name)).apply(terms)


def disturb(weights: Weights, tensors: Iterable[TensorSpec]) -> None:
    """Scale the elements of weights by 0.75 and 1.25 in turn: they keep their kind, and copies of them differ."""
    for tensor in tensors:
        array = np.array(weights[tensor.name])
        elements = array.reshape(-1)
        elements[::2] *= 0.75
        elements[1::2] *= 1.25
        weights[tensor.name] = elements.reshape(array.shape)


def trainable(bundle: Bundle) -> list[TensorSpec]:
    """Return the weights that training may change."""
    return [tensor for tensor in bundle.tensors if tensor.trainable]
