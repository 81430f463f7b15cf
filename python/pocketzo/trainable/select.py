"""Choose the weights of a graph that are trained: all, those of some kind, of the last layers, or by their names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import onnx_ir as ir

from pocketzo.errors import BundleError
from pocketzo.graph.attention import scopes_of
from pocketzo.graph.frozen import able_weights, check_able
from pocketzo.graph.layers import Layers
from pocketzo.graph.roles import is_vector, roles_of
from pocketzo.graph.weight import Use, Weight
from pocketzo.trainable.spec import SETS, Choice, Part

_NORMS = (
    *("BatchNormalization", "GroupNormalization", "InstanceNormalization", "LayerNormalization", "RMSNormalization"),
    *("EmbedLayerNormalization", "SimplifiedLayerNormalization"),
    *("SkipLayerNormalization", "SkipSimplifiedLayerNormalization"),
)
_SPREAD = {"ReduceMean", "ReduceSum", "Sqrt"}
"""Operators of which one computes by what a norm divides."""


def select(graph: ir.Graph, weights: Sequence[Weight], parts: Iterable[Part]) -> dict[str, list[str]]:
    """Return the names of the weights of each part that chooses among those that exist.

    Parameters
    ----------
    graph : Graph
        As :func:`extract_weights` leaves it.
    weights : sequence of Weight
        All that it returned.
    parts : iterable of Part

    Returns
    -------
    dict of str to list of str
        By the text of the part; those that add tensors have no entry.

    Raises
    ------
    BundleError
        A part chooses none, or a weight of a type that cannot be trained, or needs layers and the graph has none.
    DeadWeightError
        A part chooses a weight by name of which the runtime would not see changes.
    """
    choices = [part for part in parts if isinstance(part, Choice)]
    if not choices:
        return {}
    able = able_weights(graph, weights)
    uses = _Uses(graph) if any(choice.kind not in ("all", "regex") for choice in choices) else None
    found: dict[str, list[str]] = {}
    for choice in choices:
        if choice.pattern is not None:
            named = [weight for weight in weights if weight.parameter and choice.pattern.search(weight.name)]
            check_able(choice.text, named, able, weights)
        elif uses is None:
            named = able
        else:
            named = [weight for weight in able if uses.match(weight, choice)]
            if not named:
                raise BundleError(
                    f"train={choice.text!r}: the graph has no such weights that can be trained; they are "
                    f"{', '.join(repr(weight.name) for weight in able[:3])} and so on; expected {SETS}"
                )
        found[choice.text] = [weight.name for weight in named]
    return found


class _Uses:
    """Where and how the weights of a graph are used."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._scopes = {scope.graph: scope for scope in scopes_of(graph)}
        self._layers: dict[ir.Graph, Layers] = {}

    def match(self, weight: Weight, choice: Choice) -> bool:
        """Return whether a choice has a weight."""
        if weight.name not in self._graph.initializers:
            return False
        uses = tuple(self._graph.initializers[weight.name].uses())
        match choice.kind:
            case "bias":
                return is_vector(weight.array) and any(map(_is_bias, uses))
            case "norm":
                return any(map(_is_norm, uses))
            case "head":
                return any(self._level(use) == self._count(use) for use in uses)
            case _:
                return all(self._count(use) - choice.layers <= self._level(use) < self._count(use) for use in uses)

    def _of(self, use: Use) -> Layers:
        scope = use[0].graph
        assert isinstance(scope, ir.Graph), "a node of a graph"
        if scope not in self._layers:
            self._layers[scope] = Layers(self._scopes[scope])
        return self._layers[scope]

    def _level(self, use: Use) -> int:
        return max(self._of(use).of(use[0]), -1)

    def _count(self, use: Use) -> int:
        return self._of(use).count


def _is_bias(use: Use) -> bool:
    role = roles_of(use[0]).get(use[1], "")
    return role.rpartition(".")[2] in ("bias", "skip_bias")


def _is_norm(use: Use) -> bool:
    """Return whether a weight is the scale or the bias of a norm, which may be spelled out."""
    node, index = use
    if node.op_type in _NORMS:
        return not roles_of(node).get(index, "").endswith(("embeddings.weight", "position", "skip_bias"))
    if node.op_type not in ("Add", "Mul"):
        return False
    other = node.inputs[1 - index]
    before = None if other is None else other.producer()
    if node.op_type == "Add":
        return before is not None and before.op_type == "Mul" and _divides_by_spread(before, 2)
    return before is not None and _divides_by_spread(before, 1)


def _divides_by_spread(node: ir.Node, steps: int) -> bool:
    """Return whether a node divides by a mean or a root; the scale of a norm may be between."""
    if node.op_type == "Cast" and (value := node.inputs[0]) is not None and (before := value.producer()) is not None:
        return _divides_by_spread(before, steps)
    if node.op_type not in ("Div", "Mul"):
        return False
    sources = [value.producer() for value in node.inputs if value is not None]
    for source in sources:
        if source is not None and source.op_type in ("Reciprocal", *_SPREAD):
            return True
    return steps > 1 and any(source is not None and _divides_by_spread(source, steps - 1) for source in sources)
