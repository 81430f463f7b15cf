"""The matrices of a GGUF file, whose blocks a graph can keep.

Exporters rename, transpose and fold weights, so a graph's matrix is matched with a tensor of the file by its contents:
both come from the same dequantisation, and agree to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketzo.export._blocks import keeps, to_blocks
from pocketzo.export._gguf_file import GgufFile
from pocketzo.graph.blocks import Blocks, Floats
from pocketzo.graph.matrices import Matrix


@dataclass(frozen=True)
class FileMatrix(Matrix):
    """A matrix of a file; `data` are its blocks there, in the order of rows in which the model reads them."""

    data: npt.NDArray[Any] | None = None

    def kept(self) -> Blocks | None:
        """Return its blocks if a graph can keep them."""
        return to_blocks(self.kind, self.data) if keeps(self.kind) and self.data is not None else None


def matrices_of(file: GgufFile) -> Iterator[tuple[FileMatrix, Floats]]:
    """Yield the matrices of a file and their parts, with their elements."""
    for name, tensor in file.tensors.items():
        if len(tensor.shape) != 2:
            continue
        elements = file.array(name)
        for part, rows in _readings(file, name, len(tensor.data)):
            yield FileMatrix(f"{name}{part}", tensor.tensor_type.name, tensor.data[rows]), elements[rows]


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
