"""Whether a weight has an effect: in a session, and in one that reads every weight where it is.

On one batch, and with noise for weights, a live weight may change no output: a ReLU in front of it gives zeros, a mask
hides it, another branch is taken. So several batches and several fillings of the weights are tried, and the outputs of
both sessions are compared. A weight is dead where only the second one's change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from pocketzo.errors import BundleError
from pocketzo.formats.bundle import Bundle, TensorSpec
from pocketzo.formats.probe import Probe
from pocketzo.runtime.noise import read_as_noise, write_noise
from pocketzo.runtime.outputs import branch_batches, close, data_batches, float_outputs, probe_batch, tolerance_of
from pocketzo.runtime.session import open_unoptimised
from pocketzo.runtime.weights import Weights


@dataclass(frozen=True)
class Unseen:
    """Trainable weights that change no output of a session.

    Attributes
    ----------
    dead : tuple of str
        The names of those that should.
    idle : tuple of str
        The names of those that change no output of any session, whatever is tried.
    """

    dead: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()


def without_effect(
    bundle: Bundle, session: ort.InferenceSession, weights: Weights, tensors: list[TensorSpec]
) -> list[TensorSpec]:
    """Change one weight after the other, and return those that change no output on the probing batch.

    The weights are noise, and other noise at the end.
    """
    probe = probe_batch(bundle)
    unseen = []
    before = float_outputs(bundle, session, probe)
    for tensor in tensors:
        write_noise(weights, [tensor], draw=1)
        after = float_outputs(bundle, session, probe)
        if np.array_equal(before, after, equal_nan=True):
            unseen.append(tensor)
        before = after
    return unseen


def explain(
    bundle: Bundle,
    session: ort.InferenceSession,
    weights: Weights,
    tensors: list[TensorSpec],
    reference: Callable[[], Weights],
) -> Unseen:
    """Try more on weights that :func:`without_effect` has returned.

    Parameters
    ----------
    bundle : Bundle
    session : InferenceSession
    weights : Weights
        What it reads. Noise at the end.
    tensors : list of TensorSpec
    reference : callable
        Returns weights in the plain layout, for a second session; called if NaN does not show that all are live.
    """
    # A weight may be live and without effect, as is the bias of attention keys, which the softmax cancels. NaN shows
    # wherever it is read, but for operators that clip it away.
    tensors = [tensor for tensor in tensors if not _shows_nan(bundle, session, weights, tensor)]
    if not tensors:
        return Unseen()
    plain = reference()
    both = [weights] if plain is weights else [weights, plain]
    unoptimised = open_unoptimised(bundle, plain.image.values)
    tolerance = tolerance_of(bundle)

    def outputs(batch: Probe) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        return float_outputs(bundle, session, batch), float_outputs(bundle, unoptimised, batch)

    undecided = {tensor.name: tensor for tensor in tensors}
    dead = set()
    for batch in _trials(bundle, both):
        if not undecided:
            break
        try:
            before = outputs(batch)
        except BundleError:  # not every index and flag is valid
            continue
        for name, tensor in list(undecided.items()):
            kept = plain[name]
            for each in both:
                write_noise(each, [tensor], draw=3)
            after = outputs(batch)
            for each in both:
                each[name] = kept
            if not np.array_equal(after[0], before[0], equal_nan=True):
                del undecided[name]
            elif not close(after[1], before[1], tolerance):
                del undecided[name]
                dead.add(name)
    for each in both:
        read_as_noise(each, bundle)
    return Unseen(tuple(tensor.name for tensor in tensors if tensor.name in dead), tuple(undecided))


def _shows_nan(bundle: Bundle, session: ort.InferenceSession, weights: Weights, tensor: TensorSpec) -> bool:
    def count() -> int:
        return int(np.isnan(float_outputs(bundle, session, probe_batch(bundle))).sum())

    before = count()
    weights.fill(tensor.name, np.nan)
    with_nan = count()
    write_noise(weights, [tensor])
    return with_nan > before


def _trials(bundle: Bundle, both: list[Weights]) -> Iterator[Probe]:
    """Yield batches, each with several fillings of the weights in place: as stored, and noise of two kinds."""
    batches = [*branch_batches(bundle), *data_batches(bundle)]
    for draw in (0, 2, None):
        for weights in both:
            if draw is None:
                weights.read()
            else:
                read_as_noise(weights, bundle, draw)
        yield from batches
