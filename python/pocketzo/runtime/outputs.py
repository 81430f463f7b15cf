"""What sessions compute on small batches, and whether it is the same."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final, TypeAlias

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from pocketzo.errors import BundleError, joined_lines
from pocketzo.formats.bundle import Bundle
from pocketzo.formats.probe import Probe, other_branches
from pocketzo.runtime.session import open_unoptimised

Outputs: TypeAlias = list[NDArray[np.float64]]
"""By batch of :func:`branch_batches`, all elements of the float outputs as one vector."""

ROUNDINGS: Final = 1e-3
"""What 32-bit floats lose to another order of operations is far less, as a share of the largest output."""

# Operators on 8-bit integers and fewer bits, as a graph's file names them: field 4 of a node, its length, its bytes.
_QUANTISED = re.compile(rb"\x22.(Q[A-Z]|MatMulInteger|MatMulNBits|MatMulBnb4|ConvInteger|\w*Quantiz)", re.DOTALL)


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


def branch_batches(bundle: Bundle) -> list[Probe]:
    """Return :func:`probe_batch`, and batches on which the graph may take other branches."""
    return [probe_batch(bundle), *other_branches(probe_batch(bundle))]


def data_batches(bundle: Bundle) -> Iterator[Probe]:
    """Yield batches of other data: with masks turned or random, other indices and other floats."""
    batch = probe_batch(bundle)
    rng = np.random.default_rng(0)
    for change in (_turned_mask, _random_mask, _other_data):
        changed = {name: change(array, rng) for name, array in batch.items()}
        if any(changed[name] is not batch[name] for name in batch):
            yield changed


def _is_mask(array: NDArray[Any]) -> bool:
    return array.size > 1 and (array.dtype.kind == "b" or (array.dtype.kind in "iu" and not np.any((array | 1) != 1)))


def _turned_mask(array: NDArray[Any], _: np.random.Generator) -> NDArray[Any]:
    return array ^ array.dtype.type(1) if _is_mask(array) else array


def _random_mask(array: NDArray[Any], rng: np.random.Generator) -> NDArray[Any]:
    return rng.integers(0, 2, array.shape).astype(array.dtype) if _is_mask(array) else array


def _other_data(array: NDArray[Any], rng: np.random.Generator) -> NDArray[Any]:
    if array.size == 0 or array.dtype.kind not in "iuf" or _is_mask(array):
        return array
    if array.dtype.kind == "f":
        return np.asarray(rng.normal(0, max(np.abs(array).max(), 1), array.shape)).astype(array.dtype)
    # Indices that are no larger than those that are known to be valid.
    return rng.integers(array.min(), array.max(), array.shape, endpoint=True).astype(array.dtype)


def float_outputs(bundle: Bundle, session: ort.InferenceSession, batch: Probe) -> NDArray[np.float64]:
    """Run a session on a batch, and return all elements of its float outputs as one vector.

    Raises
    ------
    BundleError
        The run failed.
    """
    outputs = [value.name for value in bundle.outputs if value.is_float]
    try:
        values = session.run(outputs, batch)
    except Exception as error:  # onnxruntime's own exceptions share no public base
        raise BundleError(f"{bundle.model_path}: a run on the probing batch failed: {joined_lines(error)}") from error
    return np.concatenate([np.ravel(value).astype(np.float64) for value in values])


def unoptimised_outputs(
    bundle: Bundle, values: Mapping[str, ort.OrtValue], model: bytes | None = None
) -> tuple[list[Probe], Outputs]:
    """Return the batches of :func:`branch_batches` on which a graph runs, and what it computes on them.

    The session is over these weights, and optimises nothing; see :func:`open_unoptimised`.

    Raises
    ------
    BundleError
        The run on the probing batch failed. Not every flag can be turned.
    """
    session = open_unoptimised(bundle, values, model)
    batches: list[Probe] = []
    outputs: Outputs = []
    for batch in branch_batches(bundle):
        try:
            outputs.append(float_outputs(bundle, session, batch))
        except BundleError:
            if not batches:
                raise
            continue
        batches.append(batch)
    return batches, outputs


def tolerance_of(bundle: Bundle) -> float:
    """Return by how much the outputs of two sessions over the same weights may differ, as a share of the largest.

    A session rounds less often where it fuses operators. In 16 bits each rounding is coarse; where activations become
    8-bit integers, one that is tipped over moves by 2^-8 of their range.
    """
    # For 8 bits the tolerance is measured, not derived: how many roundings tip over, and how they add up, depends on
    # the graph. The largest difference was 2.1e-2, over 4 to 48 layers of widths 16 to 256 on 500 rows and 8 fillings
    # of the weights (onnxruntime 1.32, x86-64). It did not grow from 24 to 48 layers. A part of it is
    # repeated by `pytest tests/test_quantised_liveness.py -k roundings`.
    if bundle.is_fp16:
        return 3e-2
    return 5e-2 if is_quantised(bundle) else ROUNDINGS


def is_quantised(bundle: Bundle) -> bool:
    """Whether a bundle's graph has operators on integers of at most 8 bits."""
    return _QUANTISED.search(bundle.model_path.read_bytes()) is not None


def close(got: NDArray[np.float64], expected: NDArray[np.float64], tolerance: float) -> bool:
    """Whether outputs differ by ``tolerance`` times the largest at most; those that are not finite must be the same."""
    if got.shape != expected.shape:
        return False
    finite = np.isfinite(expected)
    if not np.array_equal(got[~finite], expected[~finite], equal_nan=True):
        return False
    largest = np.abs(expected[finite]).max(initial=0)
    return bool(np.abs(got[finite] - expected[finite]).max(initial=0) <= tolerance * largest)
