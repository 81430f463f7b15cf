"""Which arrays have the axis of tokens, so that a batch cuts all of them alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pocketzo.data.dataset import is_by_token, token_limit
from pocketzo.errors import DataError
from pocketzo.formats.inputs import TOKEN_INPUTS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pocketzo.formats.bundle import ValueSpec
    from pocketzo.tasks.base import Task


@dataclass(frozen=True)
class Sequences:
    """The arrays of a file, by their axis of tokens.

    The axis is known by the name or the number that the model declares for the second axis of ``input_ids``. Labels
    have it if they are as wide as ``input_ids``: the name of their axis is that of an output.

    Attributes
    ----------
    by_token : tuple of str
        The arrays [n, length] of integers that are kept as tokens.
    axes : mapping of str to tuple of int
        The axes of tokens of every other array that has any.
    width : int or None
        The number of tokens of every batch, if an axis may be that of tokens but does not have its name: then nothing
        is cut. Else None.
    """

    by_token: tuple[str, ...]
    axes: Mapping[str, tuple[int, ...]]
    width: int | None

    @classmethod
    def of(cls, path: Path, task: Task, specs: Mapping[str, ValueSpec], arrays: Mapping[str, NDArray[Any]]) -> Self:
        """Find the axes of the arrays of a file that has ``input_ids`` [n, length].

        Raises
        ------
        DataError
            An axis of tokens does not have as many as ``input_ids``; or nothing can be cut and the model takes fewer
            tokens; or the model takes more, and only tokens can be padded.
        """
        width = arrays["input_ids"].shape[1]
        declared = specs["input_ids"].shape[1] if "input_ids" in specs and len(specs["input_ids"].shape) == 2 else "?"
        by_token = (*TOKEN_INPUTS, "labels") if task.labels_per == "token" else TOKEN_INPUTS
        flat = {name for name in by_token if name not in specs or is_by_token(specs[name])}
        axes: dict[str, tuple[int, ...]] = {}
        unnamed = None
        for name, values in arrays.items():
            if name in flat or name not in specs or values.ndim != len(specs[name].shape):
                continue
            found = []
            for axis, size in enumerate(specs[name].shape[1:], 1):
                if size == declared != "?":
                    if values.shape[axis] != width:
                        raise DataError(
                            f"{path}: array {name!r} is of shape {list(values.shape)}, expected {width} along axis "
                            f"{axis}, {declared!r}, as in 'input_ids'"
                        )
                    found.append(axis)
                elif isinstance(size, str) and values.shape[axis] == width:
                    if name == "labels":
                        found.append(axis)
                    else:
                        unnamed = unnamed or name
            if found:
                axes[name] = tuple(found)
        short = next(iter(axes), unnamed)
        if short is not None and isinstance(declared, int) and width < declared:
            raise DataError(
                f"{path}: rows of {width} tokens, the model takes exactly {declared}: pad them, as the value that "
                f"{short!r} is to be padded with is not known"
            )
        limit = token_limit(task.bundle)
        if unnamed is not None and limit is not None and width > limit:
            raise DataError(
                f"{path}: arrays of {width} tokens, the model takes at most {limit}: cut them, as the model does not "
                f"say whether an axis of {unnamed!r} is that of the tokens"
            )
        return cls(
            tuple(name for name in by_token if name in flat and name in arrays),
            axes,
            None if unnamed is None else width,
        )
