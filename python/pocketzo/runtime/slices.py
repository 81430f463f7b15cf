"""The losses of tokens in slices, so that the logits of few tokens are in memory however many a run reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pocketzo.runtime.onnx_proto import INT, INT64, declare, onnx_messages, opset_of

LOGITS_MEMORY: Final = 32_000_000
"""Bytes that the logits of a language model may take, unless a figure is given for all activations."""

_FULL_SPEED: Final = 512  # tokens of a run: products of more rows are no faster a row
_MOST: Final = 16
_LOSSES: Final = "token_losses"
_CUT: Final = "positions", "targets"
_ROOM: Final = "slices/room"
_OPSET: Final = 13  # of Min and Max of integers


@dataclass(frozen=True)
class Slices:
    """How a graph computes logits.

    Attributes
    ----------
    count : int
        The most slices; 1 for a graph that computes all logits at once.
    columns : int
        Logits of a position.
    """

    count: int = 1
    columns: int = 1

    def feed(self, memory: int | None = None) -> dict[str, NDArray[np.int64]]:
        """Return the inputs that say how many positions a slice has, for bytes that its logits may take."""
        room = (memory or LOGITS_MEMORY) // (4 * self.columns)
        return {_ROOM: np.array([max(1, room)])} if self.count > 1 else {}


WHOLE: Final = Slices()


def cut_losses(model: Any, columns: Mapping[str, int]) -> Slices:
    """Have the training graph of a language model compute the logits of some positions after those of others.

    What depends on the inputs ``positions`` and ``targets`` treats each position by itself, up to the output
    ``token_losses``. These nodes are copied for each slice. onnxruntime finishes a slice before it begins the next.

    Parameters
    ----------
    model : message
        Changed in place.
    columns : mapping of str to int
        Of each matrix that may be the output projection: logits of a position.

    Returns
    -------
    Slices
        Enough for a run of as many tokens as make products fast, with :data:`LOGITS_MEMORY` for each slice. Slices
        that are not needed are empty. Of one slice, the graph was not changed.
    """
    graph = model.graph
    cut = _by_position(graph)
    logits = max((columns[name] for node in cut for name in node.input if name in columns), default=1)
    count = min(_MOST, -(-_FULL_SPEED * 4 * logits // LOGITS_MEMORY))
    computed = {name for node in cut for name in node.output}
    kept = {value.name for value in graph.output} - {_LOSSES}
    if count == 1 or opset_of(model) < _OPSET or _LOSSES not in computed or computed & kept:
        return WHOLE
    nodes, edges = _edges(graph, count)
    known = [value for value in graph.value if value.name in computed]
    for number in range(count):
        names = {name: f"{name}/slice{number}" for name in (*_CUT, *computed)}
        # onnxruntime gives a result the memory of its operand only where both have one shape by name.
        graph.value.extend(_renamed(value, names, number) for value in known)
        nodes += [_node("Slice", [name, edges[number], edges[number + 1]], names[name]) for name in _CUT]
        for node in cut:
            copy = onnx_messages().Node()
            copy.CopyFrom(node)
            copy.name = f"{node.name}/slice{number}"
            copy.input[:] = [names.get(name, name) for name in node.input]
            copy.output[:] = [names[name] for name in node.output]
            nodes.append(copy)
    whole = _node("Concat", [f"{_LOSSES}/slice{number}" for number in range(count)], _LOSSES)
    whole.attribute.add(name="axis", i=0, type=INT)
    others = [node for node in graph.node if not computed.intersection(node.output)]
    del graph.node[:]
    graph.node.extend([*others, *nodes, whole])  # onnxruntime sorts them
    return Slices(count, logits)


def _renamed(value: Any, names: Mapping[str, str], number: int) -> Any:
    """Return the declaration of a value for a slice: as many positions as the other values of that slice."""
    renamed = onnx_messages().Value()
    renamed.CopyFrom(value)
    renamed.name = names[value.name]
    for dim in renamed.type.tensor_type.shape.dim:
        if dim.dim_param:
            dim.dim_param = f"{dim.dim_param}/slice{number}"
    return renamed


def _by_position(graph: Any) -> list[Any]:
    """Return the nodes from the inputs with an element for each position to the losses."""
    dependent = {*_CUT} if {value.name for value in graph.input}.issuperset(_CUT) else set()
    found = []
    for node in graph.node:
        if not dependent.isdisjoint(node.input):
            dependent.update(name for name in node.output if name != _LOSSES)
            found.append(node)
    return found


def _edges(graph: Any, count: int) -> tuple[list[Any], list[str]]:
    """Return nodes that divide the positions into slices, equal but for roundings, and the names of their bounds."""
    declare(graph.input, _ROOM, INT64, [1])

    def number(value: int) -> str:
        name = f"slices/{value}"
        if all(tensor.name != name for tensor in graph.initializer):
            graph.initializer.add(name=name, data_type=INT64, dims=[1], raw_data=np.int64(value).tobytes())
        return name

    nodes: list[Any] = []

    def op(kind: str, *inputs: str) -> str:
        nodes.append(_node(kind, list(inputs), f"slices/{len(nodes)}/{kind}"))
        return str(nodes[-1].output[0])

    length = op("Shape", _CUT[0])
    needed = op("Div", op("Add", length, op("Sub", _ROOM, number(1))), _ROOM)
    used = op("Max", op("Min", needed, number(count)), number(1))
    size = op("Div", op("Add", length, op("Sub", used, number(1))), used)
    return nodes, [op("Mul", size, number(at)) for at in range(count + 1)]


def _node(kind: str, inputs: list[str], output: str) -> Any:
    return onnx_messages().Node(op_type=kind, name=output, input=inputs, output=[output])
