"""Find the residual stream of a transformer by the structure of its graph, where there is no package onnx.

Every path from the embedding of the tokens to the output passes the residual stream, and a few nodes between two
sublayers; what is inside a sublayer is bypassed by the stream. So the nodes that all paths have in common are the
stream, in any export, whatever its names: post-norm, pre-norm, parallel sublayers, fused operators, quantised weights,
and with what prepare adds beside the weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pocketzo.errors import BundleError, joined_lines
from pocketzo.formats.bundle import Bundle
from pocketzo.formats.probe import Probe
from pocketzo.formats.side import SideHead, SideTap, Tap, tap_name
from pocketzo.runtime.frozen import model_over_base
from pocketzo.runtime.onnx_proto import all_nodes, read_by, read_graph
from pocketzo.runtime.outputs import probe_batch
from pocketzo.runtime.session import open_unoptimised
from pocketzo.runtime.subgraph import keep_values

_TOKENS: Final = "input_ids"
_MASK: Final = "attention_mask"
_PROJECTIONS: Final = {
    *("MatMul", "Gemm", "FusedMatMul", "MatMulNBits", "MatMulInteger", "QLinearMatMul", "MatMulIntegerToFloat"),
    "DynamicQuantizeMatMul",
}
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
_MATRICES: Final = _PROJECTIONS | {"Conv", "Einsum", "MatMulBnb4", "QGemm"}
_SKIP_SUM: Final = {"SkipLayerNormalization": 3, "SkipSimplifiedLayerNormalization": 3}
"""Operators that add and normalise, and which output is the sum."""


@dataclass(frozen=True)
class Stream:
    """The residual stream of a model, as a side head reads it.

    Attributes
    ----------
    taps : tuple of Tap
        The outputs of the layers of the last half, and of the one before.
    layers : int
        Of the model.
    causal : bool
        Whether no token depends on those after it.
    """

    taps: tuple[Tap, ...]
    layers: int
    causal: bool

    @classmethod
    def of(cls, bundle: Bundle) -> Stream:
        """Return the stream of a bundle: that which its side head reads, or as its graph is built.

        Raises
        ------
        BundleError
            No residual stream is found, or its values are not finite on the probing batch.
        NotPrepackableError
            The package protobuf is not installed.
        """
        if (side := bundle.side) is not None:
            found = (Tap(tap.layer, tap_name(tap.layer), tap.size, normalised=True) for tap in side.taps)
            return cls(tuple(found), side.layers, side.causal)
        layers = find_taps(bundle)
        taps = tuple(layers[max(len(layers) // 2, 1) - 1 :])
        return cls(taps, len(layers), _is_causal(bundle, taps[-1]))

    @property
    def side(self) -> SideHead:
        """The field of ``bundle.json`` for a head that reads it."""
        return SideHead(tuple(SideTap(tap.layer, tap.size) for tap in self.taps), self.layers, self.causal)


def find_taps(bundle: Bundle) -> list[Tap]:
    """Return the output of each layer, from the first to the last.

    A layer ends where the next one begins to attend, and the last one behind its feed-forward part and the norm that
    follows.

    Parameters
    ----------
    bundle : Bundle
        Of an encoder, or of a decoder without caches, with a probing batch.

    Raises
    ------
    BundleError
        No residual stream is found.
    NotPrepackableError
        The package protobuf is not installed.
    """
    probe = probe_batch(bundle)
    if _TOKENS not in probe:
        raise _none(f"the graph has no input {_TOKENS!r}")
    try:
        stream = _Nodes(read_graph(bundle.model_path).graph)
    except _NotFoundError as error:
        raise _none(str(error)) from None
    names = [_output(node) for node in stream.shared]
    (values,) = _run(bundle, names, probe)
    found = [array.shape if array.dtype.kind == "f" else () for array in values]
    first = stream.attending[0][0]
    by_token = [len(shape) == 3 and shape[:2] == probe[_TOKENS].shape for shape in found]
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
        taps.append(Tap(layer, names[at], size, not stream.is_sum(names[at])))
    return taps


def _run(bundle: Bundle, names: Sequence[str], *feeds: Probe) -> list[list[NDArray[Any]]]:
    """Run a graph up to some values, and return them for each of some batches."""
    kept = list(dict.fromkeys(names))

    def edit(model: Any) -> None:
        keep_values(model.graph, kept, typed=False)

    session = open_unoptimised(bundle, {}, model_over_base(bundle, edit=edit))
    taken = {value.name for value in session.get_inputs()}
    values = []
    for feed in feeds:
        try:
            found = dict(zip(kept, session.run(kept, {key: feed[key] for key in feed if key in taken}), strict=True))
        except Exception as error:  # onnxruntime's own exceptions share no public base
            raise BundleError(f"the graph cannot be run on its probing batch: {joined_lines(error)}") from error
        values.append([found[name] for name in names])
    return values


def _is_causal(bundle: Bundle, tap: Tap) -> bool:
    """Return whether no token depends on those after it: whether another last one changes the states before it."""
    feed = dict(probe_batch(bundle))
    if _MASK in feed:  # a token behind the mask changes nothing
        feed[_MASK] = np.ones_like(feed[_MASK])
    ids = feed[_TOKENS].copy()
    ids[:, -1] = np.where(ids[:, -1] == ids[:, 0], ids[:, -1] + (1 if ids.max() == 0 else -1), ids[:, 0])
    (before,), (after,) = _run(bundle, [tap.name], feed, feed | {_TOKENS: ids})
    if not np.isfinite(before).all():
        raise BundleError(f"the output of layer {tap.layer} is not finite on a probing batch")
    far = np.abs(before[:, :-1] - after[:, :-1]).max()
    return bool(far <= 1e-4 * np.abs(before).max())


class _NotFoundError(Exception):
    """Why there is no residual stream."""


class _Nodes:
    """The nodes that all paths from the tokens' embedding to the output have in common.

    Attributes
    ----------
    shared : list of message Node
    attending : list of (int, int)
        The numbers in `shared` between which a layer attends.
    end : int
        The last node of the last layer.
    """

    def __init__(self, graph: Any) -> None:
        self._nodes = list(graph.node)
        self._made = {name: number for number, node in enumerate(self._nodes) for name in node.output if name}
        sources = set(_lookups(graph))
        if not sources:
            raise _NotFoundError(f"nothing looks up {_TOKENS!r} in an embedding")
        reads = [self._reads(node) for node in self._nodes]
        self._flow = {*sources}
        for number, read in enumerate(reads):
            if not read.isdisjoint(self._flow):
                self._flow.add(number)
        needed = self._longest(graph, reads)
        numbers = sorted(needed)
        reach = {number: number for number in numbers}  # the last node that reads this one
        for number in numbers:
            for read_number in reads[number] & needed:
                reach[read_number] = max(reach[read_number], number)
        furthest = max(sources & needed, default=0)
        shared = []
        for place, number in enumerate(numbers):
            if furthest <= number:
                shared.append(place)
            furthest = max(furthest, reach[number])
        nodes = [self._nodes[number] for number in numbers]
        self.shared = [nodes[place] for place in shared]
        inside = [nodes[start + 1 : end] for start, end in pairwise(shared)]
        self.attending = [(at, at + 1) for at, part in enumerate(inside) if _has(part, _ATTENTION)]
        if not self.attending:
            raise _NotFoundError("no attention is bypassed by what its layer adds to")
        begin = self.attending[-1][1]
        sums = [at + 1 for at in range(begin, len(inside)) if _has(inside[at], _MATRICES)]
        end = sums[-1] if sums else begin
        while end + 1 < len(self.shared) and not _has([self.shared[end + 1]], _MATRICES):
            end += 1
        self.end = end

    def is_sum(self, name: str) -> bool:
        """Return whether a value is a sum of what the tokens say: of the residual stream and a sublayer."""
        number = self._made.get(name)
        while number is not None and self._nodes[number].op_type in _SAME_TOKENS:
            name = self._nodes[number].input[0]
            number = self._made.get(name)
        if number is None:
            return False
        node = self._nodes[number]
        if node.op_type in _SKIP_SUM:
            return list(node.output).index(name) == _SKIP_SUM[node.op_type]
        computed = [one for one in node.input if self._made.get(one) in self._flow]
        return node.op_type in ("Add", "Sum") and len(computed) > 1

    def _reads(self, node: Any) -> set[int]:
        """Return the nodes whose outputs a node reads, in a subgraph too; but for sizes."""
        names = () if node.op_type in _SIZES else read_by(node)
        return {self._made[name] for name in names if name in self._made}

    def _longest(self, graph: Any, reads: Sequence[set[int]]) -> set[int]:
        """Return the nodes that compute an output from the tokens: of the output with the most."""
        paths = []
        for output in graph.output:
            needed: set[int] = set()
            ahead = [self._made.get(output.name)]
            while ahead:
                number = ahead.pop()
                if number is not None and number in self._flow and number not in needed:
                    needed.add(number)
                    ahead += reads[number]
            paths.append(needed)
        return max(paths, key=len, default=set())


def _lookups(graph: Any) -> Iterator[int]:
    """Yield the numbers of the nodes that look the tokens up in a table."""
    same = {_TOKENS}
    for number, node in enumerate(graph.node):
        if same.isdisjoint(node.input):
            continue
        if node.op_type in _LOOKUPS:
            yield number
        elif node.op_type in _SAME_TOKENS:
            same.update(node.output)


def _inside(node: Any) -> Iterator[Any]:
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            yield from all_nodes(graph)


def _has(nodes: Sequence[Any], kinds: set[str]) -> bool:
    return any(inner.op_type in kinds for node in nodes for inner in (node, *_inside(node)))


def _output(node: Any) -> str:
    """Return the output of a node that is the stream: the sum, where it is given."""
    at = _SKIP_SUM.get(node.op_type, 0)
    name: str = node.output[at] if at < len(node.output) and node.output[at] else node.output[0]
    return name


def _none(reason: str) -> BundleError:
    return BundleError(
        f"no residual stream was found, which a side head reads: {reason}; it is found in transformers that read "
        f"{_TOKENS!r} [batch, sequence] and keep all tokens up to their last layer"
    )
