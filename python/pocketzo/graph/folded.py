"""Weights that the runtime reads only once, when it loads the graph."""

from __future__ import annotations

from typing import NamedTuple

from pocketzo.graph.names import title_of
from pocketzo.graph.proto import subgraphs
from pocketzo.graph.roles import ELEMENTWISE, ROLES, is_buffer, is_vector, role_of
from pocketzo.graph.weight import Draft, Use


class _Derived(NamedTuple):
    """A value that is computed from constants alone.

    Attributes
    ----------
    roots : set of str
        The tensors that it was computed from.
    node : str
        The node that made it.
    by_channel : bool
        Whether it still has one element for each channel, as a norm's scale or a bias does.
    """

    roots: set[str]
    node: str
    by_channel: bool

    def using(self, roots: set[str], by_channel: bool) -> _Derived:
        return _Derived(self.roots | roots, self.node, self.by_channel and by_channel)


def find_folded(draft: Draft) -> dict[str, str]:
    """Find weights that reach their operator only through nodes that compute from constants alone.

    The runtime computes such nodes once. What they use is a weight if it comes out at a weight's place, or if it
    has a parameter's name; else it is a constant: tables of sines are made so.

    Returns
    -------
    dict of str to str
        The node that stands between, by the root of the weight.
    """
    dead: dict[str, str] = {}
    constants = {tensor.name for tensor in draft.graph.initializer} | {weight.name for weight in draft.large}
    derived: dict[str, _Derived] = {}
    for node in draft.graph.node:
        names = [name for name in node.input if name]
        known = all(name in constants or name in draft.tensors or name in derived for name in names)
        if known and not any(subgraphs([node])):
            result = _Derived(set(), title_of(node), node.op_type in ELEMENTWISE)
            for index, name in enumerate(node.input):
                if name in derived:
                    result = result.using(derived[name].roots, derived[name].by_channel)
                elif name in draft.tensors and draft.tensors[name].size > 1 and not is_buffer(draft, name):
                    result = result.using({draft.root[name]}, is_vector(draft.tensors[name]))
                    if node.op_type not in ELEMENTWISE and draft.label[name] and role_of(draft, name, Use(node, index)):
                        dead.setdefault(draft.root[name], result.node)
            constants.update(node.output)
            draft.constant_nodes.add(id(node))
            if result.roots:
                derived.update(dict.fromkeys(node.output, result))
            continue
        for index, name in enumerate(node.input):
            if name in derived and index in ROLES.get(node.op_type, {}) and (node.op_type, index) != ("MatMul", 0):
                roots, between, by_channel = derived[name]
                if by_channel or node.op_type not in ELEMENTWISE:
                    dead.update((root, between) for root in roots if root not in dead)
    return dead
