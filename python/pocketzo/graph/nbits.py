"""Quantise the matrices of a graph: products by ``MatMulNBits``, rows of tables by ``GatherBlockQuantized``.

Numbers of 8 bits are two planes of 4 bits, q = 16 h + l, each a product of its own: ``W x = S (h - 8) (16 x) + S l x``.
The CPU kernel of onnxruntime 1.32 for 8 bits dequantises the whole matrix at every use. A product of 49,152 x 576 took
287 ms for one token and 396 ms for 64 of them, on one core of a Xeon with AVX-512; two planes took 6 and 85 ms, and
float32 12 and 36 ms.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from pocketzo.graph.blocks import Floats
from pocketzo.graph.build import Builder
from pocketzo.graph.decoder import TOKENS
from pocketzo.graph.external import ExternalFiles
from pocketzo.graph.matrices import Matrices, Matrix, Summary
from pocketzo.graph.read import MICROSOFT, read_model

_SAME: Final = {"Cast", "Identity", "Reshape"}
_FEWEST: Final = 32  # rows: a head of fewer classes takes little memory, and stays trainable


def quantise(source: Path, target: Path, matrices: Matrices) -> Summary:
    """Write a float32 graph with its matrices in blocks of numbers: q times a scale, q of 4 or 8 bits.

    Matrices that are multiplied are quantised, and the table that is read by ``input_ids``: once, if it is multiplied
    too. All else stays float32: tables of positions, heads of fewer than 32 classes, and a table whose rows are no
    whole blocks.

    Parameters
    ----------
    source, target : Path
        The ONNX files. The weights are written to a file of the name of `target` and ``.data``.
    matrices : Matrices
        What the blocks come from.
    """
    model = read_model(source)
    files = ExternalFiles(source.parent)
    editor = _Editor(model.graph, files, matrices)
    for node in tuple(model.graph):
        editor.visit(node)
    model.opset_imports.setdefault(MICROSOFT, 1)
    common.RemoveUnusedNodesPass()(model)
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = ir.tensor(files.read(value.const_value), name=value.name)
    ir.save(model, target, external_data=f"{target.name}.data")
    return matrices.summary


@dataclass(frozen=True)
class _Stored:
    """The initializers of a matrix: the planes of its numbers, the upper one first, the offsets transposed."""

    planes: tuple[ir.Value, ...]
    scales: ir.Value
    offsets: ir.Value | None
    size: int
    """Numbers in a block."""


def _are_tokens(indices: ir.Value) -> bool:
    """Return whether these are the input ``input_ids``, perhaps in another shape."""
    node = indices.producer()
    while node is not None and node.op_type in _SAME and (source := node.inputs[0]) is not None:
        indices, node = source, source.producer()
    return indices.name == TOKENS


class _Editor:
    def __init__(self, graph: ir.Graph, files: ExternalFiles, matrices: Matrices) -> None:
        self.graph = graph
        self.files = files
        self.matrices = matrices
        self.stored: dict[str, _Stored] = {}
        self.zeros: dict[tuple[int, ...], ir.Value] = {}
        self.sums: dict[tuple[ir.Value | None, int], ir.Value] = {}
        self.larger: dict[ir.Value | None, ir.Value] = {}

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

    # ---- products ----------------------------------------------------------------------------------------------------

    def multiply(self, node: ir.Node, *, transposed: bool) -> None:
        """Replace ``x W + b``, W being ``[K, N]``, or ``[N, K]`` if transposed."""
        value = node.inputs[1]
        if value is not None and (source := value.producer()) is not None and source.op_type == "Transpose":
            value, transposed = source.inputs[0], not transposed
        if value is None or (array := self.array(value)) is None:
            return
        rows = array if transposed else array.T  # [N, K]
        if len(rows) < _FEWEST:
            return
        matrix = self.matrices.find(str(value.name), rows)
        stored = self.store(matrix, rows)
        build = Builder(self.graph, f"{matrix.name}.", before=node)
        x = node.inputs[0]
        output = self.product(build, x, stored, rows.shape)
        if stored.offsets is not None:
            sums = self.block_sums(build, x, stored.size)
            output = build.op("Add", output, build.op("MatMul", sums, stored.offsets))
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            output = build.op("Add", output, node.inputs[2])
        self.replace(node, output)

    def product(self, build: Builder, x: ir.Value | None, stored: _Stored, shape: tuple[int, ...]) -> ir.Value:
        def plane(x: ir.Value | None, packed: ir.Value, *zeros: ir.Value) -> ir.Value:
            inputs = x, packed, stored.scales, *zeros
            rows, columns = shape
            return build.op("MatMulNBits", *inputs, domain=MICROSOFT, N=rows, K=columns, bits=4, block_size=stored.size)

        if len(stored.planes) == 1:
            return plane(x, stored.planes[0])
        if x not in self.larger:
            self.larger[x] = build.op("Mul", x, build.constant(16.0))
        upper, lower = stored.planes
        blocks = -(-shape[1] // stored.size)
        zeros = self.zero_points(shape[0], (blocks + 1) // 2)  # two in a byte
        return build.op("Add", plane(self.larger[x], upper), plane(x, lower, zeros))

    def block_sums(self, build: Builder, x: ir.Value | None, size: int) -> ir.Value:
        """Sum the activations ``[..., K]`` of each block; the products that read the same ones share the sums."""
        if (x, size) not in self.sums:
            shape = build.op("Concat", build.op("Shape", x, end=-1), build.constant([-1, size]), axis=0)
            blocks = build.op("Reshape", x, shape)
            self.sums[x, size] = build.op("ReduceSum", blocks, build.constant([-1]), keepdims=0)
        return self.sums[x, size]

    # ---- tables ------------------------------------------------------------------------------------------------------

    def gather(self, node: ir.Node) -> None:
        """Replace the rows of a table of tokens."""
        table, indices = node.inputs
        if table is None or indices is None or not _are_tokens(indices) or (rows := self.array(table)) is None:
            return
        matrix = self.matrices.find(str(table.name), rows)
        if rows.shape[1] % self.matrices.scheme.size:
            self.matrices.summary.floats[matrix.name] = matrix.kind
            return
        stored = self.store(matrix, rows)
        build = Builder(self.graph, f"{matrix.name}.", before=node)
        last = build.constant([-1])
        found = self.rows(build, indices, stored, build.op("Unsqueeze", stored.scales, last))
        if stored.offsets is not None:
            offsets = build.op("Gather", build.op("Transpose", stored.offsets, perm=[1, 0]), indices)
            found = build.op("Add", found, build.op("Unsqueeze", offsets, last))
        shape = build.op("Concat", build.op("Shape", indices), build.constant([rows.shape[1]]), axis=0)
        self.replace(node, build.op("Reshape", found, shape))

    def rows(self, build: Builder, indices: ir.Value, stored: _Stored, scales: ir.Value) -> ir.Value:
        """Return rows ``[..., blocks, size]``, from the tensors that products read."""

        def plane(packed: ir.Value, *zeros: ir.Value) -> ir.Value:
            return build.op(
                "GatherBlockQuantized",
                packed,
                indices,
                scales,
                *zeros,
                domain=MICROSOFT,
                gather_axis=0,
                quantize_axis=2,
                bits=4,
                block_size=stored.size,
            )

        if len(stored.planes) == 1:
            return plane(stored.planes[0])
        upper, lower = stored.planes
        shape = stored.scales.const_value
        assert shape is not None
        zeros = self.zero_points(*shape.shape.numpy(), 1)
        return build.op("Add", build.op("Mul", plane(upper), build.constant(16.0)), plane(lower, zeros))

    # ---- matrices ----------------------------------------------------------------------------------------------------

    def array(self, value: ir.Value) -> Floats | None:
        """Return a matrix that the graph holds as floats."""
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or len(tensor.shape) != 2:
            return None
        return self.files.read(tensor)

    def store(self, matrix: Matrix, rows: Floats) -> _Stored:
        """Return the tensors of a matrix, which all nodes share that read it."""
        if matrix.name not in self.stored:
            build, blocks = Builder(self.graph), self.matrices.blocks(matrix, rows)
            offsets = None if blocks.offsets is None else np.ascontiguousarray(blocks.offsets.T)
            self.stored[matrix.name] = _Stored(
                tuple(build.parameter(f"{matrix.name}.{name}", plane) for name, plane in blocks.planes().items()),
                build.parameter(f"{matrix.name}.scales", blocks.scales),
                None if offsets is None else build.parameter(f"{matrix.name}.offsets", offsets),
                blocks.size,
            )
        return self.stored[matrix.name]

    def zero_points(self, *shape: int) -> ir.Value:
        """Return zeros for a lower plane, whose numbers have no sign: without, they are 8."""
        if shape not in self.zeros:
            name = f"zero_points.{'x'.join(map(str, shape))}"
            self.zeros[shape] = Builder(self.graph).parameter(name, np.zeros(shape, np.uint8))
        return self.zeros[shape]

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
