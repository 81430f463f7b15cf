"""Reading ``.npz`` files: named arrays, in a zip file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocketzo.errors import joined_lines


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Return the arrays of a file by name, in this machine's byte order.

    Raises
    ------
    OSError
        The file cannot be read.
    ValueError
        It is not an ``.npz`` of plain arrays with different names; gives the reason.
    """
    arrays: dict[str, NDArray[Any]] = {}
    where = ""
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            for name in file.files:
                where = f"array {name!r}: "
                if name in arrays:
                    raise _OwnError(f"two arrays have the name {name!r}")
                arrays[name] = _native(name, file[name])
    except (_OwnError, OSError):
        raise
    except TypeError:  # for a .npy file, numpy.load returns an array, which is not a context manager
        raise ValueError("a single array (.npy), expected an .npz of named arrays") from None
    except Exception as error:  # numpy has no error of its own: it may raise what zipfile, zlib and tokenize raise
        raise ValueError(f"not an .npz of plain arrays: {where}{joined_lines(error)}") from None
    return arrays


class _OwnError(ValueError):
    """Not one of numpy's."""


def _native(name: str, values: NDArray[Any]) -> NDArray[Any]:
    """Return an array in this machine's byte order."""
    if not isinstance(values, np.ndarray):  # of a member that is no array, numpy gives the bytes
        raise _OwnError(f"{name!r} is no array; an .npz holds arrays only")
    if values.dtype.names is not None:
        raise _OwnError(f"array {name!r} has fields of several types; expected an array of numbers")
    return values.astype(values.dtype.newbyteorder("="), copy=False)
