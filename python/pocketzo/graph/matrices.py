"""Matrices of a graph as blocks, and a summary of what became of them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from pocketzo.graph.blocks import Blocks, Floats, Scheme


@dataclass
class Summary:
    """What became of the matrices, by name.

    Attributes
    ----------
    kind : str
        The type of those that are quantised here.
    exact : dict of str to str
        Those that kept the blocks of the file, with their type.
    requantised : dict of str to str
        Those that were quantised, with their type before.
    floats : dict of str to str
        Embedding tables that stay float32, as their rows are no whole blocks.
    """

    kind: str
    exact: dict[str, str] = field(default_factory=dict)
    requantised: dict[str, str] = field(default_factory=dict)
    floats: dict[str, str] = field(default_factory=dict)
    _errors: float = 0.0
    _squares: float = 0.0

    @property
    def error(self) -> float:
        """Root mean square error of the quantised matrices, relative to the root mean square of their elements."""
        return float(np.sqrt(self._errors / self._squares)) if self._squares else 0.0

    def lines(self) -> list[str]:
        """Return a line of text for what was kept, for what was quantised, and for what stayed float32."""
        lines = [f"{len(self.exact)} matrices keep their blocks: {_counted(self.exact)}"] if self.exact else []
        if self.requantised:
            lines.append(
                f"{len(self.requantised)} matrices quantised as {self.kind}: {_counted(self.requantised)}; "
                f"error {self.error:.1e} of their root mean square"
            )
        if self.floats:
            lines.append(f"embedding tables in float32: {_counted(self.floats)}")
        return lines

    def add(self, rows: Floats, blocks: Blocks) -> None:
        """Count the error of a matrix."""
        off = blocks.array()[:, : rows.shape[1]]
        off -= rows
        self._errors += _squares(off)
        self._squares += _squares(rows)


def _squares(rows: Floats) -> float:
    """Return the sum of the squares, without an array of them: tables are the largest thing in memory."""
    return float(np.einsum("ij,ij->i", rows, rows).sum(dtype=np.float64))


def _counted(tensors: dict[str, str]) -> str:
    return ", ".join(f"{number} of {kind}" for kind, number in sorted(Counter(tensors.values()).items()))


@dataclass(frozen=True)
class Matrix:
    """A matrix that has a type before it is quantised."""

    name: str
    kind: str = "F32"

    def kept(self) -> Blocks | None:
        """Return the blocks that it has, in the order of rows in which the model reads them."""
        return None


class Matrices:
    """The blocks of matrices.

    Parameters
    ----------
    scheme : Scheme
        How matrices are quantised that have no blocks.
    known : iterable of (Matrix, ndarray)
        Matrices that have blocks, and their elements.
    """

    def __init__(self, scheme: Scheme, known: Iterable[tuple[Matrix, Floats]] = ()) -> None:
        self.scheme = scheme
        self.summary = Summary(scheme.name)
        self._known = {_digest(elements): matrix for matrix, elements in known}

    def find(self, name: str, rows: Floats) -> Matrix:
        """Return the matrix that is known to have the contents of a constant, or the first constant that has them.

        Exporters write a table that is read and multiplied as two constants.
        """
        return self._known.setdefault(_digest(rows), Matrix(name))

    def blocks(self, matrix: Matrix, rows: Floats) -> Blocks:
        """Return the blocks that a matrix has, or new ones."""
        kept = matrix.kept()
        if kept is not None:
            self.summary.exact[matrix.name] = matrix.kind
            return kept
        self.summary.requantised[matrix.name] = matrix.kind
        blocks = self.scheme.blocks(rows)
        self.summary.add(rows, blocks)
        return blocks


def _digest(rows: Floats) -> bytes:
    found = hashlib.blake2b(repr(rows.shape).encode())
    found.update(np.ascontiguousarray(rows).data)
    return found.digest()
