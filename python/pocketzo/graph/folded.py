"""Weights that the runtime reads only once, when it loads the graph."""

from __future__ import annotations

from typing import NamedTuple

import onnx_ir as ir

from pocketzo.graph.names import title_of
from pocketzo.graph.roles import ELEMENTWISE, ROLES, is_buffer, is_vector, role_of
from pocketzo.graph.weight import Draft


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
    """Find weights that reach their operator only through nodes that compute from constants alone.

    The runtime computes such nodes once. Their input is a weight if the result is used as a weight, or if the input has
    a parameter's name. Otherwise it is a constant, such as a table of sines.

    Returns
    -------
    dict of Value to str
        The node between a weight and its use, by the root of the weight.
    """
    folded: dict[ir.Value, str] = {}
    known: set[ir.Value] = set(draft.graph.initializers.values()) | draft.constants.keys()
    derived: dict[ir.Value, _Derived] = {}
    for node in draft.graph:
        inputs = [(index, value) for index, value in enumerate(node.inputs) if value is not None]
        if all(value in known for _, value in inputs) and not _has_inner_graph(node):
            result = _Derived(set(), title_of(node), node.op_type in ELEMENTWISE)
            for index, value in inputs:
                constant = draft.constants.get(value)
                if value in derived:
                    result = result.using(derived[value].roots, derived[value].by_channel)
                elif constant is not None and constant.array.size > 1 and not is_buffer(constant):
                    result = result.using({constant.root}, is_vector(constant.array))
                    if node.op_type not in ELEMENTWISE and constant.label and role_of(draft, constant, (node, index)):
                        folded.setdefault(constant.root, result.node)
            known.update(node.outputs)
            draft.constant_nodes.add(node)
            if result.roots:
                derived.update(dict.fromkeys(node.outputs, result))
            continue
        for index, value in inputs:
            if value in derived and index in ROLES.get(node.op_type, {}) and (node.op_type, index) != ("MatMul", 0):
                roots, between, by_channel = derived[value]
                if by_channel or node.op_type not in ELEMENTWISE:
                    folded.update((root, between) for root in roots if root not in folded)
    return folded


def _has_inner_graph(node: ir.Node) -> bool:
    return any(
        attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for attribute in node.attributes.values()
    )
