"""Projections: products of activations and a weight, float or quantised."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Final

import onnx_ir as ir

from pocketzo.graph.quantised import added_to
from pocketzo.graph.read import shape_of

_VIEWS: Final = {"Cast", "DequantizeLinear", "Identity", "QuantizeLinear", "Reshape"}


@dataclass(eq=False)
class Projection:
    """A product of activations and a weight.

    Attributes
    ----------
    node : Node
    x : Value
        The activations as floats, [.., rows].
    y : Value
        The product as floats, [.., columns], with its bias if it has one.
    weight : str
        The name of the weight; that of its integers, if it is quantised.
    rows, columns : int
    dtype : DataType
        The type of `x` and `y`.
    stored : Value
        The tensor of the weight.
    transposed : bool
        Whether that is [columns, rows].
    factor : float
        By which the node multiplies the product.
    biases : list of (Value, Node)
        The constants that `y` contains, and the nodes that add them.
    """

    node: ir.Node
    x: ir.Value
    y: ir.Value
    weight: str
    rows: int
    columns: int
    dtype: ir.DataType
    stored: ir.Value
    transposed: bool
    factor: float
    biases: list[tuple[ir.Value, ir.Node]]

    @property
    def stem(self) -> str:
        """What the names of tensors that are added here begin with."""
        return re.sub(r"(\.weight([._]\w+)?)?(\.(packed|lower))?$", "", self.weight)


def projection_of(node: ir.Node, constants: Collection[ir.Value]) -> Projection | None:
    """Return what a node computes, if it is a projection.

    Parameters
    ----------
    node : Node
    constants : collection of Value
        The values that are the same for all inputs.
    """
    if len(node.inputs) < 2 or node.inputs[0] in constants or node.inputs[1] not in constants:
        return None
    if any(node.attributes.get_int(name, 0) for name in ("transA", "transBatchA", "transBatchB")):
        return None
    stored = _stored(node.inputs[1])
    if stored is None:
        return None
    weight, transposed = stored
    match node.op_type:
        case "MatMul" | "FusedMatMul" | "TransposeMatMul" | "Gemm":
            sizes = shape_of(weight)
            transposed ^= bool(node.attributes.get_int("transB", 0))
        case "MatMulInteger" | "MatMulIntegerToFloat" | "DynamicQuantizeMatMul":
            sizes = shape_of(weight)
        case "MatMulNBits":
            sizes = [node.attributes["K"].as_int(), node.attributes["N"].as_int()]
        case _:
            return None
    if sizes is None or len(sizes) != 2 or not all(isinstance(size, int) for size in sizes):
        return None
    rows, columns = (int(size) for size in (reversed(sizes) if transposed else sizes))
    if rows < 2:  # positions times frequencies
        return None
    x = _float_input(node.inputs[0])
    if x is None:
        return None
    biases = [(node.inputs[2], node)] if node.op_type == "Gemm" and len(node.inputs) > 2 else []
    y = _result(node, columns, constants, biases)
    if y is None:
        return None
    return Projection(
        node,
        x,
        y,
        str(weight.name),
        rows,
        columns,
        _float_type(node, weight),
        weight,
        transposed,
        node.attributes.get_float("alpha", 1.0),
        [(value, adds) for value, adds in biases if value is not None],
    )


def readers(value: ir.Value) -> Iterator[ir.Node]:
    """Yield the nodes that read a tensor, perhaps in another form."""
    for node, _ in value.uses():
        if node.op_type == "Transpose" or node.op_type in _VIEWS:
            yield from readers(node.outputs[0])
        else:
            yield node


def _stored(value: ir.Value | None) -> tuple[ir.Value, bool] | None:
    """Return the tensor of which a constant is another form, and whether that is transposed."""
    transposed = False
    while value is not None and (node := value.producer()) is not None:
        if node.op_type == "Transpose":
            transposed = not transposed
        elif node.op_type not in _VIEWS:
            return None
        value = node.inputs[0]
    return None if value is None or not value.is_initializer() else (value, transposed)


def _float_input(value: ir.Value | None) -> ir.Value | None:
    """Return activations before they are quantised."""
    node = None if value is None else value.producer()
    if node is not None and node.op_type == "DynamicQuantizeLinear":
        return node.inputs[0]
    if node is not None and node.op_type == "DequantizeLinear" and node.inputs[0] is not None:
        before = node.inputs[0].producer()
        return before.inputs[0] if before is not None and before.op_type == "QuantizeLinear" else value
    return value


def _float_type(node: ir.Node, weight: ir.Value) -> ir.DataType:
    if node.op_type == "MatMulNBits" and node.inputs[2] is not None:
        weight = node.inputs[2]
    return ir.DataType.FLOAT16 if weight.dtype == ir.DataType.FLOAT16 else ir.DataType.FLOAT


def _result(
    node: ir.Node, columns: int, constants: Collection[ir.Value], biases: list[tuple[ir.Value | None, ir.Node]]
) -> ir.Value | None:
    """Return a product after its scales and its bias, where nothing else reads what is between; None if no float is.

    What is added on the way is appended to `biases`.
    """
    sums = {reader for other in added_to(node) for reader in other.outputs[0].consumers()}
    value = node.outputs[0]
    integer = node.op_type == "MatMulInteger"
    result = None if integer else value
    while not value.is_graph_output() and len(value.uses()) == 1:
        ((reader, index),) = value.uses()
        match reader.op_type:
            case "Cast" if integer:
                pass
            case "Mul" if integer:
                integer = False
            case "QuantizeLinear" if index == 0:
                integer = True
            case "DequantizeLinear" if index == 0:
                integer = False
            case "Add" if _is_bias(reader.inputs[1 - index], columns, constants) or reader in sums:
                biases.append((reader.inputs[1 - index], reader))
            case _:
                break
        value = reader.outputs[0]
        result = result if integer else value
    return result


def _is_bias(value: ir.Value | None, columns: int, constants: Collection[ir.Value]) -> bool:
    stored = _stored(value) if value in constants else None
    return stored is not None and (shape_of(stored[0]) or [])[-1:] == [columns]
