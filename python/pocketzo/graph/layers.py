"""Find the layers of a graph: attention blocks and what follows them, between sums of the residual stream."""

from __future__ import annotations

from collections import defaultdict
from functools import cached_property
from typing import Final

import onnx_ir as ir

from pocketzo.errors import BundleError
from pocketzo.graph.attention import Scope
from pocketzo.graph.projections import Projection

_SKIP_NORMS: Final = {"SkipLayerNormalization", "SkipSimplifiedLayerNormalization"}
_NORMED: Final = {"Div", "LayerNormalization", "Mul", "RMSNormalization", "SimplifiedLayerNormalization"}
"""Operators that end a norm, but for its scale and bias."""
_SUM: Final = 3  # the output of the sum, which they norm


class Layers:
    """The layers of a graph.

    A residual sum adds to a value what projections computed from it. A layer has one attention block, and ends where
    the first sum of the next layer takes what it adds to: the last sum of the layer, or a norm of it.

    Raises
    ------
    BundleError
        There are no layers.
    """

    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        self._order = {value: index for index, node in enumerate(scope.graph) for value in node.outputs}
        self._depth: dict[ir.Value | None, int] = defaultdict(int)
        self._blocks: dict[ir.Value | None, int] = defaultdict(int)
        ends = {attention.node for attention in scope.attentions}
        for node in scope.graph:
            depth = max((self._depth[value] for value in node.inputs), default=0)
            blocks = max((self._blocks[value] for value in node.inputs), default=0)
            for value in node.outputs:
                self._depth[value] = depth + (node in scope.projections)
                self._blocks[value] = blocks + (node in ends)
        self.count = len(ends)
        if not ends or any(not self._sums[layer] for layer in range(self.count)):
            raise BundleError("no layers were found in the graph: sums of a residual stream around attention")
        self._last: list[tuple[ir.Node, int]] = []
        self._feed_forward: list[list[Projection]] = []
        for layer in range(self.count):
            node, _, branch = self._sums[layer][-1]
            self._last.append((node, tuple(node.inputs).index(branch)))
            found = (one for one in scope.trace(branch).projections if scope.trace(one.x).stopped not in ends)
            self._feed_forward.append(sorted(found, key=lambda one: one.weight))
        self._levels = self._find_levels()

    def first(self, layer: int) -> ir.Value:
        """Return the first residual value of a layer; after the last one, what the head reads."""
        if layer < self.count:
            return self._sums[layer][0][1]
        node, _, _ = self._sums[layer - 1][-1]
        return self._after_norm(node) if self._is_post_norm else self._total(node)

    def last_sum(self, layer: int) -> tuple[ir.Node, int]:
        """Return the last residual sum of a layer, and the index of what it adds, the feed-forward part's output."""
        return self._last[layer]

    def feed_forward(self, layer: int) -> list[Projection]:
        """Return the projections whose products the last sum of a layer adds, but for those of attention."""
        return self._feed_forward[layer]

    def of(self, node: ir.Node) -> int:
        """Return the layer of a node: -1 before the first one, their count after the last one."""
        level = max((self._levels[value] for value in node.inputs), default=-1)
        if node.op_type in _SKIP_NORMS and len(node.outputs) > _SUM:  # the norm is the next layer's
            level = max(level, self._levels[node.outputs[_SUM]])
        return level

    @cached_property
    def _sums(self) -> dict[int, list[tuple[ir.Node, ir.Value, ir.Value]]]:
        """By layer, the residual sums: node, what is added to, and what is added."""
        found: dict[int, list[tuple[ir.Node, ir.Value, ir.Value]]] = defaultdict(list)
        for node in self._scope.graph:
            if node in self._scope.masking or (node.op_type != "Add" and node.op_type not in _SKIP_NORMS):
                continue
            a, b = node.inputs[:2]
            blocks = max(self._blocks[a], self._blocks[b])
            if a is None or b is None or blocks == 0 or self._depth[a] == self._depth[b]:
                continue
            if a in self._scope.constants or b in self._scope.constants:
                continue
            skip, branch = (a, b) if self._depth[a] < self._depth[b] else (b, a)
            if self._leads(skip, branch):
                found[blocks - 1].append((node, skip, branch))
        return found

    def _leads(self, start: ir.Value, end: ir.Value) -> bool:
        """Return whether a value is computed from another one."""
        first = self._order.get(start, -1)
        node = start.producer()
        starts = set(node.outputs) if node is not None and node.op_type in _SKIP_NORMS else {start}
        todo, seen = [end], {end}
        while todo:
            node = todo.pop().producer()
            for value in node.inputs if node is not None else ():
                if value in starts:
                    return True
                if value is not None and value not in seen and self._order.get(value, -1) > first:
                    seen.add(value)
                    todo.append(value)
        return False

    @property
    def _is_post_norm(self) -> bool:
        """Whether norms are in the residual stream, as in BERT: the second sum does not take the first one."""
        sums = [entry for layer in range(self.count) for entry in self._sums[layer]]
        return len(sums) > 1 and sums[1][1] is not self._total(sums[0][0])

    def _total(self, node: ir.Node) -> ir.Value:
        """Return the sum that a node computes."""
        return node.outputs[_SUM if node.op_type in _SKIP_NORMS else 0]

    def _after_norm(self, node: ir.Node) -> ir.Value:
        """Return the norm of a sum: the value through which all leads that is computed from it."""
        value = node.outputs[0]
        if node.op_type in _SKIP_NORMS:
            return value
        while (made := value.producer()) is None or value is node.outputs[0] or made.op_type not in _NORMED:
            value = self._only_way(value)
        while len(readers := tuple(value.consumers())) == 1 and self._is_scaled(readers[0], value):
            value = readers[0].outputs[0]
        return value

    def _is_scaled(self, node: ir.Node, value: ir.Value) -> bool:
        others = [other for other in node.inputs if other is not value]
        return node.op_type in ("Mul", "Add") and self._scope.constants.issuperset(others)

    def _only_way(self, start: ir.Value) -> ir.Value:
        """Return the first value after another one through which all paths from it lead."""
        pending: set[ir.Value] = {start}
        reached = {start}
        for node in self._scope.graph:
            if reached.isdisjoint(node.inputs):
                continue
            reached.update(node.outputs)
            pending.update(value for value in node.outputs if value.uses() or value.is_graph_output())
            pending = {
                value for value in pending if value.is_graph_output() or not reached.issuperset(self._results(value))
            }
            if len(pending) == 1 and start not in pending:
                return pending.pop()
        raise BundleError("no layers were found in the graph: the last one does not end in a norm")

    def _results(self, value: ir.Value) -> list[ir.Value]:
        return [reader.outputs[0] for reader in value.consumers() if reader.graph is self._scope.graph]

    def _find_levels(self) -> dict[ir.Value | None, int]:
        starts = {self.first(layer): layer for layer in range(self.count + 1)}
        levels: dict[ir.Value | None, int] = defaultdict(lambda: -1)
        for value, layer in starts.items():
            levels[value] = layer
        for node in self._scope.graph:
            level = max((levels[value] for value in node.inputs), default=-1)
            for value in node.outputs:
                levels[value] = max(level, starts.get(value, -1))
        return levels
