"""Where the blocks of a graph's matrices come from: the GGUF file that has them, or the graph's own floats.

Exporters rename, transpose and fold weights, so a graph's matrix is matched with a tensor of the file by its contents:
both come from the same dequantisation, and agree to the bit.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from pocketzo.export._blocks import Blocks, Floats, keeps, to_blocks
from pocketzo.export._gguf_file import GgufFile


@dataclass
class Summary:
    """What became of the matrices, by name.

    Attributes
    ----------
    kind : {"Q4_0", "Q8_0"}
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
        off = blocks.array()
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
    """A matrix; `data` are its blocks in the file, in the order of rows in which the model reads them."""

    name: str
    kind: str = "F32"
    data: npt.NDArray[Any] | None = None


class Matrices:
    """The blocks of matrices.

    Parameters
    ----------
    kind : {"Q4_0", "Q8_0"}
        How matrices are quantised that have no blocks.
    file : GgufFile, optional
        The file of which the model was made.
    """

    def __init__(self, kind: str, file: GgufFile | None) -> None:
        self.summary = Summary(kind)
        self._known: dict[bytes, Matrix] = {}
        if file is not None:
            self._known = {_digest(elements): matrix for matrix, elements in _of_file(file)}

    def find(self, name: str, rows: Floats) -> Matrix:
        """Return the matrix of the file that has the contents of a constant, or the first constant that has them.

        Exporters write a table that is read and multiplied as two constants.
        """
        return self._known.setdefault(_digest(rows), Matrix(name))

    def blocks(self, matrix: Matrix, rows: Floats) -> Blocks:
        """Return the blocks of the file if they can be kept, or new ones."""
        if keeps(matrix.kind) and matrix.data is not None:
            self.summary.exact[matrix.name] = matrix.kind
            return to_blocks(matrix.kind, matrix.data)
        self.summary.requantised[matrix.name] = matrix.kind
        kind = self.summary.kind
        padded = np.pad(rows, ((0, 0), (0, -rows.shape[1] % 32))).astype(np.float32, copy=False)
        blocks = to_blocks(kind, gguf.quants.quantize(padded, gguf.GGMLQuantizationType[kind]))
        self.summary.add(padded, blocks)
        return blocks


def _of_file(file: GgufFile) -> Iterator[tuple[Matrix, Floats]]:
    """Yield the matrices of a file and their parts, with their elements."""
    for name, tensor in file.tensors.items():
        if len(tensor.shape) != 2:
            continue
        elements = file.array(name)
        for part, rows in _readings(file, name, len(tensor.data)):
            yield Matrix(f"{name}{part}", tensor.tensor_type.name, tensor.data[rows]), elements[rows]


def _readings(file: GgufFile, name: str, count: int) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a tensor that a model may read as one matrix, and what tells them apart.

    llama.cpp interleaves the halves of each head's rows of queries and keys. It joins queries, keys and values, and the
    two matrices of Phi-3's gated layer, which exporters separate.
    """
    yield "", slice(None)
    heads, groups = (file.model_fact(f"attention.head_count{kind}") for kind in ("", "_kv"))
    groups = heads if groups is None else groups
    if not isinstance(heads, int) or not isinstance(groups, int):  # a number for each layer
        return
    of_head = {".attn_q.": heads, ".attn_k.": groups}
    for part, number in of_head.items():
        if part in name and count % (2 * number) == 0:
            yield "", np.arange(count).reshape(number, -1, 2).swapaxes(1, 2).ravel()
    shares = {".attn_qkv.": (heads, groups, groups), ".ffn_up.": (1, 1)}
    for part, sizes in shares.items():
        if part in name and count % sum(sizes) == 0:
            ends = np.cumsum(sizes) * (count // sum(sizes))
            for index, (start, end) in enumerate(zip((0, *ends[:-1]), ends, strict=True)):
                yield f".{index}", slice(start, end)


def _digest(rows: Floats) -> bytes:
    found = hashlib.blake2b(repr(rows.shape).encode())
    found.update(np.ascontiguousarray(rows).data)
    return found.digest()
