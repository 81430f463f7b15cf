"""The sizes of a graph's values, and the multiply-adds of its nodes, found by two runs on small batches.

Exporters differ in what they declare, and phones have no package that infers shapes. Two runs with different numbers of
rows, tokens and positions show which axes follow which of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
import onnxruntime as ort

from pocketzo.errors import BundleError, joined_lines
from pocketzo.formats.bundle import Bundle
from pocketzo.formats.inputs import TOKEN_INPUTS
from pocketzo.formats.probe import Probe
from pocketzo.runtime.frozen import model_over_base
from pocketzo.runtime.onnx_proto import EXTERNAL, INT, INT64, onnx_messages, read_by
from pocketzo.runtime.outputs import probe_batch
from pocketzo.runtime.session import open_unoptimised
from pocketzo.runtime.subgraph import remove_unused

ROWS: Final = "batch"
TOKENS: Final = "tokens"
ALL_TOKENS: Final = "batch * tokens"
POSITIONS: Final = "positions"

Shape: TypeAlias = tuple[np.dtype[Any], tuple[int, ...]]

_SHAPES: Final = (2, 3, 4), (3, 5, 7)  # rows, tokens and positions of the two runs
_BY_WEIGHT: Final = ("MatMul", "MatMulInteger", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "QLinearMatMul")
_FUSED: Final = ("FusedMatMul", "FusedGemm")
_ATTENTION: Final = ("MultiHeadAttention", "GroupQueryAttention", "Attention", "QAttention")
_THINNED: Final = ("MatMul", "MatMulInteger", "MatMulNBits")
_ITEMSIZES: Final = {1: 4, 2: 1, 3: 1, 10: 2}  # of float32, uint8, int8 and float16, as TensorProto numbers them


@dataclass(frozen=True)
class Sizes:
    """What a value is like.

    Attributes
    ----------
    dtype : dtype
    axes : tuple of int or str
        A number, or what the size follows: :data:`ROWS`, :data:`TOKENS`, :data:`ALL_TOKENS`, :data:`POSITIONS`; "?" if
        it is none of these.
    """

    dtype: np.dtype[Any]
    axes: tuple[int | str, ...]

    def count(self, rows: float, tokens: float, positions: float) -> float:
        """Return the number of elements for a batch."""
        named = {ROWS: rows, TOKENS: tokens, ALL_TOKENS: rows * tokens, POSITIONS: positions, "?": 1.0}
        return math.prod(axis if isinstance(axis, int) else named[axis] for axis in self.axes)


def measure(bundle: Bundle, model: Any) -> dict[str, Sizes]:
    """Return the sizes of the values of a graph that are dense tensors and depend on its inputs.

    Parameters
    ----------
    bundle : Bundle
        With a probing batch.
    model : message Model
        The bundle's graph, of :func:`read_graph`.

    Raises
    ------
    BundleError
        The graph cannot be run on batches of such sizes.
    """
    declared = {value.name for value in model.graph.output}
    names = _from_inputs(model.graph)

    def edit(copy: Any) -> None:
        _thin(copy.graph)
        for name in names:
            if name not in declared:
                copy.graph.output.add(name=name)
        remove_unused(copy.graph)

    session = open_unoptimised(bundle, {}, model_over_base(bundle, edit=edit))
    first, second = (_shapes(bundle, session, names, *shape) for shape in _SHAPES)
    return {name: _sizes(first[name], second[name]) for name in first if name in second}


def _thin(graph: Any) -> None:
    """Have products read one column of their operand, and one row of zeros in place of their matrix.

    No size depends on either, and no matrix of the file comes into memory.
    """
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    nodes = []
    for node in graph.node:
        row = _row(node, tensors)
        if row is not None:
            nodes.append(_thinned(graph, node, *row))
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


def _row(node: Any, tensors: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the type and the length of a row of the stored matrix that a node multiplies by; None if it has none."""
    matrix = tensors.get(node.input[1]) if node.op_type in _THINNED else None
    if matrix is None or matrix.data_location != EXTERNAL:
        return None
    if node.op_type == "MatMulNBits":
        matrix, columns = tensors.get(node.input[2]), next(one.i for one in node.attribute if one.name == "N")
    else:
        columns = matrix.dims[1] if len(matrix.dims) == 2 else 0
    return (matrix.data_type, columns) if matrix and columns and matrix.data_type in _ITEMSIZES else None


def _thinned(graph: Any, node: Any, dtype: int, columns: int) -> Any:
    """Have a product read one column and one row; return the node that makes the column."""
    first, row, column = (f"{node.output[0]}/{part}" for part in ("first", "row", "column"))
    zeros = bytes(columns * _ITEMSIZES[dtype])
    graph.initializer.add(name=first, data_type=INT64, dims=[1], raw_data=bytes(8))
    graph.initializer.add(name=row, data_type=dtype, dims=[1, columns], raw_data=zeros)
    gather = onnx_messages().Node(op_type="Gather", name=column, input=[node.input[0], first], output=[column])
    gather.attribute.add(name="axis", i=-1, type=INT)
    node.input[0], node.input[1] = column, row
    if node.op_type == "MatMulNBits":  # the scales' type is that of its result
        node.op_type, node.domain = "MatMul", ""
        del node.input[2:], node.attribute[:]
    return gather


def _shapes(
    bundle: Bundle, session: ort.InferenceSession, names: list[str], rows: int, tokens: int, positions: int
) -> dict[str, Shape]:
    """Run a graph on a batch, and return the types and shapes of its values that are dense tensors."""
    batch = _batch(bundle, rows, tokens, positions)
    try:
        values = session.run(names, batch)
    except Exception as error:  # onnxruntime's own exceptions share no public base
        raise BundleError(
            f"{bundle.path}: the graph cannot be run on {rows} x {tokens} tokens: {joined_lines(error)}"
        ) from error
    arrays = {**dict(zip(names, values, strict=True)), **batch}
    tensors = {name: array for name, array in arrays.items() if isinstance(array, np.ndarray)}
    return {name: (array.dtype, array.shape) for name, array in tensors.items()}


def _from_inputs(graph: Any) -> list[str]:
    """Return the values that depend on inputs: others, such as dequantised weights, may be large."""
    found = {value.name for value in graph.input} - {tensor.name for tensor in graph.initializer}
    names = []
    for node in graph.node:
        if not found.isdisjoint(read_by(node)):
            made = [name for name in node.output if name]
            names += made
            found.update(made)
    return names


def _sizes(first: Shape, second: Shape) -> Sizes:
    (dtype, one), (_, other) = first, second
    (b, t, p), (b2, t2, p2) = _SHAPES
    known = {(b, b2): ROWS, (t, t2): TOKENS, (b * t, b2 * t2): ALL_TOKENS, (p, p2): POSITIONS}
    if len(one) != len(other):
        return Sizes(dtype, ("?",))
    return Sizes(dtype, tuple(known.get((m, n), "?") if m != n else m for m, n in zip(one, other, strict=True)))


def _batch(bundle: Bundle, rows: int, tokens: int, positions: int) -> Probe:
    """Return the probing batch with other numbers of rows, tokens and positions, where the graph does not fix them."""
    probe = probe_batch(bundle)
    ids = next((spec for spec in bundle.inputs if spec.name in TOKEN_INPUTS and spec.name in probe), None)
    names = {} if ids is None else dict(zip(ids.shape[-2:], (rows, tokens), strict=True))
    placed = "positions" in probe
    batch: Probe = {}
    for spec in bundle.inputs:
        array = probe[spec.name]
        by_position = placed and spec.name in ("positions", "targets", "labels")
        for axis, (size, now) in enumerate(zip(spec.shape, array.shape, strict=True)):
            if isinstance(size, int) or not now:
                continue
            wanted = positions if by_position else names.get(size, rows if axis == 0 and ids is None else now)
            if spec.name in TOKEN_INPUTS:  # of which exporters give the same axis several names
                wanted = {array.ndim - 2: rows, array.ndim - 1: tokens}.get(axis, wanted)
            array = np.take(array, np.arange(wanted) % now, axis)
        batch[spec.name] = array
    if "attention_mask" in batch:
        batch["attention_mask"] = np.ones_like(batch["attention_mask"])
    if placed:
        batch["positions"] = np.arange(positions, dtype=batch["positions"].dtype)
    return batch


def multiply_adds(
    node: Any, sizes: Mapping[str, Sizes], weights: Mapping[str, Iterable[int]], rows: float, tokens: float, p: float
) -> float:
    """Return the multiply-adds of a node for a batch of ``rows`` x ``tokens`` with ``p`` positions that count.

    Those of other nodes than products, convolutions and attention are taken to be one for each element of their
    outputs.
    """
    made = [sizes[name] for name in node.output if name in sizes]
    if not made:
        return 0.0
    elements = made[0].count(rows, tokens, p)
    numbers = {attribute.name: attribute.i for attribute in node.attribute}

    def size(place: int, axis: int) -> float:
        name = node.input[place]
        if name in weights:
            return list(weights[name])[axis]
        own = sizes.get(name)
        return Sizes(own.dtype, own.axes[axis : axis + 1 or None]).count(rows, tokens, p) if own else 1.0

    kind = node.op_type
    if kind in _BY_WEIGHT or kind in _FUSED or kind == "Gemm":
        transposed = kind in ("Gemm", *_FUSED) and numbers.get("transA", 0)
        return elements * size(0, -2 if transposed else -1)
    if kind == "MatMulNBits":
        return elements * float(numbers["K"])
    if kind in _ATTENTION:
        projected = 3 * size(0, -1) if kind in ("Attention", "QAttention") and node.domain else 0
        return elements * (2 * tokens + projected)
    if kind.startswith(("Conv", "QLinearConv")) and node.input[1] in weights:
        return elements * math.prod(list(weights[node.input[1]])[1:])
    return float(sum(one.count(rows, tokens, p) for one in made))
