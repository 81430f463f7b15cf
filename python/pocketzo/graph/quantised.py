"""Quantised weights: integers, and the scales, zero points and offsets that belong to them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from math import prod
from typing import Final

import onnx_ir as ir

from pocketzo.graph.roles import roles_of
from pocketzo.graph.weight import Draft, Use

# QLinearMatMul, QAttention, QMoE; DequantizeLinear, DynamicQuantizeLSTM; MatMulIntegerToFloat; MatMulNBits; ...
_OPERATOR: Final = re.compile(r"Q[A-Z]|.*([Qq]uantize|Integer|NBits|Bnb4|FpQ4|GemmFloat8)")
REASON: Final = "quantised"
_PLANES: Final = {"GatherBlockQuantized", "MatMulNBits"}
_BIASED: Final = {"Conv", "ConvTranspose", "Gemm"}
_SELECTING: Final = {"Gather", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"}


def is_quantised(node: ir.Node) -> bool:
    """Return whether an operator computes with integers that stand for floats."""
    return _OPERATOR.match(node.op_type) is not None


def find_quantised(draft: Draft) -> None:
    """Mark the float inputs of quantised operators in :attr:`Draft.not_weights`, but for biases that stay floats."""
    unscaled: set[ir.Value | None] = set()
    for node in draft.graph.all_nodes():
        operator = node.op_type
        if is_quantised(node):
            for index, value in enumerate(node.inputs):
                if value in draft.constants and index not in roles_of(node):
                    draft.not_weights[node, index] = f"{REASON}: a scale of {operator}"
            for use in _offsets(node):
                draft.not_weights[use] = f"{REASON}: an offset of {operator}"
            if operator == "DynamicQuantizeLinear":
                unscaled.add(node.outputs[1])
            elif operator in ("MatMulInteger", "ConvInteger"):
                unscaled.add(node.outputs[0])
        elif operator == "Cast" and node.inputs[0] in unscaled:
            unscaled.add(node.outputs[0])
        elif operator == "Mul" and not unscaled.isdisjoint(node.inputs):
            # Integers times the scale of the activations times that of the weights, in any order.
            constants = [index for index, value in enumerate(node.inputs) if value in draft.constants]
            for index in constants:
                draft.not_weights[node, index] = f"{REASON}: a scale of integers"
            if not constants and unscaled.issuperset(node.inputs):
                unscaled.add(node.outputs[0])
        elif operator in _BIASED and _is_fused(node) and node.inputs[2] in draft.constants:
            draft.not_weights[node, 2] = f"{REASON}: the runtime makes it an integer"


def _offsets(node: ir.Node) -> Iterator[Use]:
    """Yield the uses of numbers that a graph adds to all elements of a block: MatMulNBits has no such input.

    The product of a matrix of them and the sums of each block's activations is added to that of the quantised matrix;
    rows of a table of them, with a new axis for the elements, to the rows of a quantised table.
    """
    for reader in _sums(node):
        for other in map(_producer, reader.inputs):
            if node.op_type == "MatMulNBits" and other is not None and other.op_type == "MatMul":
                sums = _producer(other.inputs[0])
                if sums is not None and sums.op_type == "ReduceSum":
                    yield other, 1
            elif node.op_type == "GatherBlockQuantized" and other is not None and other.op_type == "Unsqueeze":
                rows = _producer(other.inputs[0])
                if rows is not None and rows.op_type == "Gather":
                    yield rows, 0


def _sums(node: ir.Node) -> Iterator[ir.Node]:
    """Yield the additions that read what a quantised operator computes, or the sum of it and of its upper plane."""
    upper = upper_plane(node)
    for reader in node.outputs[0].consumers():
        if reader.op_type == "Add":
            yield reader
            if upper is not None:
                yield from (other for other in reader.outputs[0].consumers() if other.op_type == "Add")


def upper_plane(node: ir.Node) -> ir.Node | None:
    """Return the operator of the upper halves of numbers of 8 bits, if a node is that of their lower halves.

    :mod:`pocketzo.graph.nbits` writes these: they have the same scales, and 16 is a factor of what the upper one reads,
    as MatMulNBits, or computes, as GatherBlockQuantized.
    """
    if node.op_type not in _PLANES:
        return None
    for reader in node.outputs[0].consumers():
        for other in map(_producer, reader.inputs if reader.op_type == "Add" else ()):
            if other is not None and other.op_type == "Mul" and node.op_type == "GatherBlockQuantized":
                other = _producer(other.inputs[0])
            elif other is not None and other.op_type == node.op_type:
                larger = _producer(other.inputs[0])
                if larger is None or larger.op_type != "Mul" or node.inputs[0] not in larger.inputs:
                    continue
            if other not in (None, node) and other.op_type == node.op_type and other.inputs[2] is node.inputs[2]:
                return other
    return None


def added_to(node: ir.Node) -> set[ir.Node]:
    """Return the nodes that compute what is added to a quantised product: for its upper plane, for its offsets."""
    upper = upper_plane(node)
    return {other for other, _ in _offsets(node)} | ({upper} if upper is not None else set())


def _producer(value: ir.Value | None) -> ir.Node | None:
    return None if value is None else value.producer()


def _is_fused(node: ir.Node) -> bool:
    """Return whether onnxruntime fuses an operator with the conversions around it, and its bias into a copy."""
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return False
    sources = [_producer(value) for value in node.inputs[:2]]
    return all(source is not None and source.op_type == "DequantizeLinear" for source in sources) and any(
        reader.op_type == "QuantizeLinear" for reader in node.outputs[0].consumers()
    )


def quantised_tensors(graph: ir.Graph) -> list[tuple[str, str, int]]:
    """Return the integer constants that quantised operators read: name, type and number of elements of each."""
    values = {_source(value): None for node in graph.all_nodes() if is_quantised(node) for value in node.inputs}
    return [
        (str(value.name), value.dtype.name.lower(), prod(value.shape.numpy()))
        for value in values
        if value is not None
        and value.is_initializer()
        and value.dtype is not None
        and value.dtype.is_integer()
        and value.shape is not None
    ]


def _source(value: ir.Value | None) -> ir.Value | None:
    """Return the tensor of which a value is a part or another form."""
    while value is not None and (node := value.producer()) is not None and node.op_type in _SELECTING:
        value = node.inputs[0]
    return value
