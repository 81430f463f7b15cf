"""Keep float16 graphs away from a fault of onnxruntime that ends the process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import onnx_ir as ir

from pocketzo.graph.build import Builder
from pocketzo.graph.names import value_names

_PRODUCTS: Final = frozenset({"MatMul", "FusedMatMul"})

# Nodes that onnxruntime removes where they change nothing, or merges into a product, as it does a scalar factor.
_REMOVED: Final = frozenset({"Cast", "Dropout", "Expand", "Identity", "Reshape"})
_REMOVED_WITH_CONSTANT: Final = frozenset({"Add", "Div", "Mul", "Sub"})


def separate_transposes(model: ir.Model) -> None:
    """Put a node between each Transpose and product that onnxruntime may merge wrongly in float16.

    On x86-64 at its default level of optimisation, onnxruntime computes in float32, and merges a Transpose that moves
    the first axis into one of the last two with a product after it. If the product's other factor has another rank, the
    next optimisation reads memory that is not its own, and the process dies (onnxruntime issue 28392, seen in 1.32). A
    Concat of one tensor keeps the two apart, and copies it. What only changes the shape does not: a Reshape is removed,
    and so is an Unsqueeze with its Squeeze after a Reshape, or the Transpose is moved behind it.

    Parameters
    ----------
    model : Model
        Changed in place. Graphs without float16 stay as they are.
    """
    graph = model.graph
    if not any(value.dtype == ir.DataType.FLOAT16 for value in _values(graph)):
        return
    taken = value_names(graph)
    for scope in (graph, *graph.subgraphs()):
        for node in tuple(scope):
            if node.op_type in _PRODUCTS:
                for index, value in enumerate(node.inputs):
                    if value is not None and _is_merged(value):
                        build = Builder(scope, "pocketzo.separate.", before=node, taken=taken)
                        node.replace_input_with(index, build.op("Concat", value, axis=0))


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    for scope in (graph, *graph.subgraphs()):
        yield from scope.initializers.values()
        for node in scope:
            yield from node.outputs


def _is_merged(value: ir.Value) -> bool:
    """Whether a Transpose of the merged kind computes a value, or several that onnxruntime may make one."""
    permutation: list[int] = []
    while (node := value.producer()) is not None:
        source = node.inputs[0] if node.inputs else None
        if node.op_type in _REMOVED_WITH_CONSTANT:
            computed = [each for each in node.inputs if each is not None and not _is_constant(each)]
            source = computed[0] if len(computed) == 1 else None
        elif node.op_type == "Transpose":
            first = _permutation(node)
            if not first or (permutation and len(permutation) != len(first)):
                return False
            permutation = [first[axis] for axis in permutation] or first
            if len(permutation) > 2 and permutation[:-2] == list(range(1, len(permutation) - 1)):
                return True
        elif node.op_type not in _REMOVED:
            return False
        if source is None:
            return False
        value = source
    return False


def _permutation(node: ir.Node) -> list[int]:
    """Return the axes of a Transpose; none if it reverses an unknown number of them."""
    if "perm" in node.attributes:
        return list(node.attributes["perm"].as_ints())
    shape = None if node.inputs[0] is None else node.inputs[0].shape
    return [] if shape is None else list(range(len(shape)))[::-1]


def _is_constant(value: ir.Value) -> bool:
    node = value.producer()
    return value.is_initializer() or (node is not None and node.op_type == "Constant")
