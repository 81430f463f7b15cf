"""Checks of the weights that a run starts from: they are the bundle's and finite, and eps fits their magnitude."""

from __future__ import annotations

import math
import os

import numpy as np

from pocketzo.errors import BundleError
from pocketzo.formats.bundle import FLOATS
from pocketzo.formats.safetensors import file_sha256
from pocketzo.optim.groups import ParamGroup
from pocketzo.optim.optimizer import Optimizer
from pocketzo.runtime.model import Model
from pocketzo.runtime.weights import Weights
from pocketzo.train.recipe import BaseModel

_ROUNDING = {"float32": 2.0**-24, "float16": 2.0**-11}  # largest relative error of rounding to nearest
_MOST_DRIFT = 0.1  # of the weights' root mean square, by the roundings of all shifts of a run
_LEAST_MOVED = 0.01  # share of the weights that a shift should change, roughly


def check_start(optimizer: Optimizer, steps: int) -> None:
    """Refuse weights that are not finite, and an eps that loses the weights or does not change them.

    A shift forth and back leaves a rounding error of about eps times the relative rounding. The errors of a run's
    shifts add up like a random walk.

    Parameters
    ----------
    optimizer : Optimizer
        The weights are those of its model; it may not have taken a step.
    steps : int
        Length of the run.

    Raises
    ------
    BundleError
        A trained weight holds NaN or infinity, or a frozen one NaN; names it.
    ValueError
        eps is too large or too small; with figures.
    """
    bundle, weights = optimizer.model.bundle, optimizer.model.weights
    groups: dict[ParamGroup, list[tuple[str, float, int]]] = {}
    for tensor in bundle.tensors:
        if tensor.dtype not in FLOATS:
            continue
        squares = sum_of_squares(weights, tensor.name)
        trained = tensor.name in optimizer.names
        if math.isnan(squares) or (trained and math.isinf(squares)):
            file, _ = bundle.places[tensor.name]
            raise BundleError(
                f"{file}: weight {tensor.name!r} holds NaN or infinity, which every step would spread: export "
                "the model again, or take another checkpoint"
            )
        if trained:
            groups.setdefault(optimizer.group_of(tensor.name), []).append(
                (tensor.dtype, squares, math.prod(tensor.shape))
            )
    for group, members in groups.items():
        eps = optimizer.eps * group.eps
        rounding = max(_ROUNDING[dtype] for dtype, _, _ in members)
        size = math.sqrt(sum(squares for _, squares, _ in members) / max(1, sum(count for *_, count in members)))
        of = f" of group {group.pattern!r}" if group.pattern else ""
        shifts = steps * optimizer.forwards
        drift = eps * rounding * math.sqrt(shifts)
        if not optimizer.exact and 0 < size * _MOST_DRIFT < drift:
            raise ValueError(
                f"eps {eps:g} is too large for weights{of} of root mean square {size:.3g}: the roundings of {shifts:,} "
                f"shifts forth and back would change them by about {drift:.3g}. Try an eps of {size / 10:.1g} or less"
            )
        if eps < size * rounding * _LEAST_MOVED:
            raise ValueError(
                f"eps {eps:g} is too small for weights{of} of root mean square {size:.3g}: {members[0][0]} has a "
                f"spacing of about {2 * size * rounding:.2g} there, so that hardly any weight would be shifted. Try an "
                f"eps of about {max(size / 100, 10 * size * rounding):.1g}"
            )


def base_of(model: Model) -> BaseModel:
    """Describe the bundle that a run starts from; raise a ValueError if the weights in memory are others.

    Those in ``model.init`` have to be these.
    """
    bundle = model.bundle
    trained = file_sha256(bundle.trained_path)
    if model.init:
        begun = bundle.map_tensors() | model.init
        same = all(np.array_equal(model.weights[name], begun[name]) for name in model.weights)
    else:
        same = model.weights.sha256() == trained
    if not same:
        raise ValueError(
            f"the weights in memory are not those of {bundle.path}, from which the journal would be replayed: save the "
            f"model, load what was saved, and train that"
        )
    path = os.fspath(bundle.path.resolve())
    if bundle.adapter is None:
        return BaseModel(path, bundle.graph_sha256, trained)
    return BaseModel(path, bundle.graph_sha256, file_sha256(bundle.weights_path), trained)


def sum_of_squares(weights: Weights, name: str) -> float:
    """Return the sum of a weight's squares; NaN if an element is NaN, infinity if one is infinite and none NaN."""
    total = 0.0
    for block in weights.blocks(name):
        with np.errstate(over="ignore", invalid="ignore"):
            values = block.astype(np.float32, copy=False)
            squares = float(np.einsum("i,i->", values, values))
            if not math.isfinite(squares):  # or the squares alone overflow
                values64 = block.astype(np.float64)
                squares = float(np.einsum("i,i->", values64, values64))
        total += squares
    return total
