"""A file of holes that onnxruntime maps as prepacked weights.

When onnxruntime creates a session, it reads a weight, packs it and computes a hash. If the graph names packed bytes in
a file under this hash, it maps those and drops its own. The mappings are then replaced by memory that the kernels write
(:func:`pocketzo.runtime.prepack.open_session`), so that the content of the file does not matter: the weights as stored
and as packed are holes, which take no storage, except for one mark each. The marks make the hashes of two matrices of
one shape differ; with equal hashes the second one would get a private copy.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np

from pocketzo._core import packed_hash
from pocketzo.errors import NotPrepackableError
from pocketzo.formats.bundle import Bundle
from pocketzo.formats.safetensors import read_header
from pocketzo.runtime.layout import Layout
from pocketzo.runtime.matrices import PRODUCTS, Matrix
from pocketzo.runtime.onnx_proto import EXTERNAL, FLOAT

_PAGE: Final = mmap.ALLOCATIONGRANULARITY


def write_holes(
    path: Path, graph: Any, matrices: Sequence[Matrix], layout: Layout, *, together: bool
) -> dict[str, int]:
    """Write a file of holes, and make a graph's float32 weights point into it.

    Large matrices all map the same pages with one mark, so that the file is about three times as long as the largest.
    Their mappings start at different offsets, so that matrix i has the mark at the first element of its page i. Small
    matrices have pages of their own, and marks of different values.

    Parameters
    ----------
    path : Path
    graph : message
        Changed in place: where its weights are, the order of its nodes, and a second name for each shared matrix.
    matrices : sequence of Matrix
        At least one.
    layout : Layout
    together : bool
        Whether the last matrix names all packed bytes, so that their mappings follow each other: onnxruntime maps a
        tensor, and what it names, before the next one, and drops the mappings of stored matrices later.

    Returns
    -------
    dict of str to int
        By weight, the offset of its packed bytes in the file.

    Raises
    ------
    NotPrepackableError
        The file system has less room than the file would take without holes.
    """
    matrices = sorted(matrices, key=lambda matrix: matrix.nbytes, reverse=True)
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    for tensor in tensors.values():  # the session is given these, but the graph must name a file
        if tensor.data_location == EXTERNAL and tensor.data_type == FLOAT:
            _point(tensor, path.name, 0)
    _put_first(graph, matrices[0])
    step = _PAGE // 4
    largest = matrices[0].nbytes
    plain = max(_nbytes(tensor) for tensor in graph.initializer)
    stored_mark = whole_pages(max(largest, plain))  # may be the last element of a matrix that maps it
    packed_mark = 2 * stored_mark + len(matrices) * _PAGE
    end = packed_mark + whole_pages(largest) + _PAGE
    offsets: dict[str, int] = {}
    entries: list[tuple[Any, str]] = []
    with path.open("wb") as file:
        _mark(file, stored_mark, 1)
        _mark(file, packed_mark, 1)
        for number, matrix in enumerate(matrices):
            packing = matrix.packing
            value, at = 1.0, number * step
            element = layout.locate(packing, at) if packing.size > 2 * len(matrices) * step else None
            if element is not None:
                stored, packed = stored_mark - 4 * element, packed_mark - 4 * at
            else:  # a page between any two, or Linux merges their mappings
                value, at, stored = number + 2.0, 0, end
                packed = stored + whole_pages(matrix.nbytes) + _PAGE
                end = packed + whole_pages(matrix.nbytes) + _PAGE
                _mark(file, stored, value)
                _mark(file, packed, value)
            blob = np.zeros(packing.size, np.float32)  # takes no memory: the zero page, but for the mark
            blob[at] = value
            tensor = _second_name(graph, tensors[matrix.name]) if matrix.shared else tensors[matrix.name]
            key = f"{matrix.operator}+{packed_hash(blob)}"
            _point(tensor, path.name, stored)
            entries.append((tensor, f"{key}|{packed};{matrix.nbytes};0"))
            offsets[matrix.name] = packed
        file.truncate(end)
    names = {tensor.name for tensor, _ in entries}
    last = next(tensor for tensor in reversed(graph.initializer) if tensor.name in names)
    for number, (tensor, packed_bytes) in enumerate(entries):
        naming, place = (last, number) if together else (tensor, 0)
        naming.external_data.add(key=f"prepacked_{place}", value=packed_bytes)
    _check_room(path, end)
    return offsets


def _put_first(graph: Any, matrix: Matrix) -> None:
    """Have onnxruntime pack a matrix before all others.

    It packs in the order of the file, and sorts the nodes itself. While it packs a matrix, once for each of its
    products, it holds it three times, so the largest one comes first, when no pages of the others are resident yet.
    """
    nodes = sorted(graph.node, key=lambda node: node.op_type not in PRODUCTS or node.input[1] != matrix.name)
    del graph.node[:]
    graph.node.extend(nodes)


def _second_name(graph: Any, tensor: Any) -> Any:
    """Add a copy of a tensor for its product to read; all other nodes still read the tensor itself."""
    copy = graph.initializer.add()
    copy.CopyFrom(tensor)
    copy.name = f"{tensor.name}/packed"
    for node in graph.node:
        if node.op_type in PRODUCTS and node.input[1] == tensor.name:
            node.input[1] = copy.name
    return copy


def embed_constants(graph: Any, bundle: Bundle) -> None:
    """Move constants of other types than float32, which no option supplies, from the bundle's file into its graph."""
    entries = read_header(bundle.weights_path)
    with bundle.weights_path.open("rb") as file:
        for tensor in graph.initializer:
            if tensor.data_location == EXTERNAL and tensor.data_type != FLOAT:
                entry = entries[tensor.name]
                file.seek(entry.start)
                tensor.raw_data = file.read(entry.stop - entry.start)
                del tensor.external_data[:]
                tensor.data_location = 0


def _check_room(path: Path, size: int) -> None:
    # In a file system in memory, reading a hole takes a page, and where none is left the process is killed (SIGBUS).
    system = os.statvfs(path.parent)
    free = system.f_bavail * system.f_frsize
    if free < size:
        raise NotPrepackableError(f"{path.parent} has {free:,} bytes free, and {size:,} may be needed; set TMPDIR")


def _mark(file: BinaryIO, at: int, value: float) -> None:
    file.seek(at)
    file.write(np.float32(value).tobytes())


def _point(tensor: Any, location: str, offset: int) -> None:
    del tensor.external_data[:]
    entries = {"location": location, "offset": str(offset), "length": str(_nbytes(tensor))}
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)


def _nbytes(tensor: Any) -> int:
    return 4 * int(np.prod(tensor.dims, dtype=np.int64))


def whole_pages(size: int) -> int:
    """Return the bytes of the pages that a number of bytes takes."""
    return -(-size // _PAGE) * _PAGE
