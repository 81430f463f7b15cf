"""Weights that the runtime reads only once, when it loads the graph."""

from __future__ import annotations

from typing import NamedTuple

import onnx_ir as ir

from pocketzo.graph.names import title_of
from pocketzo.graph.roles import ELEMENTWISE, is_vector, role_of, roles_of
from pocketzo.graph.weight import Draft, Use


class _Derived(NamedTuple):
    """A value that is computed from constants alone.

    Attributes
    ----------
    roots : set of Value
        The tensors that it is computed from.
    node : str
        The node that computes it.
    by_channel : bool
        Whether it has one element per channel, like a norm's scale or a bias.
    """

    roots: set[ir.Value]
    node: str
    by_channel: bool

    def using(self, roots: set[ir.Value], by_channel: bool) -> _Derived:
        return _Derived(self.roots | roots, self.node, self.by_channel and by_channel)


def find_folded(draft: Draft) -> dict[ir.Value, str]:
    """Find weights that reach an operator only through nodes that compute from constants alone.

    The runtime computes such nodes once. Their input is a weight if the result is used as a weight, if the input has a
    parameter's name, or if another node uses it as a weight. Otherwise it is a constant, such as a table of sines.

    Returns
    -------
    dict of Value to str
        The node between a weight and its use, by the root of the weight.
    """
    folded: dict[ir.Value, str] = {}
    read: dict[ir.Value, str] = {}  # roots of all values that nodes read, and the nodes that compute the values
    known: set[ir.Value] = set(draft.graph.initializers.values()) | draft.constants.keys()
    derived: dict[ir.Value, _Derived] = {}
    for node in draft.graph.all_nodes():
        inputs = [(index, value) for index, value in enumerate(node.inputs) if value is not None]
        if inputs and all(value in known for _, value in inputs) and not _has_inner_graph(node):
            result = _derive(draft, node, derived, folded)
            known.update(node.outputs)
            draft.constant_nodes.add(node)
            if result.roots:
                derived.update(dict.fromkeys(node.outputs, result))
                if any(value.is_graph_output() for value in node.outputs):
                    read.update(dict.fromkeys(result.roots, result.node))
            continue
        for index, value in inputs:
            if value in derived:
                roots, between, by_channel = derived[value]
                read.update((root, between) for root in roots if root not in read)
                is_role = index in roles_of(node) and (node.op_type, index) != ("MatMul", 0)
                if is_role and (by_channel or node.op_type not in ELEMENTWISE):
                    folded.update((root, between) for root in roots if root not in folded)
    used = {
        constant.root
        for constant in draft.constants.values()
        if any(role_of(draft, use) for use in constant.value.uses())
    }
    return folded | {root: between for root, between in read.items() if root in used and root not in folded}


def _derive(draft: Draft, node: ir.Node, derived: dict[ir.Value, _Derived], folded: dict[ir.Value, str]) -> _Derived:
    """Return what a node computes from constants; its own weights, if their names show them, are folded."""
    result = _Derived(set(), title_of(node), node.op_type in ELEMENTWISE)
    if node.op_type in ("Shape", "Size"):
        return result
    for index, value in enumerate(node.inputs):
        constant = draft.constants.get(value) if value is not None else None
        if value in derived:
            result = result.using(derived[value].roots, derived[value].by_channel)
        elif constant is not None and constant.array.size > 1 and not _is_known(draft, (node, index)):
            result = result.using({constant.root}, is_vector(constant.array))
            if node.op_type not in ELEMENTWISE and constant.label and role_of(draft, (node, index)):
                folded.setdefault(constant.root, result.node)
    return result


def _is_known(draft: Draft, use: Use) -> bool:
    """Return whether a use is known to be none of a weight, so that what is computed from it is none."""
    return draft.not_weights.get(use, "").startswith(("buffer", "quantised"))


def _has_inner_graph(node: ir.Node) -> bool:
    return any(
        attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for attribute in node.attributes.values()
    )
