"""Checks that a session sees what is written to its weights.

The weights are filled with noise for them. The reference is a session that optimises nothing, and so has no copy of a
weight: if another session had a stale copy of one, the outputs of the two would differ by far more than roundings.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pocketzo.errors import BundleError, DeadWeightError, Error, NotPrepackableError
from pocketzo.formats.bundle import Bundle, TensorSpec
from pocketzo.formats.probe import Probe
from pocketzo.runtime.effect import Unseen, explain, without_effect
from pocketzo.runtime.model import Model
from pocketzo.runtime.noise import disturb, read_as_noise, trainable, write_noise
from pocketzo.runtime.outputs import (
    ROUNDINGS,
    Outputs,
    close,
    float_outputs,
    probe_batch,
    tolerance_of,
    unoptimised_outputs,
)
from pocketzo.runtime.queries import INSTEAD, repeated
from pocketzo.runtime.weights import Weights

Verify = Literal["auto", "fast", "full"]
"""How weights are checked; see :func:`pocketzo.load`."""

_AFFORDABLE = 2.0  # seconds; if "full" takes longer, "auto" is "fast"


def check_plain(model: Model, batches: list[Probe], expected: Outputs, verify: Verify) -> tuple[str, ...]:
    """Check a model whose trainable weights are in the plain layout; at the end they are read from the bundle.

    Parameters
    ----------
    model : Model
    batches, expected : list of dict of str to ndarray, list of ndarray of float64
        The result of :func:`unoptimised_outputs` over the same weights.
    verify : {"auto", "fast", "full"}

    Returns
    -------
    tuple of str
        The names of weights that change no output of any session, so that nothing can be said of them.

    Raises
    ------
    DeadWeightError
        The session does not see what is written to a trainable weight; names it.
    """
    bundle, weights = model.bundle, model.weights
    try:
        agree, telling = _compare(model, batches, expected)
        unseen = _unseen(model, lambda: weights) if not (agree and telling) or _is_full(verify, model) else Unseen()
        agree = agree and (telling or _agrees_disturbed(model))
        dead = unseen.dead if agree or unseen.dead else _partly_unseen(model)
    finally:
        weights.read()
    if dead:
        raise DeadWeightError(f"{bundle.path}: {_not_seen(dead, len(trainable(bundle)))}")
    if not agree:
        raise DeadWeightError(
            f"{bundle.path}: the session's outputs differ from those of a session without optimisations, though "
            f"every single weight is seen"
        )
    return unseen.idle


def check_prepacked(model: Model, batches: list[Probe], expected: Outputs, verify: Verify) -> tuple[str, ...]:
    """Check a model whose weights are prepacked and noise; at the end they are read from the bundle.

    Parameters
    ----------
    model : Model
    batches, expected : list of dict of str to ndarray, list of ndarray of float64
        The result of :func:`noise_outputs`.
    verify : {"auto", "fast", "full"}

    Returns
    -------
    tuple of str
        See :func:`check_plain`.

    Raises
    ------
    NotPrepackableError
        The session does not see all that is written.
    """

    def second_copy() -> Weights:
        if model.max_memory is not None:
            raise NotPrepackableError("to check some weights takes a second copy of all, and memory is limited")
        weights = Weights(model.bundle)
        read_as_noise(weights, model.bundle)
        return weights

    try:
        agree, telling = _compare(model, batches, expected)
        if not any(map(_is_telling, expected)):  # a copy of a weight for one of its uses would not show
            raise NotPrepackableError("with noise for weights all outputs are zero, which shows nothing of them")
        unseen = _unseen(model, second_copy) if not (agree and telling) or _is_full(verify, model) else Unseen()
    finally:
        model.weights.read()
    if unseen.dead:
        raise NotPrepackableError(f"the session does not see all that is written to {', '.join(unseen.dead[:5])}")
    if not agree:
        raise NotPrepackableError("the outputs differ from those of a session without optimisations")
    return unseen.idle


def check_groups(model: Model) -> None:
    """Check that a model which takes several directions computes the same as one after the other.

    The weights are noise at the end.

    Raises
    ------
    BundleError
        It does not, or cannot be run on the rows of the probing batch twice.
    """
    bundle, batch = model.bundle, probe_batch(model.bundle)
    names = [value.name for value in bundle.outputs if value.is_float and value.name != bundle.loss]
    values: list[Probe] = []
    expected = []
    for draw in (0, 7):
        write_noise(model.weights, trainable(bundle), draw)
        values.append({tensor.name: np.array(model.weights[tensor.name]) for tensor in trainable(bundle)})
        expected.append(model.run(batch, names))
    try:
        got = model.run(
            repeated(bundle, batch, 2), names, {name: np.stack([v[name] for v in values]) for name in values[0]}
        )
        same = all(
            close(
                got[name].ravel().astype(np.float64),
                np.concatenate([outputs[name].ravel() for outputs in expected]).astype(np.float64),
                tolerance_of(bundle),
            )
            for name in names
        )
    except Error as error:
        raise BundleError(
            f"{bundle.path}: several directions cannot be run in one forward pass, as the rows of the probing batch "
            f"cannot be given twice: {error}; {INSTEAD}"
        ) from error
    if not same:
        raise BundleError(
            f"{bundle.path}: several directions in one forward pass give other outputs than one after the other: is "
            f"there a trained tensor that is used beside the rows of a batch? {INSTEAD}"
        )


def noise_outputs(bundle: Bundle) -> tuple[list[Probe], Outputs]:
    """Return what :func:`unoptimised_outputs` does, over weights of noise, which are freed at the end."""
    weights = Weights(bundle)
    read_as_noise(weights, bundle)
    return unoptimised_outputs(bundle, weights.image.values)


def _not_seen(dead: tuple[str, ...], trained: int) -> str:
    """Name the weights that the session does not see, and how to freeze them."""
    names = ", ".join(dead[:5]) + (f" and {len(dead) - 5} more" if len(dead) > 5 else "")
    text = f"the session does not see what is written to {names}, which onnxruntime reads only once"
    if len(dead) == trained:
        return f"{text}. No other weight is left to train; export the model in another form"
    left = "|".join(map(re.escape, dead)) if len(dead) <= 5 else "..."
    return f"{text}. Freeze them: prepare the model with --train '^(?!({left})$)'"


def _compare(model: Model, batches: list[Probe], expected: Outputs) -> tuple[bool, bool]:
    """Return whether outputs agree, and whether that says something of the weights.

    Outputs that are all zero on one of the batches, as a ReLU may cause, agree with any weights.
    """
    got = [float_outputs(model.bundle, model._session, batch) for batch in batches]

    def within(tolerance: float) -> bool:
        return all(close(*values, tolerance) for values in zip(got, expected, strict=True))

    agree = within(ROUNDINGS) or within(tolerance_of(model.bundle))  # which reads the graph
    return agree, all(map(_is_telling, expected))


def _is_telling(values: NDArray[np.float64]) -> bool:
    return bool(np.any(values[np.isfinite(values)]))


def _agrees_disturbed(model: Model) -> bool:
    # Noise may not reach a threshold that the stored weights do. On these alone all copies of them are right.
    model.weights.read()
    disturb(model.weights, trainable(model.bundle))
    agree, _ = _compare(model, *unoptimised_outputs(model.bundle, model.weights.image.values))
    return agree


def _unseen(model: Model, reference: Callable[[], Weights]) -> Unseen:
    bundle, session, weights = model.bundle, model._session, model.weights
    tensors = without_effect(bundle, session, weights, trainable(bundle))
    return explain(bundle, session, weights, tensors, reference) if tensors else Unseen()


def _partly_unseen(model: Model) -> tuple[str, ...]:
    # Each is seen somewhere, but a use of one was folded into a copy. On the stored weights all copies are right, so
    # that changing one weight at a time shows which.
    def shows(tensor: TensorSpec, change: Callable[[Weights, list[TensorSpec]], None]) -> bool:
        model.weights.read()
        change(model.weights, [tensor])
        agree, _ = _compare(model, *unoptimised_outputs(model.bundle, model.weights.image.values))
        return not agree

    return tuple(
        tensor.name for tensor in trainable(model.bundle) if shows(tensor, write_noise) or shows(tensor, disturb)
    )


def _is_full(verify: Verify, model: Model) -> bool:
    if verify != "auto":
        return verify == "full"
    started = time.perf_counter()
    float_outputs(model.bundle, model._session, probe_batch(model.bundle))
    return (time.perf_counter() - started) * len(trainable(model.bundle)) <= _AFFORDABLE
