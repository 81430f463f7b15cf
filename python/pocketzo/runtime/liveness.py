"""Checks that a session sees what is written to its weights."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from pocketzo._core import generate
from pocketzo.errors import BundleError
from pocketzo.formats.bundle import Bundle, TensorSpec
from pocketzo.runtime.model import Model
from pocketzo.runtime.session import create_session
from pocketzo.runtime.weights import Weights


def trainable_tensors(bundle: Bundle) -> list[TensorSpec]:
    """Return the tensors of a bundle that may be trained."""
    return [tensor for tensor in bundle.tensors if tensor.trainable]


def read_as_noise(weights: Weights, bundle: Bundle) -> None:
    """Read weights that are not trainable, and write noise to those that are."""
    if not all(tensor.trainable for tensor in bundle.tensors):
        weights.read()
    fill_with_noise(weights, trainable_tensors(bundle))


def fill_with_noise(weights: Weights, tensors: Iterable[TensorSpec], draw: int = 0) -> None:
    """Write noise to tensors."""
    for tensor in tensors:
        weights.fill_with_noise(tensor, draw)


def probe_batch(bundle: Bundle) -> dict[str, NDArray[Any]]:
    """Return a small batch that any encoder or decoder takes: 2 examples of 8 tokens."""
    batch = {}
    for value in bundle.inputs:
        shape = [size if isinstance(size, int) else 2 if axis == 0 else 8 for axis, size in enumerate(value.shape)]
        dtype = np.dtype(value.dtype)
        if "mask" in value.name:
            batch[value.name] = np.ones(shape, dtype)
        elif "label" in value.name or "type" in value.name:
            batch[value.name] = np.zeros(shape, dtype)
        elif dtype.kind in "iu":
            batch[value.name] = (np.arange(np.prod(shape, dtype=int)).reshape(shape) % 8).astype(dtype)
        else:
            noise = np.empty(shape, np.float32)
            generate(noise, seed=0, tensor=0, draw=0, offset=0, distribution="gaussian")
            batch[value.name] = noise.astype(dtype)
    return batch


# The proof is made on weights that are noise. A session at level DISABLE_ALL folds and packs nothing, so it is the
# reference: with any weight stale, the outputs of the two would differ by far more than their roundings do.
def float_outputs(bundle: Bundle, session: ort.InferenceSession) -> NDArray[np.float64]:
    """Return the float outputs of a session, one after the other, on :func:`probe_batch`."""
    outputs = [value.name for value in bundle.outputs if np.dtype(value.dtype).kind == "f"]
    try:
        values = session.run(outputs, probe_batch(bundle))
    except Exception as error:  # onnxruntime's own exceptions share no public base
        raise BundleError(f"{bundle.model_path}: a run on a probing batch failed: {error}") from error
    return np.concatenate([np.ravel(value).astype(np.float64) for value in values])


def unoptimised_outputs(bundle: Bundle, values: Mapping[str, ort.OrtValue]) -> NDArray[np.float64]:
    """Return the float outputs of a session that optimises nothing."""
    level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return float_outputs(bundle, create_session(bundle.model_path, values, 1, prepacked=False, level=level))


def outputs_match(got: NDArray[np.float64], expected: NDArray[np.float64], tolerance: float = 1e-3) -> bool:
    """Whether outputs are equal but for roundings."""
    finite = np.isfinite(expected)  # a graph may mask some outputs by infinities
    if not np.array_equal(got[~finite], expected[~finite], equal_nan=True):
        return False
    largest = np.abs(expected[finite]).max(initial=0)  # nothing is proved by outputs that are all zero
    return bool(largest > 0 and np.abs(got[finite] - expected[finite]).max() <= tolerance * largest)


def unseen_weights(model: Model, verify: str, *, as_one: bool) -> list[str]:
    """Change one trainable weight after the other, as far as ``verify`` asks for it, and return those not seen."""
    trainable = trainable_tensors(model.bundle)
    started = time.perf_counter()
    before = float_outputs(model.bundle, model._session)
    seconds = (time.perf_counter() - started) * len(trainable)
    if as_one and (verify == "fast" or (verify == "auto" and seconds > 2)):
        return []
    unseen = []
    for tensor in trainable:
        fill_with_noise(model.weights, [tensor], draw=1)
        after = float_outputs(model.bundle, model._session)
        if np.array_equal(before, after, equal_nan=True):
            # It may be live and without effect, as the bias of attention keys is: the softmax takes it out again. A
            # weight that is not a number shows wherever it is read.
            model.weights.fill(tensor.name, np.nan)
            if np.isnan(float_outputs(model.bundle, model._session)).sum() <= np.isnan(before).sum():
                unseen.append(tensor.name)
            fill_with_noise(model.weights, [tensor], draw=1)
        before = after
    return unseen
