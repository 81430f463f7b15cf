"""The columns of a product that a graph cuts in pieces, as queries, keys and values of one projection."""

from __future__ import annotations

import onnx_ir as ir

from pocketzo.graph.projections import Projection
from pocketzo.graph.read import shape_of

_ALONG: set[str] = {"Cast", "Identity", "Reshape"}
"""Operators that leave a product's columns as they are; a Reshape before it is cut is one of rows."""


def packed_ranges(projection: Projection) -> dict[ir.Value, tuple[int, int]]:
    """Return the first column and the number of columns of each piece in which a product is cut; {} if it is not."""
    value = projection.y
    while len(value.uses()) == 1:
        ((reader, index),) = value.uses()
        if index != 0 or reader.op_type not in _ALONG:
            break
        value = reader.outputs[0]
    found: dict[ir.Value, tuple[int, int]] = {}
    for reader in value.consumers():
        if reader.op_type == "Split":
            found.update(_split(reader, projection.columns))
        elif reader.op_type == "Slice":
            found.update(_slice(reader, projection.columns))
    return found


def _split(node: ir.Node, columns: int) -> dict[ir.Value, tuple[int, int]]:
    count = len(node.outputs)
    sizes = _integers(node, 1) or [columns // count] * count
    if sum(sizes) != columns or not _is_last(node.attributes.get_int("axis", 0), node):
        return {}
    return {value: (sum(sizes[:index]), sizes[index]) for index, value in enumerate(node.outputs)}


def _slice(node: ir.Node, columns: int) -> dict[ir.Value, tuple[int, int]]:
    starts, ends, axes = (_integers(node, index) for index in (1, 2, 3))
    if starts is None or ends is None or axes is None or len(axes) != 1 or not _is_last(axes[0], node):
        return {}
    if len(node.inputs) > 4 and _integers(node, 4) != [1]:
        return {}
    start, stop, _ = slice(starts[0], ends[0]).indices(columns)
    return {node.outputs[0]: (start, stop - start)}


def _is_last(axis: int, node: ir.Node) -> bool:
    """Return whether an axis is the last one; without a declared rank, activations have three axes, or rows two."""
    value = node.inputs[0]
    shape = None if value is None else shape_of(value)
    return axis == -1 or axis == (len(shape) - 1 if shape else 2)


def _integers(node: ir.Node, index: int) -> list[int] | None:
    value = node.inputs[index] if index < len(node.inputs) else None
    tensor = None if value is None else value.const_value
    return None if tensor is None else [int(number) for number in tensor.numpy().reshape(-1)]
