"""The probing batch: small inputs on which a graph is run to check it, kept in a bundle as ``probe.npz``."""

from __future__ import annotations

import os
import reprlib
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pocketzo.errors import BundleError
from pocketzo.formats.files import named
from pocketzo.formats.npz import read_arrays

if TYPE_CHECKING:
    from pocketzo.formats.bundle import ValueSpec

PROBE: Final = "probe.npz"

Probe: TypeAlias = dict[str, NDArray[Any]]
"""Arrays by the names of a graph's inputs."""


def read_probe(path: Path) -> Probe:
    """Read all arrays of an ``.npz`` file.

    Raises
    ------
    BundleError
        The file cannot be read, or is not an ``.npz`` of plain arrays.
    """
    try:
        return read_arrays(path)
    except OSError as error:
        raise BundleError(f"{path}: cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise BundleError(f"{path}: {error}") from None


def write_probe(path: Path, batch: Mapping[str, NDArray[Any]]) -> None:
    """Write arrays to an ``.npz`` file; the same arrays give the same bytes."""
    with named(path), zipfile.ZipFile(path, "w") as archive:  # numpy.savez cannot write an array of the name "file"
        for name, array in batch.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def check_probe(batch: Mapping[str, NDArray[Any]], inputs: Iterable[ValueSpec], optional: Iterable[str] = ()) -> Probe:
    """Return a batch's arrays in the order of a graph's inputs.

    Parameters
    ----------
    batch : mapping of str to ndarray
    inputs : iterable of ValueSpec
        The graph's inputs.
    optional : iterable of str
        The names of inputs that the batch may lack.

    Raises
    ------
    ValueError
        An array is missing or is none of the inputs, or its type, number of dimensions or a fixed size is another one.
    """
    specs = {spec.name: spec for spec in inputs}
    for name in batch:
        if name not in specs:
            raise ValueError(f"{name!r} is no input of the model, which takes {', '.join(specs)}")
    checked = {}
    for name, spec in specs.items():
        if name not in batch:
            if name in optional:
                continue
            raise ValueError(f"the input {name!r} ({spec.dtype} of shape {list(spec.shape)}) is missing")
        array = batch[name]
        fits = array.ndim == len(spec.shape) and all(
            want == got for want, got in zip(spec.shape, array.shape, strict=True) if isinstance(want, int)
        )
        if _kind(array) != spec.dtype or not fits:
            raise ValueError(
                f"{name!r} is {_kind(array)} of shape {list(array.shape)}, the model takes {spec.dtype} of shape "
                f"{list(spec.shape)}"
            )
        checked[name] = np.asarray(array, array.dtype.newbyteorder("="), order="C")
    return checked


def given_probe(
    probe: str | os.PathLike[str] | Mapping[str, NDArray[Any]],
    inputs: Iterable[ValueSpec],
    prepared: Iterable[ValueSpec],
) -> Probe:
    """Return the batch of a file or of a caller, if it fits to a graph.

    Parameters
    ----------
    probe : path-like or mapping of str to ndarray
    inputs, prepared : iterable of ValueSpec
        The inputs of the graph, and those of the prepared one; the batch may lack what was added, as labels.

    Raises
    ------
    BundleError
        The file cannot be read, or does not fit.
    TypeError, ValueError
        The mapping does not fit.
    """
    inputs = list(inputs)
    added = [value for value in prepared if value.name not in {value.name for value in inputs}]
    optional = [value.name for value in added]
    if not isinstance(probe, Mapping):
        path = Path(probe)
        try:
            return check_probe(read_probe(path), [*inputs, *added], optional)
        except ValueError as error:
            raise BundleError(f"{path}: {error}") from None
    if not all(isinstance(array, np.ndarray) for array in probe.values()):
        raise TypeError(f"probe must be a file or a mapping of names to arrays, got {reprlib.repr(probe)}")
    try:
        return check_probe(probe, [*inputs, *added], optional)
    except ValueError as error:
        raise ValueError(f"probe: {error}") from None


def other_branches(batch: Mapping[str, NDArray[Any]]) -> Iterator[Probe]:
    """Yield batches on which a graph may take other branches: with flags turned, numbers halved, floats of one sign."""
    turned = {name: _turned(array) for name, array in batch.items()}
    if any(turned[name] is not batch[name] for name in batch):
        yield turned
    if any(array.dtype.kind == "f" and array.size for array in batch.values()):
        for sign in (1, -1):
            yield {
                name: np.asarray(sign * np.abs(array)) if array.dtype.kind == "f" else array
                for name, array in batch.items()
            }


def _turned(array: NDArray[Any]) -> NDArray[Any]:
    if array.size == 1 and array.dtype.kind == "b":
        return np.asarray(~array)  # of an array without axes, numpy returns a number
    if array.size == 1 and array.ndim < 2 and array.dtype.kind in "iu":  # 16,000 samples a second, 1
        return np.asarray(array // 2)
    return array


def _kind(array: NDArray[Any]) -> str:
    """Return the type of an array as bundles name it: that of strings is ``"object"``."""
    return "object" if array.dtype.kind == "U" else array.dtype.name
