"""Checks that a session sees what is written to its weights.

The weights are filled with noise for them. The reference is a session that optimises nothing, and so has no copy of a
weight: if another session had a stale copy of one, the outputs of the two would differ by far more than roundings.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pocketzo._core import TERM, Segments
from pocketzo.errors import DeadWeightError, NotPrepackableError
from pocketzo.formats.bundle import Bundle, TensorSpec
from pocketzo.runtime.model import Model
from pocketzo.runtime.outputs import float_outputs, outputs_match, unoptimised_outputs
from pocketzo.runtime.weights import Weights

Verify = Literal["auto", "fast", "full"]
"""How weights are checked; see :func:`pocketzo.load`."""

_AFFORDABLE = 2.0  # seconds; if "full" takes longer, "auto" is "fast"


def check_plain(model: Model, verify: Verify) -> None:
    """Check a model whose weights are in the plain layout and noise; at the end they are read from the bundle.

    Raises
    ------
    DeadWeightError
        The session does not see what is written to a trainable weight; names it.
    """
    bundle, weights = model.bundle, model.weights
    # Where onnxruntime computes in fp16, a fused operator rounds less often than those that it replaces.
    tolerance = 3e-2 if bundle.is_fp16 else 1e-3

    def matches() -> bool:
        expected = unoptimised_outputs(bundle, weights.image.values)
        return outputs_match(float_outputs(bundle, model._session), expected, tolerance)

    try:
        match = matches()
        unseen = unseen_weights(model) if not match or _is_full(verify, model) else []
        if not match and not unseen:
            unseen = _partly_unseen(model, matches)
    finally:
        weights.read()
    if unseen:
        names = ", ".join(unseen[:5]) + (f" and {len(unseen) - 5} more" if len(unseen) > 5 else "")
        raise DeadWeightError(
            f"{bundle.path}: the session does not see what is written to {names}. Prepare the model again with "
            f"`pocketzo prepare`, or leave these out of what is trainable"
        )
    if not match:
        raise DeadWeightError(
            f"{bundle.path}: the session's outputs differ from those of a session without optimisations, though "
            f"every single weight is seen"
        )


def check_prepacked(model: Model, expected: NDArray[np.float64], verify: Verify) -> None:
    """Check a model whose weights are prepacked and noise; at the end they are read from the bundle.

    Parameters
    ----------
    model : Model
    expected : ndarray of float64
        The result of :func:`noise_outputs`.
    verify : {"auto", "fast", "full"}

    Raises
    ------
    NotPrepackableError
        The session does not see all that is written.
    """
    try:
        match = outputs_match(float_outputs(model.bundle, model._session), expected)
        unseen = unseen_weights(model) if not match or _is_full(verify, model) else []
    finally:
        model.weights.read()
    if unseen:
        raise NotPrepackableError(f"the session does not see all that is written to {', '.join(unseen[:5])}")
    if not match:
        raise NotPrepackableError("the outputs differ from those of a session without optimisations")


def noise_outputs(bundle: Bundle) -> NDArray[np.float64]:
    """Return the outputs of a session that optimises nothing, over weights of noise, which are freed at the end."""
    weights = Weights(bundle)
    read_as_noise(weights, bundle)
    return unoptimised_outputs(bundle, weights.image.values)


def unseen_weights(model: Model) -> list[str]:
    """Change one trainable weight after the other, and return the names of those that change no output."""

    def outputs() -> NDArray[np.float64]:
        return float_outputs(model.bundle, model._session)

    unseen = []
    before = outputs()
    for tensor in _trainable(model.bundle):
        write_noise(model.weights, [tensor], draw=1)
        after = outputs()
        if np.array_equal(before, after, equal_nan=True):
            # It may be live and without effect, as is the bias of attention keys, which the softmax cancels. A NaN
            # shows wherever it is read.
            model.weights.fill(tensor.name, np.nan)
            if np.isnan(outputs()).sum() <= np.isnan(before).sum():
                unseen.append(tensor.name)
            write_noise(model.weights, [tensor], draw=1)
        before = after
    return unseen


def _partly_unseen(model: Model, matches: Callable[[], bool]) -> list[str]:
    # Each is seen somewhere, but a use of one was folded into a copy. On the stored weights all copies are right, so
    # that changing one weight at a time shows which.
    unseen = []
    model.weights.read()
    for tensor in _trainable(model.bundle):
        write_noise(model.weights, [tensor])
        if not matches():
            unseen.append(tensor.name)
        model.weights.read()
    return unseen


def _is_full(verify: Verify, model: Model) -> bool:
    if verify != "auto":
        return verify == "full"
    started = time.perf_counter()
    float_outputs(model.bundle, model._session)
    return (time.perf_counter() - started) * len(_trainable(model.bundle)) <= _AFFORDABLE


def read_as_noise(weights: Weights, bundle: Bundle) -> None:
    """Read weights that are not trainable, and write noise to those that are."""
    if not all(tensor.trainable for tensor in bundle.tensors):
        weights.read()
    write_noise(weights, _trainable(bundle))


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


def _trainable(bundle: Bundle) -> list[TensorSpec]:
    return [tensor for tensor in bundle.tensors if tensor.trainable]
