"""Find the residual stream of a transformer by the structure of its graph.

Every path from the embedding of the tokens to the output passes the residual stream, and a few nodes between two
sublayers; what is inside a sublayer is bypassed by the stream. So the nodes that all paths have in common are the
stream, in any export, whatever its names: post-norm, pre-norm, parallel sublayers, fused operators, quantised weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Final, NamedTuple, TypeAlias

import onnx_ir as ir

from pocketzo.errors import BundleError
from pocketzo.graph.decoder import TOKENS
from pocketzo.graph.positions import PROJECTIONS

Shapes: TypeAlias = Callable[[Sequence[ir.Value]], Sequence[tuple[int, ...]]]
"""Runs a graph on a small batch, and returns the shapes of some values; an empty one for those that are no floats."""

_SAME_TOKENS: Final = {"Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze"}
_LOOKUPS: Final = {"Gather", "GatherBlockQuantized", "EmbedLayerNormalization"}
_SIZES: Final = {"Shape", "Size"}
_ATTENTION: Final = {
    "Attention",
    "DecoderMaskedMultiHeadAttention",
    "GroupQueryAttention",
    "MultiHeadAttention",
    "PackedAttention",
    "PackedMultiHeadAttention",
    "QAttention",
    "Softmax",
    "SparseAttention",
}
_MATRICES: Final = PROJECTIONS | {"Conv", "Einsum", "MatMulBnb4", "QGemm"}
_SKIP_SUM: Final = {"SkipLayerNormalization": 3, "SkipSimplifiedLayerNormalization": 3}
"""Operators that add and normalise, and which output is the sum."""


class Tap(NamedTuple):
    """The output of a layer.

    Attributes
    ----------
    layer : int
        The number of layers that compute it, from 1.
    value : Value
        Floats [batch, sequence, hidden].
    size : int
        Of a token's hidden state.
    normalised : bool
        Whether the graph has normalised it. A sum of the residual stream is not.
    """

    layer: int
    value: ir.Value
    size: int
    normalised: bool


def find_taps(graph: ir.Graph, tokens: tuple[int, ...], shapes: Shapes) -> list[Tap]:
    """Return the output of each layer, from the first to the last.

    A layer ends where the next one begins to attend, and the last one behind its feed-forward part and the norm that
    follows.

    Parameters
    ----------
    graph : Graph
        Of an encoder or a decoder without caches, its nodes in topological order.
    tokens : tuple of int
        The shape of the token ids, [batch, sequence], in the batch that `shapes` runs.
    shapes : callable

    Raises
    ------
    BundleError
        No residual stream is found.
    """
    stream = _Stream(graph)
    found = shapes([_output(node) for node in stream.shared])
    first = stream.attending[0][0]
    by_token = [len(shape) == 3 and shape[:2] == tokens for shape in found]
    size = next((shape[-1] for shape, good in zip(found[first::-1], by_token[first::-1], strict=True) if good), None)
    if size is None:
        raise _none("what the first layer reads is not [batch, sequence, hidden]")
    good = [by and shape[-1] == size for shape, by in zip(found, by_token, strict=True)]
    starts = [start for start, _ in stream.attending]
    ends = [end for _, end in stream.attending]
    taps = []
    for layer, (after, last) in enumerate(zip(ends, [*starts[1:], stream.end], strict=True), 1):
        at = next((at for at in range(last, after - 1, -1) if good[at]), None)
        if at is None:
            raise _none(f"layer {layer} has no output [batch, sequence, {size}]")
        value = _output(stream.shared[at])
        taps.append(Tap(layer, value, size, not stream.is_sum(value)))
    return taps


class _Stream:
    """The nodes that all paths from the tokens' embedding to the output have in common.

    Attributes
    ----------
    shared : list of Node
    attending : list of (int, int)
        The numbers in `shared` between which a layer attends.
    end : int
        The last node of the last layer.
    """

    def __init__(self, graph: ir.Graph) -> None:
        sources = list(_lookups(graph))
        if not sources:
            raise _none(f"nothing looks up {TOKENS!r} in an embedding")
        reads = _reads(graph)
        self._flow = set(sources)
        for node, read in reads.items():
            if not read.isdisjoint(self._flow):
                self._flow.add(node)
        needed = _longest(graph, reads, self._flow)
        nodes = [node for node in reads if node in needed]
        numbers = {node: number for number, node in enumerate(nodes)}
        reach = list(range(len(nodes)))  # the last node that reads this one
        for node in nodes:
            for read_node in reads[node] & needed:
                reach[numbers[read_node]] = max(reach[numbers[read_node]], numbers[node])
        furthest = max((numbers[node] for node in sources if node in numbers), default=0)
        shared = []
        for number, last in enumerate(reach):
            if furthest <= number:
                shared.append(number)
            furthest = max(furthest, last)
        self.shared = [nodes[number] for number in shared]
        inside = [nodes[start + 1 : end] for start, end in pairwise(shared)]
        self.attending = [(at, at + 1) for at, part in enumerate(inside) if _has(part, _ATTENTION)]
        if not self.attending:
            raise _none("no attention is bypassed by what its layer adds to")
        begin = self.attending[-1][1]
        sums = [at + 1 for at in range(begin, len(inside)) if _has(inside[at], _MATRICES)]
        end = sums[-1] if sums else begin
        while end + 1 < len(self.shared) and not _has([self.shared[end + 1]], _MATRICES):
            end += 1
        self.end = end

    def is_sum(self, value: ir.Value) -> bool:
        """Return whether a value is a sum of what the tokens say: of the residual stream and a sublayer."""
        node = value.producer()
        while node is not None and node.op_type in _SAME_TOKENS and node.inputs[0] is not None:
            value = node.inputs[0]
            node = value.producer()
        if node is None or node.op_type in _SKIP_SUM:
            return node is not None and value.index() == _SKIP_SUM[node.op_type]
        computed = [one for one in node.inputs if one is not None and one.producer() in self._flow]
        return node.op_type in ("Add", "Sum") and len(computed) > 1


def _lookups(graph: ir.Graph) -> Iterator[ir.Node]:
    """Yield the nodes that look the tokens up in a table."""
    ahead = [value for value in graph.inputs if value.name == TOKENS]
    while ahead:
        for node, _ in ahead.pop().uses():
            if node.op_type in _LOOKUPS:
                yield node
            elif node.op_type in _SAME_TOKENS:
                ahead.extend(node.outputs)


def _reads(graph: ir.Graph) -> dict[ir.Node, set[ir.Node]]:
    """Return for each node, in topological order, those whose outputs it reads, in a subgraph too; but for sizes."""
    outer = set(graph)
    found = {}
    for node in graph:
        values = () if node.op_type in _SIZES else (each for one in (node, *_inside(node)) for each in one.inputs)
        producers = (value.producer() for value in values if value is not None)
        found[node] = {producer for producer in producers if producer is not None and producer in outer}
    return found


def _longest(graph: ir.Graph, reads: Mapping[ir.Node, set[ir.Node]], flow: set[ir.Node]) -> set[ir.Node]:
    """Return the nodes that compute an output from the tokens: of the output with the most."""
    paths = []
    for output in graph.outputs:
        needed: set[ir.Node] = set()
        ahead = [output.producer()]
        while ahead:
            node = ahead.pop()
            if node is not None and node in flow and node not in needed:
                needed.add(node)
                ahead += reads[node]
        paths.append(needed)
    return max(paths, key=len, default=set())


def _inside(node: ir.Node) -> Iterator[ir.Node]:
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield from attribute.as_graph().all_nodes()


def _has(nodes: Sequence[ir.Node], kinds: set[str]) -> bool:
    return any(inner.op_type in kinds for node in nodes for inner in (node, *_inside(node)))


def _output(node: ir.Node) -> ir.Value:
    """Return the output of a node that is the stream: the sum, where it is given."""
    at = _SKIP_SUM.get(node.op_type, 0)
    return node.outputs[at] if at < len(node.outputs) and node.outputs[at].name else node.outputs[0]


def _none(reason: str) -> BundleError:
    return BundleError(
        f"no residual stream was found, which a side head reads: {reason}; it is found in transformers that read "
        f"{TOKENS!r} [batch, sequence] and keep all tokens up to their last layer"
    )
