"""Keep float16 graphs away from a fault of onnxruntime that ends the process."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from pocketzo.graph.build import Builder
from pocketzo.graph.names import value_names


def separate_transposes(model: ir.Model) -> None:
    """Put a node between each Transpose and MatMul that onnxruntime would merge wrongly in float16.

    On x86-64 at its default level of optimisation, onnxruntime computes in float32, and merges a Transpose that moves
    the first axis into one of the last two with the MatMul of a matrix after it. Its next optimisation then reads
    memory that is not its own, and the process dies (onnxruntime issue 28392, seen in 1.32). An axis of size 1 in front
    keeps them apart and costs nothing. A Reshape to the same shape does not: onnxruntime removes it.

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
            if node.op_type != "MatMul" or node.domain not in ("", "ai.onnx") or len(node.inputs) != 2:
                continue
            for index, other in ((0, 1), (1, 0)):
                value, matrix = node.inputs[index], node.inputs[other]
                if value is None or matrix is None or not (_is_merged(value) and _is_matrix(matrix)):
                    continue
                build = Builder(scope, "pocketzo.separate.", before=node, taken=taken)
                axis = build.constant([0])
                deeper = build.op("Unsqueeze", value, axis)
                product = build.op("MatMul", *((deeper, matrix) if index == 0 else (matrix, deeper)))
                result = build.op("Squeeze", product, axis)
                ir.convenience.replace_nodes_and_values(scope, node, [node], [], [node.outputs[0]], [result])
                break


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    for scope in (graph, *graph.subgraphs()):
        yield from scope.initializers.values()
        for node in scope:
            yield from node.outputs


def _is_merged(value: ir.Value) -> bool:
    """Whether a Transpose of the merged kind computes a value."""
    node = value.producer()
    while node is not None and node.op_type in ("Identity", "Cast") and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    if node is None or node.op_type != "Transpose" or "perm" not in node.attributes:
        return False
    permutation = list(node.attributes["perm"].as_ints())
    return len(permutation) > 2 and permutation[:-2] == list(range(1, len(permutation) - 1))


def _is_matrix(value: ir.Value) -> bool:
    """Whether a value is a constant matrix."""
    node = value.producer()
    while node is not None and node.op_type in ("Identity", "Cast", "Transpose") and node.inputs[0] is not None:
        value = node.inputs[0]
        node = value.producer()
    is_constant = value.is_initializer() or (node is not None and node.op_type == "Constant")
    shape = value.shape if value.const_value is None else value.const_value.shape
    return is_constant and shape is not None and len(shape) == 2
