"""What sessions compute on a small batch, and whether it is the same."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from pocketzo.errors import BundleError
from pocketzo.formats.bundle import Bundle
from pocketzo.formats.probe import Probe
from pocketzo.runtime.session import open_unoptimised


def probe_batch(bundle: Bundle) -> Probe:
    """Return the probing batch of a bundle.

    Raises
    ------
    BundleError
        It has none.
    """
    if bundle.probe is None:
        raise BundleError(f"{bundle.path}: there is no probing batch in it; prepare the model again, or give a batch")
    return bundle.probe


def float_outputs(bundle: Bundle, session: ort.InferenceSession) -> NDArray[np.float64]:
    """Run a session on :func:`probe_batch`, and return all elements of its float outputs as one vector.

    Raises
    ------
    BundleError
        The run failed.
    """
    outputs = [value.name for value in bundle.outputs if np.dtype(value.dtype).kind == "f"]
    try:
        values = session.run(outputs, probe_batch(bundle))
    except Exception as error:  # onnxruntime's own exceptions share no public base
        raise BundleError(f"{bundle.model_path}: a run on the probing batch failed: {error}") from error
    return np.concatenate([np.ravel(value).astype(np.float64) for value in values])


def unoptimised_outputs(bundle: Bundle, values: Mapping[str, ort.OrtValue]) -> NDArray[np.float64]:
    """Return :func:`float_outputs` of a session over these weights that optimises nothing."""
    return float_outputs(bundle, open_unoptimised(bundle, values))


def outputs_match(got: NDArray[np.float64], expected: NDArray[np.float64], tolerance: float = 1e-3) -> bool:
    """Whether outputs differ by no more than roundings: by ``tolerance`` times the largest.

    Where ``expected`` is not finite, as a graph may mask outputs by infinities, ``got`` has to be the same. Outputs
    that are all zero match nothing, as they may be zero with any weights.
    """
    finite = np.isfinite(expected)
    if not np.array_equal(got[~finite], expected[~finite], equal_nan=True):
        return False
    largest = np.abs(expected[finite]).max(initial=0)
    return bool(largest > 0 and np.abs(got[finite] - expected[finite]).max() <= tolerance * largest)
