"""Add nodes, parameters, inputs and outputs to a graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from pocketzo.graph.names import unique, value_names
from pocketzo.graph.weight import Array


class Builder:
    """Adds nodes and values to a graph, and returns the values.

    Parameters
    ----------
    graph : Graph
    prefix : str
        Prefix of generated names.
    before : Node, optional
        Nodes are inserted before this one; by default they are appended to the graph.
    taken : set of str, optional
        Names that exist; generated ones are added. By default those of the graph.
    """

    def __init__(
        self, graph: ir.Graph, prefix: str = "", *, before: ir.Node | None = None, taken: set[str] | None = None
    ) -> None:
        self.graph = graph
        self.prefix = prefix
        self.before = before
        self._taken = value_names(graph) if taken is None else taken

    def op(
        self, kind: str, *inputs: ir.Value | None, name: str | None = None, domain: str = "", **attributes: Any
    ) -> ir.Value:
        """Add a node with one output of the same name."""
        name = unique(f"{self.prefix}{kind}", self._taken) if name is None else name
        node = ir.node(kind, inputs, attributes, domain=domain, outputs=[ir.Value(name=name)], name=name)
        self._insert(node)
        return node.outputs[0]

    def _insert(self, node: ir.Node) -> None:
        if self.before is None:
            self.graph.append(node)
        else:
            self.before.prepend(node)

    def split(self, value: ir.Value, sizes: Sequence[int]) -> list[ir.Value]:
        """Add a node that cuts a value along its last axis."""
        names = [unique(f"{self.prefix}Split", self._taken) for _ in sizes]
        outputs = [ir.Value(name=name) for name in names]
        node = ir.node("Split", [value, self.constant(list(sizes))], {"axis": -1}, outputs=outputs, name=names[0])
        self._insert(node)
        return outputs

    def constant(self, value: float | Sequence[int] | Array) -> ir.Value:
        """Add a Constant node: float32 for a float, int64 for integers. Initializers are kept for parameters."""
        return self.op("Constant", value=ir.tensor(value))

    def parameter(self, name: str, tensor: Array | ir.TensorProtocol) -> ir.Value:
        """Add an initializer."""
        stored = tensor if isinstance(tensor, ir.TensorProtocol) else ir.tensor(tensor, name=name)
        value = ir.val(name, const_value=stored)
        self.graph.register_initializer(value)
        return value

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        """Add an input of the graph."""
        value = ir.val(name, dtype, shape)
        self.graph.inputs.append(value)
        return value

    def output(self, value: ir.Value, dtype: ir.DataType, shape: Sequence[int | str]) -> None:
        """Make a value an output of the graph."""
        value.dtype = dtype
        value.shape = ir.Shape(shape)
        self.graph.outputs.append(value)
