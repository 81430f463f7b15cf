"""Find the attention blocks of a graph, and the projections that compute their queries, keys and values.

An attention block is found by its products: the scores are a product of two computed values, and a Softmax of them is
multiplied by the values; or it is one of onnxruntime's operators. From there the way back to the projections leads
through reshapes, rotations, norms and caches, whatever their names.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final

import onnx_ir as ir

from pocketzo.graph.names import title_of
from pocketzo.graph.packed import packed_ranges
from pocketzo.graph.projections import Projection, projection_of
from pocketzo.graph.quantised import added_to
from pocketzo.graph.read import MICROSOFT

ROLES: Final = ("query", "key", "value")
_FUSED: Final = {"Attention", "GroupQueryAttention", "MultiHeadAttention", "QAttention"}
_PRODUCTS: Final = {"Einsum", "FusedMatMul", "MatMul"}
_TO_SOFTMAX: Final = {
    *("Add", "Cast", "DequantizeLinear", "Div", "Dropout", "Identity", "Mul", "QuantizeLinear", "Reshape", "Softmax"),
    *("Sub", "Tanh", "Where"),
}
"""Operators between scores, their Softmax and its product with the values."""
_BETWEEN: Final = {
    *("Add", "Cast", "Concat", "DequantizeLinear", "Div", "Dropout", "Expand", "Gather", "Identity"),
    *("LayerNormalization", "Mul", "Neg", "Pow", "QuantizeLinear", "RMSNormalization", "Reciprocal", "ReduceMean"),
    *("ReduceSum", "Reshape", "RotaryEmbedding", "SimplifiedLayerNormalization", "Slice", "Split", "Sqrt", "Squeeze"),
    *("Sub", "Tile", "Transpose", "Unsqueeze", "Where"),
}
"""Operators between a projection and the attention that reads it."""


@dataclass(frozen=True)
class Columns:
    """The columns of a projection's product that are the queries, keys or values of a block."""

    projection: Projection
    start: int
    count: int


@dataclass(eq=False)
class Attention:
    """An attention block.

    Attributes
    ----------
    node : Node
        The product with the values, or the fused operator.
    columns : dict of str to Columns
        By role: query, key, value.
    faults : dict of str to str
        By role, why its columns were not found.
    inputs : dict of str to Value
        By role, what the scores' product and the values' product read; empty for a fused operator.
    """

    node: ir.Node
    columns: dict[str, Columns] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, ir.Value] = field(default_factory=dict)

    def stem(self, role: str) -> str:
        """Return what the names of tensors begin with that are added to the columns of a role."""
        columns = self.columns[role]
        stem = columns.projection.stem
        return stem if columns.count == columns.projection.columns else f"{stem}.{role}"


class Scope:
    """One graph, or the graph of a branch, with its projections and attention blocks.

    Attributes
    ----------
    graph : Graph
    constants : set of Value
        The values that are the same for all inputs.
    projections : dict of Node to Projection
    masking : set of Node
        The nodes between scores and their Softmax, once the attention blocks were found.
    """

    def __init__(self, graph: ir.Graph, outer: Collection[ir.Value] = ()) -> None:
        self.graph = graph
        self.constants = {*outer, *graph.initializers.values()}
        self.projections: dict[ir.Node, Projection] = {}
        self.masking: set[ir.Node] = set()
        for node in graph:
            if node.op_type == "Constant" or (
                node.inputs and all(value is None or value in self.constants for value in node.inputs)
            ):
                self.constants.update(node.outputs)
        parts = {other for node in graph for other in added_to(node)}
        for node in graph:
            projection = None if node in parts else projection_of(node, self.constants)
            if projection is not None:
                self.projections[node] = projection

    @cached_property
    def computed(self) -> set[ir.Value]:
        """The values that depend on a projection, shapes aside."""
        found: set[ir.Value] = set()
        for node in self.graph:
            is_shape = node.op_type in ("Shape", "Size")
            if node in self.projections or not (is_shape or found.isdisjoint(node.inputs)):
                found.update(node.outputs)
        return found

    @cached_property
    def attentions(self) -> list[Attention]:
        """The attention blocks, in the order of the graph."""
        found = []
        for node in self.graph:
            if node.op_type in _FUSED:
                found.append(self._fused(node))
            elif self._is_product(node) and (softmax := self._behind(node.inputs[0], "Softmax")) is not None:
                scores = self._behind(softmax.inputs[0], *_PRODUCTS, passed=self.masking)
                if scores is not None:
                    inputs = zip(ROLES, (*scores.inputs[:2], node.inputs[1]), strict=True)
                    found.append(self._attention(node, {role: value for role, value in inputs if value is not None}))
        return found

    def _is_product(self, node: ir.Node) -> bool:
        return node.op_type in _PRODUCTS and len(node.inputs) == 2 and self.computed.issuperset(node.inputs)

    def _behind(self, value: ir.Value | None, *kinds: str, passed: set[ir.Node] | None = None) -> ir.Node | None:
        """Return the nearest operator of a kind before a value, if only operators on scores are between: `passed`."""
        level = [value]
        seen: set[ir.Value | None] = set()
        while level:
            nodes = [one.producer() for one in level if one in self.computed]
            for node in nodes:
                if node is not None and node.op_type in kinds and ("Softmax" in kinds or self._is_product(node)):
                    return node
            seen.update(level)
            between = [node for node in nodes if node is not None and node.op_type in _TO_SOFTMAX]
            if passed is not None:
                passed.update(between)
            level = list(dict.fromkeys(one for node in between for one in node.inputs if one not in seen))
        return None

    def _fused(self, node: ir.Node) -> Attention:
        if node.op_type == "QAttention" or (node.op_type == "Attention" and node.domain == MICROSOFT):
            fault = f"node {title_of(node)} multiplies by its weights itself"
            return Attention(node, faults=dict.fromkeys(ROLES, fault))
        inputs = {role: value for role, value in zip(ROLES, node.inputs, strict=False) if value is not None}
        if len(inputs) == len(ROLES):
            found = self._attention(node, inputs)
            found.inputs = {}
            return found
        projections = self.trace(node.inputs[0]).projections
        if node.op_type != "GroupQueryAttention" or len(projections) != 1:
            fault = f"node {title_of(node)} reads queries, keys and values of each head in one input"
            return Attention(node, faults=dict.fromkeys(ROLES, fault))
        (projection,) = projections
        heads, others = (node.attributes[name].as_int() for name in ("num_heads", "kv_num_heads"))
        size = projection.columns // (heads + 2 * others)
        counts = {"query": heads * size, "key": others * size, "value": others * size}
        starts = {"query": 0, "key": heads * size, "value": (heads + others) * size}
        return Attention(node, {role: Columns(projection, starts[role], counts[role]) for role in ROLES})

    def _attention(self, node: ir.Node, inputs: Mapping[str, ir.Value]) -> Attention:
        found = Attention(node, inputs=dict(inputs))
        traces = {role: self.trace(value) for role, value in inputs.items()}
        for role, trace in traces.items():
            if trace.stopped is not None:
                found.faults[role] = f"node {title_of(trace.stopped)} is between it and a projection"
            elif len(trace.projections) != 1:
                found.faults[role] = f"{len(trace.projections)} projections lead to it"
            else:
                (projection,) = trace.projections
                shared = sum(projection in other.projections for other in traces.values()) > 1
                ranges = packed_ranges(projection) if shared else {projection.y: (0, projection.columns)}
                passed = [span for value, span in ranges.items() if not shared or value in trace.values]
                if len(passed) == 1:
                    found.columns[role] = Columns(projection, *passed[0])
                else:
                    found.faults[role] = f"the columns of {projection.weight!r} are mixed with those of other roles"
        return found

    @cached_property
    def _products(self) -> dict[ir.Value, Projection]:
        return {projection.y: projection for projection in self.projections.values()}

    def trace(self, value: ir.Value | None) -> Trace:
        """Go back from a value to projections."""
        found = Trace()
        todo = [value]
        while todo:
            value = todo.pop()
            node = None if value is None or value not in self.computed else value.producer()
            if node is None or value in found.values:
                continue
            assert value is not None, "a value that a node computes"
            found.values.add(value)
            if value in self._products:
                found.projections.add(self._products[value])
            elif node.op_type in _BETWEEN:
                todo.extend(node.inputs)
            else:
                found.stopped = node
        return found


@dataclass
class Trace:
    """What is behind a value: the projections, all values on the way, and an operator that ended it."""

    projections: set[Projection] = field(default_factory=set)
    values: set[ir.Value] = field(default_factory=set)
    stopped: ir.Node | None = None


def scopes_of(graph: ir.Graph) -> Iterator[Scope]:
    """Yield a graph, and those of its branches."""
    outer = Scope(graph)
    yield outer
    for inner in graph.subgraphs():
        if inner is not graph:
            yield Scope(inner, outer.constants)
