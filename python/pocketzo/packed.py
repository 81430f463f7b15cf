"""Packed and live: the runtime multiplies by packed matrices, and the kernels write where it reads them.

onnxruntime's matrix product is faster on a second factor that it has packed, and by default it packs a copy, in which
no later write to the weight is seen. But it can also be told that the packed bytes lie in a file, which it then maps.
This module gives it a file that is all holes and puts fresh memory in the place of those mappings; the weights are
written straight into that, in the packed layout, so that there is one copy of each.

How the runtime packs is its private matter. :func:`learn` has it pack a ramp and reads where each value went; what it
does not understand is :class:`UnpackableError`, and the weights are then used unpacked.
"""

from __future__ import annotations

import functools
import itertools
import mmap
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from pocketzo import _core
from pocketzo.bundle import Bundle
from pocketzo.safetensors import read_header

__all__ = ["OTHER_OPERATORS", "Layout", "Matrix", "Place", "UnpackableError", "learn", "matrices", "open_session"]

OTHER_OPERATORS: Final = ["GemmActivationFusion", "MatMulAddFusion", "MatMulScaleFusion", "MatmulTransposeFusion"]
"""onnxruntime's optimisations that turn a product into another operator, by whose name packed bytes are found."""

_FLOAT: Final = 1  # TensorProto.FLOAT
_EXTERNAL: Final = 1  # TensorProto.EXTERNAL
_PANEL: Final = 16
_MAPS: Final = Path("/proc/self/maps")
_PAGE: Final = mmap.ALLOCATIONGRANULARITY


class UnpackableError(Exception):
    """Why weights cannot be packed and live here."""


@dataclass(frozen=True)
class Layout:
    """How this runtime packs, as :class:`_core.Packing` describes it.

    Attributes
    ----------
    depth : int
        Rows of a block.
    pad : int
        What the number of columns is rounded up to a multiple of.
    """

    depth: int
    pad: int

    def packing(self, rows: int, columns: int, *, transposed: bool) -> _core.Packing:
        """Return where the elements of one matrix are."""
        stride = -(-columns // self.pad) * self.pad
        return _core.Packing(rows=rows, columns=columns, stride=stride, depth=self.depth, transposed=transposed)

    def locate(self, packing: _core.Packing, at: int) -> int | None:
        """Return the logical number of the element at a place in packed memory; None for padding."""
        stride = packing.size // packing.rows
        block, rest = divmod(at, self.depth * stride)
        height = min(self.depth, packing.rows - block * self.depth)
        panel, rest = divmod(rest, _PANEL * height)
        row, column = block * self.depth + rest // _PANEL, panel * _PANEL + rest % _PANEL
        if column >= packing.columns:
            return None
        return column * packing.rows + row if packing.transposed else row * packing.columns + column


@dataclass(frozen=True)
class Matrix:
    """A weight that is the second factor of one product.

    Attributes
    ----------
    name : str
        Of the weight.
    operator : str
        "MatMul" or "Gemm".
    alone : bool
        Whether no other node reads the weight. Else it is also kept as it is stored: a tied embedding.
    packing : _core.Packing
    """

    name: str
    operator: str
    alone: bool
    packing: _core.Packing


@dataclass(frozen=True)
class Place:
    """Memory that a session multiplies by."""

    memory: NDArray[np.float32]
    packing: _core.Packing


@functools.cache
def learn() -> Layout:
    """Have the runtime pack a ramp and find out where each value went.

    Raises
    ------
    UnpackableError
        It does not pack, or in a way that is not understood.
    """
    if not os.access(_MAPS, os.R_OK):
        raise UnpackableError(f"the system does not tell what is mapped where ({_MAPS})")
    operators = ("MatMul", False), ("Gemm", False), ("Gemm", True)
    found = {_pack_ramp(operator, transposed=transposed) for operator, transposed in operators}
    if len(found) > 1:
        raise UnpackableError(f"onnxruntime {ort.__version__} packs operators differently: {sorted(map(str, found))}")
    return found.pop()


def _pack_ramp(operator: str, *, transposed: bool) -> Layout:
    rows, columns = 600, 70  # two blocks of 256 and a part, four panels of 16 and a part
    ramp = np.arange(1, rows * columns + 1, dtype=np.float32)
    messages = _messages()
    model = messages.Model(ir_version=8, opset_import=[messages.Opset(version=17)])
    graph = model.graph
    graph.name = "ramp"
    node = graph.node.add(op_type=operator, input=["x", "w"], output=["y"])
    if transposed:
        node.attribute.add(name="transB", i=1, type=2)
    for value, width in ((graph.input.add(name="x"), rows), (graph.output.add(name="y"), columns)):
        value.type.tensor_type.elem_type = _FLOAT
        value.type.tensor_type.shape.dim.add(dim_param="n")
        value.type.tensor_type.shape.dim.add(dim_value=width)
    weight = graph.initializer.add(name="w", data_type=_FLOAT, dims=[columns, rows] if transposed else [rows, columns])
    weight.raw_data = ramp.tobytes()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    try:
        with tempfile.TemporaryDirectory(prefix="pocketzo-") as folder:
            options.optimized_model_filepath = os.path.join(folder, "packed.onnx")  # noqa: PTH118
            for key, value in (
                ("save_external_prepacked_constant_initializers", "1"),
                ("optimized_model_external_initializers_file_name", "packed.bin"),
                ("optimized_model_external_initializers_min_size_in_bytes", "0"),
            ):
                options.add_session_config_entry(f"session.{key}", value)
            ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
            saved = messages.Model.FromString(Path(folder, "packed.onnx").read_bytes())
            blob = Path(folder, "packed.bin").read_bytes()
    except OSError as error:
        raise UnpackableError(f"no temporary file can be made: {error}") from None
    except Exception as error:  # onnxruntime's own exceptions share no public base
        raise UnpackableError(f"onnxruntime {ort.__version__} does not save packed weights: {error}") from None
    entries = {entry.key: entry.value for tensor in saved.graph.initializer for entry in tensor.external_data}
    if "prepacked_0" not in entries:
        raise UnpackableError(f"onnxruntime {ort.__version__} does not pack a {operator} on this processor")
    key, _, rest = entries["prepacked_0"].partition("|")
    offset, length = (int(number) for number in rest.split(";")[:2])
    packed = np.frombuffer(blob, np.float32, length // 4, offset)
    if key != f"{operator}+{_core.packed_hash(packed)}" or "|" in rest:
        raise UnpackableError(f"onnxruntime {ort.__version__} names packed weights in a way that is not known: {key}")
    for depth, pad in itertools.product((256, 128, 512, 64), (16, 32, 64)):
        layout = Layout(depth, pad)
        if layout.packing(rows, columns, transposed=transposed).size != len(packed):
            continue
        expected = np.zeros_like(packed)
        layout.packing(rows, columns, transposed=transposed).pack(expected, ramp, 0)
        if np.array_equal(expected, packed):
            return layout
    raise UnpackableError(f"onnxruntime {ort.__version__} packs a {operator} in a layout that is not known")


def matrices(bundle: Bundle) -> list[Matrix]:
    """Return the weights of a bundle that can be packed.

    Raises
    ------
    UnpackableError
        There are none, or the graph uses them in a way that would leave a copy behind.
    """
    return _find(bundle, _messages().Model.FromString(bundle.model_path.read_bytes()).graph, learn())


def _find(bundle: Bundle, graph: Any, layout: Layout) -> list[Matrix]:
    shapes = {spec.name: spec.shape for spec in bundle.tensors if spec.dtype == "float32" and len(spec.shape) == 2}
    if bundle.is_half:
        raise UnpackableError("fp16 weights are read as they are stored")
    inputs = {value.name for value in graph.input}
    uses: dict[str, list[tuple[Any, int]]] = {}
    for node in graph.node:
        if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
            raise UnpackableError(f"the graph has control flow ({node.op_type})")
        for index, name in enumerate(node.input):
            if name in shapes:
                uses.setdefault(name, []).append((node, index))
    found = []
    for name, readers in uses.items():
        products = [node for node, index in readers if index == 1 and node.op_type in ("MatMul", "Gemm")]
        if not products:
            continue
        if len(products) > 1 or name in inputs:
            raise UnpackableError(f"{name} is a factor of {len(products)} products, and each would pack a copy")
        (node,) = products
        transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
        rows, columns = reversed(shapes[name]) if transposed else shapes[name]
        packing = layout.packing(rows, columns, transposed=transposed)
        found.append(Matrix(name, node.op_type, len(readers) == 1, packing))
    if not found:
        raise UnpackableError("the graph multiplies by no weight")
    return found


def open_session(
    bundle: Bundle, create: Callable[[Path], ort.InferenceSession]
) -> tuple[ort.InferenceSession, dict[str, Place]]:
    """Create a session whose packed weights are memory that can be written.

    Parameters
    ----------
    bundle : Bundle
    create : callable
        Makes a session of a graph's file; it has to supply all float32 weights that are not packed.

    Returns
    -------
    session : InferenceSession
    places : dict of str to Place
        By weight; all zeros, to be filled before the session runs.

    Raises
    ------
    UnpackableError
        The graph, the runtime or the system does not allow it.
    """
    layout = learn()
    model = _messages().Model.FromString(bundle.model_path.read_bytes())
    found = _find(bundle, model.graph, layout)
    try:
        with tempfile.TemporaryDirectory(prefix="pocketzo-") as name:
            folder = Path(name)
            offsets = _write_holes(folder / "holes.bin", model.graph, found, layout)
            _embed_constants(model.graph, bundle)
            (folder / "model.onnx").write_bytes(model.SerializeToString())
            session = create(folder / "model.onnx")
            mapped = _mappings(folder / "holes.bin")
    except OSError as error:
        raise UnpackableError(f"no temporary file can be made or mapped: {error}") from None
    places = {}
    for matrix in found:
        address, length = mapped.get(offsets[matrix.name], (0, 0))
        if length < 4 * matrix.packing.size:
            raise UnpackableError(f"onnxruntime {ort.__version__} did not map the packed weight {matrix.name}")
        memory = _core.remap(address, matrix.packing.size, session)
        places[matrix.name] = Place(memory, matrix.packing)
    return session, places


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
        if tensor.data_location == _EXTERNAL and tensor.data_type == _FLOAT:
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
            if not matrix.alone:
                tensor = graph.initializer.add()
                tensor.CopyFrom(tensors[matrix.name])
                tensor.name = f"{matrix.name}/packed"
                _rename_factor(graph, matrix.name, tensor.name)
            key = f"{matrix.operator}+{_core.packed_hash(blob)}"
            _point(tensor, stored, prepacked_0=f"{key}|{packed};{4 * packing.size};0")
            offsets[matrix.name] = packed
        file.truncate(end)
    # In a file system in memory a hole that is looked at takes a page, and where there is none left the look is fatal.
    system = os.statvfs(path.parent)
    free = system.f_bavail * system.f_frsize
    if free < end:
        raise UnpackableError(f"{path.parent} has {free:,} bytes free, and {end:,} may be needed; set TMPDIR")
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
            if tensor.data_location == _EXTERNAL and tensor.data_type != _FLOAT:
                entry = entries[tensor.name]
                file.seek(entry.start)
                tensor.raw_data = file.read(entry.stop - entry.start)
                del tensor.external_data[:]
                tensor.data_location = 0


def _mappings(path: Path) -> dict[int, tuple[int, int]]:
    """Return the address and length of each of this process's mappings of a file, by offset."""
    found = {}
    wanted = os.fsencode(path.resolve()).replace(b"\n", rb"\012")  # other files' names may be in any encoding
    for line in _MAPS.read_bytes().split(b"\n"):
        fields = line.split(maxsplit=5)  # addresses, rights, offset, device, inode and, if any, a name
        if fields[5:] == [wanted]:
            start, stop = (int(address, 16) for address in fields[0].split(b"-"))
            found[int(fields[2], 16)] = start, stop - start
    return found


# The part of ONNX's messages that is needed here (number, name, type; * is repeated), as the package onnx does not
# exist on a phone. Fields that are not named survive reading and writing.
_SCHEMA: Final[Mapping[str, str]] = {
    "Model": "1 ir_version int64, 7 graph Graph, 8 opset_import Opset*",
    "Opset": "1 domain string, 2 version int64",
    "Graph": "1 node Node*, 2 name string, 5 initializer Tensor*, 11 input Value*, 12 output Value*",
    "Node": "1 input string*, 2 output string*, 4 op_type string, 5 attribute Attribute*",
    "Attribute": "1 name string, 3 i int64, 6 g Graph, 11 graphs Graph*, 20 type int32",
    "Tensor": (
        "1 dims int64*, 2 data_type int32, 8 name string, 9 raw_data bytes, 13 external_data Entry*, "
        "14 data_location int32"
    ),
    "Entry": "1 key string, 2 value string",
    "Value": "1 name string, 2 type Type",
    "Type": "1 tensor_type TensorType",
    "TensorType": "1 elem_type int32, 2 shape Shape",
    "Shape": "1 dim Dim*",
    "Dim": "1 dim_value int64, 2 dim_param string",
}


@functools.cache
def _messages() -> Any:
    try:
        from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
    except ImportError:
        raise UnpackableError("the Python package protobuf is not installed (pip install protobuf)") from None
    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="pocketzo.onnx.proto", package="pocketzo.onnx", syntax="proto2")
    for message, fields in _SCHEMA.items():
        added = file.message_type.add(name=message)
        for field in fields.split(", "):
            number, name, kind = field.split()
            repeated = kind.endswith("*")
            kind = kind.rstrip("*")
            described = added.field.add(name=name, number=int(number))
            described.label = kinds.LABEL_REPEATED if repeated else kinds.LABEL_OPTIONAL
            if kind in _SCHEMA:
                described.type = kinds.TYPE_MESSAGE
                described.type_name = f".pocketzo.onnx.{kind}"
            else:
                described.type = getattr(kinds, f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    classes = {name: pool.FindMessageTypeByName(f"pocketzo.onnx.{name}") for name in _SCHEMA}
    # protobuf before 4.22 has the older name only, and from 5 on there is the newer one only
    make = getattr(message_factory, "GetMessageClass", None) or message_factory.MessageFactory(pool).GetPrototype
    return SimpleNamespace(**{name: make(found) for name, found in classes.items()})
