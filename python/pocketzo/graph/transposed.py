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
    """Whether a Transpose of the merged kind computes a value, or several that onnxruntime may make one.

    To merge two, it moves the first behind the nodes between, whatever these are, but for products.
    """
    pending: list[tuple[ir.Value, tuple[int, ...]]] = [(value, ())]
    seen = set(pending)
    while pending:
        value, permutation = pending.pop()
        node = value.producer()
        if node is None:
            continue
        sources = [each for each in node.inputs if each is not None and not _is_constant(each)]
        if node.op_type == "Transpose":
            first = _permutation(node)
            if not first or (permutation and len(permutation) != len(first)):
                continue
            permutation = tuple(first[axis] for axis in permutation) or tuple(first)
            if len(permutation) > 2 and permutation[:-2] == tuple(range(1, len(permutation) - 1)):
                return True
        elif node.op_type in _REMOVED:
            sources = sources[:1]
        elif permutation:
            sources = [] if node.op_type in _PRODUCTS else sources
        elif node.op_type not in _REMOVED_WITH_CONSTANT or len(sources) != 1:
            continue
        found = {(source, permutation) for source in sources} - seen
        seen |= found
        pending += found
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
