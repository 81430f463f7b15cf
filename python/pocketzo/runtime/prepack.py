"""Packed and live: the runtime multiplies by packed matrices, and the kernels write where it reads them.

onnxruntime's matrix product is faster on a second factor that it has packed, and by default it packs a copy, in which
no later write to the weight is seen. But it can also be told that the packed bytes lie in a file, which it then maps.
This module gives it a file that is all holes and puts fresh memory in the place of those mappings; the weights are
written straight into that, in the packed layout, so that there is one copy of each.

How the runtime packs is its private matter. :func:`learn` has it pack a ramp and reads where each value went; what it
does not understand is :class:`NotPrepackableError`, and the weights are then used unpacked.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime as ort

from pocketzo._core import packed_hash, remap
from pocketzo.errors import NotPrepackableError
from pocketzo.formats.bundle import Bundle
from pocketzo.formats.safetensors import read_header
from pocketzo.runtime.layout import FLOAT, MAPS, Layout, Location, Matrix, detect_layout, find_matrices
from pocketzo.runtime.onnx_proto import onnx_messages

_EXTERNAL: Final = 1  # TensorProto.EXTERNAL
_PAGE: Final = mmap.ALLOCATIONGRANULARITY


def open_session(
    bundle: Bundle, create: Callable[[Path], ort.InferenceSession]
) -> tuple[ort.InferenceSession, dict[str, Location]]:
    """Create a session whose packed weights are memory that can be written.

    Parameters
    ----------
    bundle : Bundle
    create : callable
        Makes a session of a graph's file; it has to supply all float32 weights that are not packed.

    Returns
    -------
    session : InferenceSession
    locations : dict of str to Location
        By weight; all zeros, to be filled before the session runs.

    Raises
    ------
    NotPrepackableError
        The graph, the runtime or the system does not allow it.
    """
    layout = detect_layout()
    model = onnx_messages().Model.FromString(bundle.model_path.read_bytes())
    found = find_matrices(bundle, model.graph, layout)
    try:
        with tempfile.TemporaryDirectory(prefix="pocketzo-") as name:
            folder = Path(name)
            offsets = _write_holes(folder / "holes.bin", model.graph, found, layout)
            _embed_constants(model.graph, bundle)
            (folder / "model.onnx").write_bytes(model.SerializeToString())
            session = create(folder / "model.onnx")
            mapped = _mappings(folder / "holes.bin")
    except OSError as error:
        raise NotPrepackableError(f"no temporary file can be made or mapped: {error}") from None
    locations = {}
    for matrix in found:
        address, length = mapped.get(offsets[matrix.name], (0, 0))
        if length < 4 * matrix.packing.size:
            raise NotPrepackableError(f"onnxruntime {ort.__version__} did not map the prepacked weight {matrix.name}")
        memory = remap(address, matrix.packing.size, session)
        locations[matrix.name] = Location(memory, matrix.packing)
    return session, locations


def _write_holes(path: Path, graph: Any, found: Iterable[Matrix], layout: Layout) -> dict[str, int]:
    """Let the graph's matrices lie in a file of holes; return at which offset the packed bytes of each one are.

    The runtime packs what it reads, and takes the file's packed bytes for its own if they are the same; where two
    matrices look alike, the second one gets a private copy. So each needs a mark of its own. Large matrices all look
    at the same pages of the file, so that it is about three times as long as the largest: matrix i sees the one mark
    there as its element number i * page. Small ones get pages of their own, and a mark of another value.
    """
    found = sorted(found, key=lambda matrix: matrix.packing.size, reverse=True)
    step = _PAGE // 4
    largest = found[0].packing.size * 4
    plain = max(_nbytes(tensor) for tensor in graph.initializer)
    stored_mark = _whole_pages(max(largest, plain))  # may be the last element of the first matrix to see it
    packed_mark = 2 * stored_mark + len(found) * _PAGE
    end = packed_mark + _whole_pages(largest) + _PAGE
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    offsets = {}
    for tensor in graph.initializer:  # not read from here, but it has to be somewhere
        if tensor.data_location == _EXTERNAL and tensor.data_type == FLOAT:
            _point(tensor, 0)
    # The runtime packs in the order of the file and sorts nodes by itself. While it packs, it holds the matrix three
    # times; the largest comes first, when it has not yet looked at what it maps of the others.
    products = {node.input[1]: node for node in graph.node if node.op_type in ("MatMul", "Gemm")}
    first = products[found[0].name]
    nodes = [first, *(node for node in graph.node if node is not first)]
    del graph.node[:]
    graph.node.extend(nodes)
    with path.open("wb") as file:

        def mark(at: int, value: float) -> None:
            file.seek(at)
            file.write(np.float32(value).tobytes())

        mark(stored_mark, 1)
        mark(packed_mark, 1)
        for number, matrix in enumerate(found):
            packing = matrix.packing
            value, at = 1.0, number * step
            element = layout.locate(packing, at) if packing.size > 2 * len(found) * step else None
            if element is not None:
                stored, packed = stored_mark - 4 * element, packed_mark - 4 * at
            else:  # a page between any two, or the system makes one mapping of them
                value, at, element, stored = number + 2.0, 0, 0, end
                packed = stored + _whole_pages(4 * packing.size) + _PAGE
                end = packed + _whole_pages(4 * packing.size) + _PAGE
                mark(stored, value)
                mark(packed, value)
            blob = np.zeros(packing.size, np.float32)  # the system's zero page, but for the mark
            blob[at] = value
            tensor = tensors[matrix.name]
            if matrix.shared:
                tensor = graph.initializer.add()
                tensor.CopyFrom(tensors[matrix.name])
                tensor.name = f"{matrix.name}/packed"
                _rename_factor(graph, matrix.name, tensor.name)
            key = f"{matrix.operator}+{packed_hash(blob)}"
            _point(tensor, stored, prepacked_0=f"{key}|{packed};{4 * packing.size};0")
            offsets[matrix.name] = packed
        file.truncate(end)
    # In a file system in memory a hole that is looked at takes a page, and where there is none left the look is fatal.
    system = os.statvfs(path.parent)
    free = system.f_bavail * system.f_frsize
    if free < end:
        raise NotPrepackableError(f"{path.parent} has {free:,} bytes free, and {end:,} may be needed; set TMPDIR")
    return offsets


def _whole_pages(size: int) -> int:
    return -(-size // _PAGE) * _PAGE


def _rename_factor(graph: Any, old: str, new: str) -> None:
    for node in graph.node:
        if node.op_type in ("MatMul", "Gemm") and node.input[1] == old:
            node.input[1] = new


def _point(tensor: Any, offset: int, **more: str) -> None:
    del tensor.external_data[:]
    entries = {"location": "holes.bin", "offset": str(offset), "length": str(_nbytes(tensor)), **more}
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)


def _nbytes(tensor: Any) -> int:
    return 4 * int(np.prod(tensor.dims, dtype=np.int64))


def _embed_constants(graph: Any, bundle: Bundle) -> None:
    """Put constants of other types, which no option supplies, from the bundle's file into the graph."""
    entries = read_header(bundle.weights_path)
    with bundle.weights_path.open("rb") as file:
        for tensor in graph.initializer:
            if tensor.data_location == _EXTERNAL and tensor.data_type != FLOAT:
                entry = entries[tensor.name]
                file.seek(entry.start)
                tensor.raw_data = file.read(entry.stop - entry.start)
                del tensor.external_data[:]
                tensor.data_location = 0


def _mappings(path: Path) -> dict[int, tuple[int, int]]:
    """Return the address and length of each of this process's mappings of a file, by offset."""
    found = {}
    wanted = os.fsencode(path.resolve()).replace(b"\n", rb"\012")  # other files' names may be in any encoding
    for line in MAPS.read_bytes().split(b"\n"):
        fields = line.split(maxsplit=5)  # addresses, rights, offset, device, inode and, if any, a name
        if fields[5:] == [wanted]:
            start, stop = (int(address, 16) for address in fields[0].split(b"-"))
            found[int(fields[2], 16)] = start, stop - start
    return found
