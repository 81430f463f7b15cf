"""How a graph computes an output: from a Softmax, a Sigmoid, a linear layer, or otherwise."""

from __future__ import annotations

from typing import Final, Literal, NamedTuple, TypeAlias

import onnx_ir as ir

from pocketzo.graph.build import Builder

Kind: TypeAlias = Literal["softmax", "sigmoid", "linear", "other"]

_ACTIVATIONS: Final[dict[str, Kind]] = {"Softmax": "softmax", "LogSoftmax": "softmax", "Sigmoid": "sigmoid"}
_UNCHANGED: Final = {"Cast", "Identity", "Dropout", "QuantizeLinear", "DequantizeLinear"}
_RESHAPING: Final = {"Squeeze", "Unsqueeze", "Transpose", "Reshape", "Flatten"}
_LINEAR: Final = {"MatMul", "Gemm", "Conv", "Einsum", "FusedMatMul", "MatMulNBits", "MatMulInteger", "QLinearMatMul"}


class Ending(NamedTuple):
    """How an output is computed.

    Attributes
    ----------
    kind : {"softmax", "sigmoid", "linear", "other"}
        The last operator that changes the elements. Softmax and LogSoftmax are ``"softmax"``; a matrix product with or
        without a bias is ``"linear"``.
    op : str
        That operator's type, for messages; "an input" if there is none.
    input : Value
        The input of the Softmax or Sigmoid; the output itself for other kinds.
    reshapes : tuple of Node
        The nodes between the Softmax or Sigmoid and the output that change the shape, in the graph's order.
    over_last : bool
        Whether a Softmax normalises along the output's last axis; True for other kinds.
    """

    kind: Kind
    op: str
    input: ir.Value
    reshapes: tuple[ir.Node, ...] = ()
    over_last: bool = True

    def scores(self, build: Builder) -> ir.Value:
        """Return the input of the Softmax or Sigmoid in the shape of the output; add nodes where that differs."""
        value = self.input
        for node in self.reshapes:
            attributes = {name: attribute.value for name, attribute in node.attributes.items()}
            value = build.op(node.op_type, value, *node.inputs[1:], **attributes)
        return value


def ending_of(output: ir.Value, rank: int) -> Ending:
    """Return how an output of this rank is computed."""
    value, nodes = output, list[ir.Node]()
    while (node := value.producer()) is not None and node.op_type in _UNCHANGED | _RESHAPING:
        nodes.insert(0, node)
        value = _first(node)
    if node is None:
        return Ending("other", "an input", output)
    kind = _ACTIVATIONS.get(node.op_type)
    if kind is None:
        return Ending("linear" if _is_linear(value) else "other", node.op_type, output)
    reshapes = tuple(node for node in nodes if node.op_type in _RESHAPING)
    over_last = kind != "softmax" or _is_over_last(node, reshapes, rank)
    return Ending(kind, node.op_type, _first(node), reshapes, over_last)


def _first(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    assert value is not None, f"{node.op_type} without its first input"
    return value


def _is_linear(value: ir.Value) -> bool:
    """Return whether a value is a product with a matrix, to which only constants are added."""
    node = value.producer()
    if node is None:
        return False
    if node.op_type in _UNCHANGED | _RESHAPING:
        return _is_linear(_first(node))
    if node.op_type in ("Add", "Mul"):
        return any(
            one is not None and other is not None and _is_linear(one) and (other.is_initializer() or _is_integer(one))
            for one, other in (node.inputs, reversed(node.inputs))
        )
    return node.op_type in _LINEAR


def _is_integer(value: ir.Value) -> bool:
    """Return whether a value is the integer product of a quantised layer, which is scaled by a computed number."""
    node = value.producer()
    while node is not None and node.op_type in _UNCHANGED:
        node = _first(node).producer()
    return node is not None and node.op_type == "MatMulInteger"


def _is_over_last(softmax: ir.Node, reshapes: tuple[ir.Node, ...], rank: int) -> bool:
    """Return whether a Softmax normalises along the axis that becomes the last one of the output."""
    axis = rank - 1
    for node in reversed(reshapes):
        before, rank = _axis_before(node, axis, rank)
        if before is None:
            return False
        axis = before
    return softmax.attributes.get_int("axis", -1) % rank == axis


def _axis_before(node: ir.Node, axis: int, rank: int) -> tuple[int | None, int]:
    """Return the axis of a node's input that becomes an axis of its output, None if unknown, and the input's rank."""
    match node.op_type:
        case "Transpose":
            order = node.attributes.get_ints("perm", tuple(reversed(range(rank))))
            return (order[axis] if sorted(order) == list(range(rank)) else None), rank
        case "Squeeze" if (axes := _axes(node)) is not None:
            rank += len(axes)
            kept = [i for i in range(rank) if i not in {axis % rank for axis in axes}]
            return (kept[axis] if axis < len(kept) else None), rank
        case "Unsqueeze" if (axes := _axes(node)) is not None:
            added = {axis % rank for axis in axes}
            before = sum(i < axis for i in added)
            return None if axis in added else axis - before, rank - len(added)
    return None, rank


def _axes(node: ir.Node) -> list[int] | None:
    """Return the axes of a Squeeze or Unsqueeze; None if they are not constant."""
    value = node.inputs[1] if len(node.inputs) > 1 else None
    return None if value is None or value.const_value is None else [int(i) for i in value.const_value.numpy().ravel()]
