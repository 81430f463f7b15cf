"""Cut a bundle's graph to what computes some of its values, where there is no package onnx."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from pocketzo.formats.bundle import WEIGHTS
from pocketzo.formats.side import BIAS, sum_name
from pocketzo.runtime.onnx_proto import FLOAT

if TYPE_CHECKING:
    from pocketzo.formats.safetensors import Entry

_LOGITS = "logits"


def keep_values(graph: Any, names: Collection[str], *, typed: bool = True) -> None:
    """Make values the outputs of a graph, and remove what they do not need, inputs too.

    Parameters
    ----------
    graph : message Graph
        Of :func:`read_graph`, changed in place.
    names : collection of str
        Values; outputs of the graph keep their types.
    typed : bool
        Whether the others are declared as float32; else onnxruntime infers what they are.
    """
    declared = {value.name: value for value in graph.output}
    added = [name for name in names if name not in declared]
    kept = [value for value in graph.output if value.name in names]
    del graph.output[:]
    graph.output.extend(kept)
    for name in added:
        value = graph.output.add(name=name)
        if typed:
            value.type.tensor_type.elem_type = FLOAT
    remove_unused_inputs(graph)


def keep_taps(graph: Any, layers: Sequence[int]) -> None:
    """Remove from a graph with a side head the other taps, and the layers that only they need.

    The scores are summed tap by tap: each sum is made to follow the one of the tap before it that is kept.
    """
    sums = [sum_name(layer) for layer in layers]
    first = {after: before for before, after in pairwise([BIAS, *sums])}
    for node in graph.node:
        if node.output[0] in first:
            node.input[0] = first[node.output[0]]
        elif node.output[0] == _LOGITS:
            node.input[0] = sums[-1]
    remove_unused(graph)


def remove_unused(graph: Any) -> set[str]:
    """Remove the nodes and initializers that no output needs, and return the names of the values that are."""
    needed = {value.name for value in graph.output}
    nodes = []
    for node in reversed(graph.node):
        if not needed.isdisjoint(node.output):
            nodes.append(node)
            needed.update(filter(None, node.input))  # an optional input that is left out has no name
            for attribute in node.attribute:
                for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                    needed |= remove_unused(inner)
    nodes.reverse()
    tensors = [tensor for tensor in graph.initializer if tensor.name in needed]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(tensors)
    return needed


def remove_unused_inputs(graph: Any) -> None:
    """Remove the nodes, initializers and inputs that no output needs."""
    needed = remove_unused(graph)
    inputs = [value for value in graph.input if value.name in needed]
    del graph.input[:]
    graph.input.extend(inputs)


def point_to(graph: Any, entries: Mapping[str, Entry]) -> None:
    """Point initializers to their places in the file of weights, and give them the shapes that they have there."""
    for tensor in graph.initializer:
        if tensor.name not in entries:
            continue
        entry = entries[tensor.name]
        del tensor.dims[:]
        tensor.dims.extend(entry.shape)
        places = {"location": WEIGHTS, "offset": entry.start, "length": entry.stop - entry.start}
        for item in tensor.external_data:
            if item.key in places:
                item.value = str(places[item.key])


def set_columns(graph: Any, columns: int) -> None:
    """Declare how many scores an example has."""
    for value in graph.output:
        if value.name == _LOGITS:
            size = value.type.tensor_type.shape.dim[-1]
            size.ClearField("dim_param")
            size.dim_value = columns
