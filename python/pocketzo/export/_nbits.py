"""Put the blocks of a GGUF file in place of the matrices that a graph holds as floats.

Exporters rename, transpose and fold weights, so a graph's matrix is matched with a tensor by its contents: both come
from the same dequantisation, and agree to the bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import gguf
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes import common

from pocketzo.export._blocks import Blocks, Floats, keeps, to_blocks
from pocketzo.export._gguf_file import GgufFile
from pocketzo.graph.build import Builder
from pocketzo.graph.external import ExternalFiles

_DOMAIN: Final = "com.microsoft"


@dataclass
class Summary:
    """What became of the matrices, by tensor of the file.

    Attributes
    ----------
    exact : dict of str to str
        Those that kept their blocks, with their type.
    requantised : dict of str to str
        Those that were quantised again.
    floats : dict of str to str
        Embedding tables that are read as float32.
    error : float
        Root mean square error of the requantised matrices, relative to the root mean square of their elements.
    """

    exact: dict[str, str] = field(default_factory=dict)
    requantised: dict[str, str] = field(default_factory=dict)
    floats: dict[str, str] = field(default_factory=dict)
    error: float = 0.0


def put_blocks(model: ir.Model, files: ExternalFiles, file: GgufFile, kind: str) -> Summary:
    """Replace matrix products and embedding tables by ``MatMulNBits`` and ``GatherBlockQuantized``.

    Parameters
    ----------
    model : Model
        A float32 graph, which is changed, as :func:`pocketzo.graph.read.read_model` returns it.
    files : ExternalFiles
        The graph's external data.
    file : GgufFile
        The file of which the model was made.
    kind : {"Q4_0", "Q8_0"}
        How matrices are quantised again whose blocks cannot be kept.
    """
    editor = _Editor(model.graph, files, kind)
    editor.matrices = {_digest(file.array(matrix.name, matrix.data)): matrix for matrix in _matrices(file)}
    for node in tuple(model.graph):
        editor.visit(node)
    model.opset_imports.setdefault(_DOMAIN, 1)
    common.RemoveUnusedNodesPass()(model)
    return editor.summary()


@dataclass(frozen=True)
class _Matrix:
    """A matrix of the file; `data` has the rows in the order in which the model reads them."""

    name: str
    kind: str
    data: npt.NDArray[Any]


def _matrices(file: GgufFile) -> Iterator[_Matrix]:
    """Yield the matrices. Of queries and keys there are two: llama.cpp interleaves the halves of each head's rows."""
    for name, tensor in file.tensors.items():
        if len(tensor.shape) != 2:
            continue
        kind, data = tensor.tensor_type.name, tensor.data
        yield _Matrix(name, kind, data)
        for part, count in ((".attn_q.", "head_count"), (".attn_k.", "head_count_kv")):
            heads = file.model_fact(f"attention.{count}")
            if part in name and isinstance(heads, int) and len(data) % (2 * heads) == 0:
                order = np.arange(len(data)).reshape(heads, -1, 2).swapaxes(1, 2).ravel()
                yield _Matrix(name, kind, data[order])


def _digest(rows: Floats) -> bytes:
    found = hashlib.blake2b(repr(rows.shape).encode())
    found.update(np.ascontiguousarray(rows).data)
    return found.digest()


@dataclass(frozen=True)
class _Stored:
    """The initializers of a matrix, the offsets transposed; the bits of a number, and a block's size."""

    packed: ir.Value
    scales: ir.Value
    offsets: ir.Value | None
    bits: int
    size: int


class _Editor:
    matrices: dict[bytes, _Matrix]

    def __init__(self, graph: ir.Graph, files: ExternalFiles, kind: str) -> None:
        self.graph = graph
        self.files = files
        self.kind = kind
        self.stored: dict[str, _Stored] = {}
        self.sums: dict[tuple[ir.Value | None, int], ir.Value] = {}
        self.exact: dict[str, str] = {}
        self.requantised: dict[str, str] = {}
        self.floats: dict[str, str] = {}
        self.error = self.square = 0.0

    def summary(self) -> Summary:
        error = float(np.sqrt(self.error / self.square)) if self.square else 0.0
        return Summary(self.exact, self.requantised, self.floats, error)

    def visit(self, node: ir.Node) -> None:
        attributes = node.attributes
        match node.op_type:
            case "MatMul":
                self.multiply(node, transposed=False)
            case "Gemm" if (
                not attributes.get_int("transA", 0)
                and attributes.get_float("alpha", 1.0) == attributes.get_float("beta", 1.0) == 1
            ):
                self.multiply(node, transposed=bool(attributes.get_int("transB", 0)))
            case "Gather" if attributes.get_int("axis", 0) == 0:
                self.gather(node)

    def multiply(self, node: ir.Node, *, transposed: bool) -> None:
        """Replace ``x W + b``, W being ``[K, N]``, or ``[N, K]`` if transposed."""
        value = node.inputs[1]
        if value is not None and (source := value.producer()) is not None and source.op_type == "Transpose":
            value, transposed = source.inputs[0], not transposed
        if value is None or (array := self.array(value)) is None:
            return
        rows = array if transposed else array.T  # [N, K]
        if (matrix := self.matrices.get(_digest(rows))) is None:
            return
        if matrix.name not in self.stored:
            self.store(matrix, self.kept(matrix) or self.quantised(matrix, rows))
        stored = self.stored[matrix.name]
        build = Builder(self.graph, f"{matrix.name}.", before=node)
        x = node.inputs[0]
        output = build.op(
            "MatMulNBits",
            x,
            stored.packed,
            stored.scales,
            domain=_DOMAIN,
            N=rows.shape[0],
            K=rows.shape[1],
            bits=stored.bits,
            block_size=stored.size,
        )
        if stored.offsets is not None:
            sums = self.block_sums(build, x, stored.size)
            output = build.op("Add", output, build.op("MatMul", sums, stored.offsets))
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            output = build.op("Add", output, node.inputs[2])
        self.replace(node, output)

    def block_sums(self, build: Builder, x: ir.Value | None, size: int) -> ir.Value:
        """Sum the activations ``[..., K]`` of each block; the products that read the same ones share the sums."""
        if (x, size) not in self.sums:
            shape = build.op("Concat", build.op("Shape", x, end=-1), build.constant([-1, size]), axis=0)
            blocks = build.op("Reshape", x, shape)
            self.sums[x, size] = build.op("ReduceSum", blocks, build.constant([-1]), keepdims=0)
        return self.sums[x, size]

    def gather(self, node: ir.Node) -> None:
        """Replace the rows of an embedding table, if its blocks can be kept."""
        table, indices = node.inputs
        if table is None or (array := self.array(table)) is None:
            return
        if (matrix := self.matrices.get(_digest(array))) is None:
            return
        if matrix.name not in self.stored:
            blocks = self.kept(matrix)
            if blocks is None:
                self.floats[matrix.name] = matrix.kind
                return
            self.store(matrix, blocks)
        stored = self.stored[matrix.name]
        build = Builder(self.graph, f"{matrix.name}.", before=node)
        last = build.constant([-1])
        rows = build.op(  # reads the tensors of MatMulNBits, [rows, blocks, bytes], so the scales need a third axis
            "GatherBlockQuantized",
            stored.packed,
            indices,
            build.op("Unsqueeze", stored.scales, last),
            domain=_DOMAIN,
            gather_axis=0,
            quantize_axis=2,
            bits=stored.bits,
            block_size=stored.size,
        )
        if stored.offsets is not None:
            offsets = build.op("Gather", build.op("Transpose", stored.offsets, perm=[1, 0]), indices)
            rows = build.op("Add", rows, build.op("Unsqueeze", offsets, last))
        shape = build.op("Concat", build.op("Shape", indices), build.constant([array.shape[1]]), axis=0)
        self.replace(node, build.op("Reshape", rows, shape))

    def array(self, value: ir.Value) -> Floats | None:
        """Return a matrix that the graph holds as floats."""
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or len(tensor.shape) != 2:
            return None
        return self.files.read(tensor)

    def kept(self, matrix: _Matrix) -> Blocks | None:
        """Return the blocks of the file, if they can be kept."""
        if not keeps(matrix.kind):
            return None
        self.exact[matrix.name] = matrix.kind
        return to_blocks(matrix.kind, matrix.data)

    def quantised(self, matrix: _Matrix, rows: Floats) -> Blocks:
        """Return new blocks."""
        self.requantised[matrix.name] = matrix.kind
        rest = -rows.shape[1] % 32
        padded = np.pad(rows, ((0, 0), (0, rest))).astype(np.float32, copy=False)
        blocks = to_blocks(self.kind, gguf.quants.quantize(padded, gguf.GGMLQuantizationType[self.kind]))
        self.error += float(np.square(blocks.array() - padded, dtype=np.float64).sum())
        self.square += float(np.square(padded, dtype=np.float64).sum())
        return blocks

    def store(self, matrix: _Matrix, blocks: Blocks) -> None:
        build = Builder(self.graph)
        self.stored[matrix.name] = _Stored(
            build.parameter(f"{matrix.name}.packed", blocks.packed),
            build.parameter(f"{matrix.name}.scales", blocks.scales),
            None
            if blocks.offsets is None
            else build.parameter(f"{matrix.name}.offsets", np.ascontiguousarray(blocks.offsets.T)),
            blocks.bits,
            blocks.size,
        )

    @staticmethod
    def replace(node: ir.Node, output: ir.Value) -> None:
        """Have the readers of a node read another value, which gets the name that a graph's output has to keep."""
        old = node.outputs[0]
        output.type, output.shape = old.type, old.shape
        ir.convenience.replace_all_uses_with(old, output, replace_graph_outputs=True)
        if output.is_graph_output():
            name, old.name = old.name, None
            output.name = name
        assert isinstance(node.graph, ir.Graph)
        node.graph.remove(node, safe=True)
