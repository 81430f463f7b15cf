"""Examples from ``.npz`` files."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pocketzo.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pocketzo.formats.bundle import Bundle, ValueSpec
from pocketzo.data.columns import Columns, find_column, missing_column
from pocketzo.data.dataset import TOKEN_INPUTS, Dataset, Tokens, is_class, token_limit
from pocketzo.data.examples import Classes, LineError, Problems
from pocketzo.data.readers import LABEL_NAMES
from pocketzo.data.tokens import keep_tokens


def read_npz(path: Path, bundle: Bundle, columns: Columns, require_labels: bool) -> Dataset:
    """Read the examples of an ``.npz`` file."""
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            arrays = dict(file)
    except (ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: not an .npz of plain arrays: {error}") from error
    except TypeError as error:  # numpy.load gives the array itself, which is no context manager
        raise DataError(f"{path}: a single array (.npy), expected an .npz of named arrays") from error
    specs = {spec.name: spec for spec in bundle.inputs}
    has_classes = all(is_class(spec) for spec in bundle.inputs if spec.name == "labels")
    label_name = find_column(arrays, columns.label, LABEL_NAMES) if has_classes else None
    has_tokens = "input_ids" in arrays and arrays["input_ids"].ndim == 2
    rows = {name: len(values) if np.ndim(values) else 0 for name, values in arrays.items()}
    size = next(iter(rows.values()), 0)
    if not size:
        raise DataError(f"{path}: no examples")
    for name, count in rows.items():
        if count != size:
            raise DataError(f"{path}: array {name!r} has {count} rows, {next(iter(rows))!r} has {size}")
        if name not in specs and name != label_name and not (has_tokens and name in TOKEN_INPUTS):
            raise DataError(f"{path}: array {name!r} is no input of the model, which takes {', '.join(specs)}")

    problems = Problems(str(path), "row")
    labels: list[int] = []
    if label_name is not None:
        classes = Classes(bundle)
        for row, label in enumerate(arrays.pop(label_name).tolist()):
            try:
                labels.append(classes.id(label))
            except LineError as error:
                problems.add(row, str(error))
    elif require_labels and has_classes:
        raise DataError(f"{path}: {missing_column(arrays, columns.label, LABEL_NAMES)}")
    tokens = _npz_tokens(arrays, bundle, problems) if has_tokens else None
    problems.check()
    arrays = {name: _checked(path, specs[name], values) for name, values in arrays.items()}
    return Dataset(bundle, str(path), size, tokens, arrays, labels)


def _npz_tokens(arrays: dict[str, NDArray[Any]], bundle: Bundle, problems: Problems) -> Tokens:
    """Take the token inputs out of `arrays`, cut after the last token of each row that the mask keeps."""
    given = {name: arrays.pop(name) for name in TOKEN_INPUTS if name in arrays}
    shape = given["input_ids"].shape
    for name, values in given.items():
        if values.shape != shape or values.dtype.kind not in "iub" or not values.size:
            raise DataError(
                f"{problems.source}: array {name!r} must be integers [n, length], the same for all of a model's token "
                f"inputs, found {values.dtype} of shape {list(values.shape)}"
            )
        top = 1 if name == "attention_mask" else 2**31 - 1
        for row in np.flatnonzero(((values < 0) | (values > top)).any(axis=1)):
            problems.add(int(row), f"{name!r} must be 0 to {top}")
    mask = given.get("attention_mask", np.ones(shape)) != 0
    lengths = (shape[1] - np.argmax(mask[:, ::-1], axis=1)).astype(np.int32)
    for row in np.flatnonzero(~mask.any(axis=1)):
        problems.add(int(row), "'attention_mask' keeps no token")
    longest = token_limit(bundle)
    if longest is not None:
        for row in np.flatnonzero(lengths > longest):
            problems.add(int(row), f"{lengths[row]} tokens, the model takes at most {longest}")
    inside = np.arange(shape[1]) < lengths[:, None]
    columns = {name: values[inside].astype(np.int32) for name, values in given.items()}
    fills = {name: int(values[~inside][0]) for name, values in given.items() if not inside.all()}
    return keep_tokens(bundle, lengths, columns, fills)


def _checked(path: Path, spec: ValueSpec, values: NDArray[Any]) -> NDArray[Any]:
    dtype = np.dtype(spec.dtype)
    same = len(spec.shape) == values.ndim and all(
        want == got for want, got in zip(spec.shape[1:], values.shape[1:], strict=True) if isinstance(want, int)
    )
    widened = dtype.kind in "iu" and values.dtype.kind in "iu" and np.can_cast(values.dtype, dtype)
    if not same or not (widened or values.dtype == dtype):
        raise DataError(
            f"{path}: array {spec.name!r} is {values.dtype} of shape {list(values.shape)}, "
            f"the model takes {spec.dtype} of shape {list(spec.shape)}"
        )
    return np.ascontiguousarray(values, dtype)
