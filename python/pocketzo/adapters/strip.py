"""Remove from a graph what LoRA and (IA)3 added to it, without the package onnx."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pocketzo.errors import BundleError
from pocketzo.formats.added import AddedSpec
from pocketzo.runtime.onnx_proto import all_nodes
from pocketzo.runtime.subgraph import remove_unused


def strip(graph: Any, added: Iterable[AddedSpec]) -> None:
    """Undo the additions: the graph computes the base again.

    Parameters
    ----------
    graph : message Graph
        Of :func:`pocketzo.runtime.onnx_proto.read_graph`, changed in place.
    added : iterable of AddedSpec
        Of the kinds ``lora`` and ``ia3``.

    Raises
    ------
    BundleError
        A node still reads one of their tensors.
    """
    added = list(added)
    up = {item.tensors[1] for item in added if item.kind == "lora"}
    factors = {item.tensors[0] for item in added if item.kind == "ia3"}
    _Strip(up, factors).of(graph)
    remove_unused(graph)
    left = {name for item in added for name in item.tensors} & {tensor.name for tensor in graph.initializer}
    if left:
        raise BundleError(
            f"the graph uses {min(left)!r} in another way than 'pocketzo prepare' adds it: prepare it again"
        )


class _Strip:
    """Replaces what the added nodes compute by what they change; the nodes are then unused."""

    def __init__(self, up: set[str], factors: set[str]) -> None:
        self._up, self._factors = up, factors
        self._base: dict[str, str] = {}
        self._deltas: set[str] = set()
        self._scaled: dict[str, tuple[str, str]] = {}  # products with factors: the prefix of their nodes, and the base
        self._makers: dict[str, Any] = {}

    def of(self, graph: Any) -> None:
        for node in graph.node:
            for attribute in node.attribute:
                for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                    self.of(inner)
            given = list(node.input)
            for index, name in enumerate(given):
                node.input[index] = self._base.get(name, name)
            self._visit(node, given)
            self._makers.update(dict.fromkeys(node.output, node))
        for value in graph.output:
            if value.name in self._base:
                self._keep_name(graph, self._base.pop(value.name), value.name)

    def _visit(self, node: Any, given: list[str]) -> None:
        prefix = _prefix(node)
        match node.op_type:
            case "MatMul" if not self._up.isdisjoint(given):
                self._deltas.add(node.output[0])
            case "Cast" if given[0] in self._deltas:
                self._deltas.add(node.output[0])
            case "Add" if given[1] in self._deltas:
                self._base[node.output[0]] = node.input[0]
            case "Mul" if given[1] in self._factors:
                base, maker = node.input[0], self._makers.get(node.input[0])
                if maker is not None and maker.op_type == "Cast" and _prefix(maker) == prefix:
                    base = maker.input[0]
                    self._scaled[node.output[0]] = (prefix, base)
                self._base[node.output[0]] = base
            case "Cast" if given[0] in self._scaled and self._scaled[given[0]][0] == prefix:
                self._base[node.output[0]] = self._scaled[given[0]][1]
            case "Concat":
                maker = self._makers.get(node.input[0])
                if (
                    maker is not None
                    and maker.op_type == "Split"
                    and list(maker.output) == list(node.input)
                    and _prefix(maker) == prefix
                ):
                    self._base[node.output[0]] = maker.input[0]

    def _keep_name(self, graph: Any, base: str, output: str) -> None:
        """Give the base of an output the output's name."""
        for node in all_nodes(graph):
            for names in (node.input, node.output):
                for index, name in enumerate(names):
                    if name in (base, output):
                        names[index] = output if name == base else base
        for name, value in self._base.items():
            if value == base:
                self._base[name] = output


def _prefix(node: Any) -> str:
    return str(node.name).rpartition("/")[0]
