"""Walk through and change the messages of an ONNX graph."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final

from onnx import GraphProto, NodeProto, TensorProto, ValueInfoProto, helper

FLOATS: Final = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE}


def sorted_nodes(graph: GraphProto) -> list[NodeProto]:
    """Return the nodes in their order, but each behind those that make what it reads."""
    nodes = list(graph.node)
    makers = {output: number for number, node in enumerate(nodes) for output in node.output}
    order: dict[int, None] = {}
    for number in range(len(nodes)):
        stack = [number]
        while stack:
            node = nodes[stack[-1]]
            inner = (name for inside in subgraphs([node]) for reader in all_nodes(inside) for name in reader.input)
            before = {makers[name] for name in (*node.input, *inner) if name in makers} - order.keys()
            if before:
                stack += sorted(before)
            else:
                order[stack.pop()] = None
    return [nodes[number] for number in order]


def subgraphs(nodes: Iterable[NodeProto]) -> Iterator[GraphProto]:
    """Yield the graphs that nodes hold as attributes."""
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield attribute.g
            yield from attribute.graphs


def all_nodes(graph: GraphProto) -> Iterator[NodeProto]:
    """Yield the nodes of a graph and of the graphs in it."""
    for node in graph.node:
        yield node
        for subgraph in subgraphs([node]):
            yield from all_nodes(subgraph)


def value_names(graph: GraphProto) -> set[str]:
    """Return the names that the values of a graph and of the graphs in it have."""
    names = {value.name for value in (*graph.input, *graph.output)} | {tensor.name for tensor in graph.initializer}
    return names.union(*(node.output for node in all_nodes(graph)))


def rename_value(graph: GraphProto, old: str, new: str) -> None:
    """Give a value another name, in the graphs in it too."""
    for node in all_nodes(graph):
        for names in node.input, node.output:
            for index, name in enumerate(names):
                if name == old:
                    names[index] = new
    for subgraph in (graph, *subgraphs(all_nodes(graph))):
        for value in (*subgraph.initializer, *subgraph.value_info, *subgraph.output):
            if value.name == old:
                value.name = new


def shape_of(value: ValueInfoProto) -> list[int | str] | None:
    """Return the sizes of a tensor's axes, names for those that vary; None if its rank is not known."""
    if not value.type.tensor_type.HasField("shape"):
        return None
    return [
        size.dim_value if size.HasField("dim_value") and size.dim_value >= 0 else size.dim_param or "?"
        for size in value.type.tensor_type.shape.dim
    ]


def dtype_of(value: ValueInfoProto) -> str:
    """Return the name of a tensor's element type."""
    return helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name


def replace(repeated: Any, items: Iterable[Any]) -> None:
    """Set a repeated field."""
    items = list(items)
    del repeated[:]
    repeated.extend(items)
