"""The cut of a graph behind all that is computed without a trained tensor.

What comes before the cut, the *front*, gives the same values for an example however often it is run. The *back* takes
these values, the graph's inputs and the trained tensors. What is cheap to compute, such as masks and tables of
positions, is computed by both parts, so that little is kept of each example: see :func:`plan_cut`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

import numpy as np

from pocketzo.errors import BundleError, NotCuttableError, NotPrepackableError
from pocketzo.formats.bundle import Bundle
from pocketzo.formats.safetensors import DTYPES, read_chunks
from pocketzo.runtime.frozen import model_over_base
from pocketzo.runtime.measure import ALL_TOKENS, ROWS, TOKENS, Sizes, measure, multiply_adds
from pocketzo.runtime.min_cut import INFINITE, Network
from pocketzo.runtime.onnx_proto import all_nodes, declare, read_by, read_graph
from pocketzo.runtime.subgraph import keep_values, remove_unused_inputs

_TENSOR_TYPES: Final = {"float32": 1, "float16": 10}  # TensorProto.DataType
_PRODUCTS: Final = (
    *("MatMul", "Gemm", "FusedMatMul", "MatMulInteger", "DynamicQuantizeMatMul", "MatMulIntegerToFloat"),
    *("QLinearMatMul", "Attention", "QAttention"),
)
_LENGTH: Final = 32  # tokens of the example for which the cut is chosen


class Kept(NamedTuple):
    """A value at the cut.

    Attributes
    ----------
    name : str
    sizes : Sizes
        With the axis of rows, or of all tokens, in front.
    """

    name: str
    sizes: Sizes

    @property
    def by_token(self) -> bool:
        """Whether the number of elements of an example depends on its length."""
        return not {TOKENS, ALL_TOKENS}.isdisjoint(self.sizes.axes)

    def shape_of(self, tokens: int) -> tuple[int, ...]:
        """Return the shape of the value of one example of so many tokens."""
        axes = self.sizes.axes if self.sizes.axes[0] == ALL_TOKENS else self.sizes.axes[1:]
        return tuple(axis if isinstance(axis, int) else tokens for axis in axes)

    @property
    def axes(self) -> tuple[int | str, ...]:
        """The shape of the value of a batch, as inputs and outputs of a graph have it."""
        return tuple(axis if isinstance(axis, int) else axis.replace(" * ", "_") for axis in self.sizes.axes)

    def declare(self, values: Any) -> None:
        """Add it to the inputs or outputs of a graph of :func:`read_graph`."""
        declare(values, self.name, _TENSOR_TYPES[self.sizes.dtype.name], self.axes)


@dataclass(frozen=True)
class Cut:
    """A graph in two parts.

    Attributes
    ----------
    bundle : Bundle
        As it was read, but only what is trained is trainable.
    values : tuple of Kept
        What the front gives to the back.
    others : tuple of str
        Outputs of the graph that the front computes and the back does not need.
    outputs : tuple of str
        Outputs of the back.
    unread : frozenset of str
        Inputs of the graph that the back does not have.
    """

    bundle: Bundle
    values: tuple[Kept, ...]
    others: tuple[str, ...]
    outputs: tuple[str, ...]
    unread: frozenset[str]
    _nodes: tuple[tuple[Any, bool], ...]  # of the whole graph, and whether the back runs them
    _sizes: Mapping[str, Sizes]
    _weights: Mapping[str, tuple[int, ...]]

    def work(self, rows: float, tokens: float, positions: float = 1) -> tuple[float, float]:
        """Return the multiply-adds of a whole forward pass, and of the back, for a batch."""
        whole = back = 0.0
        for node, is_back in self._nodes:
            count = multiply_adds(node, self._sizes, self._weights, rows, tokens, positions)
            whole += count
            back += count if is_back else 0
        return whole, back

    def saved(self, rows: float, tokens: float, positions: float = 1) -> float:
        """Return the share of a forward pass that the front is, in multiply-adds."""
        whole, back = self.work(rows, tokens, positions)
        return 1 - back / whole if whole else 0.0

    def nbytes(self, tokens: int, itemsize: float | None = None) -> int:
        """Return the bytes of the values of an example, with elements of ``itemsize`` bytes or as they are."""
        sizes = (kept.sizes for kept in self.values)
        return int(sum(own.count(1, tokens, 1) * (itemsize or own.dtype.itemsize) for own in sizes))

    def front(self, model: Any) -> None:
        """Reduce a graph of :func:`read_graph` to the front, in place."""
        keep_values(model.graph, [*(kept.name for kept in self.values), *self.others])
        types = {kept.name: _TENSOR_TYPES[kept.sizes.dtype.name] for kept in self.values}
        for value in model.graph.output:
            if value.name in types:
                value.type.tensor_type.elem_type = types[value.name]

    def back(self, model: Any) -> None:
        """Reduce a graph of :func:`read_graph` to the back, in place."""
        graph = model.graph
        names = {kept.name for kept in self.values}
        nodes = [node for node in graph.node if names.isdisjoint(node.output)]
        del graph.node[:]
        graph.node.extend(nodes)
        outputs = [value for value in graph.output if value.name in self.outputs]
        del graph.output[:]
        graph.output.extend(outputs)
        remove_unused_inputs(graph)
        for kept in self.values:
            kept.declare(graph.input)

    def front_model(self) -> bytes:
        """Return the file of the front's graph, over the weights in the bundle."""
        return model_over_base(self.bundle, edit=self.front)

    def back_model(self) -> Any:
        """Return the back's graph as a message."""
        model = read_graph(self.bundle.model_path)
        self.back(model)
        return model

    def digest(self) -> bytes:
        """Return the SHA-256 of all that the values of an example depend on besides its inputs: graph and weights."""
        model = read_graph(self.bundle.model_path)
        self.front(model)
        used = {tensor.name for tensor in model.graph.initializer} | {
            tensor.name for node in all_nodes(model.graph) for one in node.attribute for tensor in one.g.initializer
        }
        found = hashlib.sha256()
        places = self.bundle.places
        for name in sorted(used & places.keys()):
            path, entry = places[name]
            found.update(f"{name} {np.dtype(DTYPES[entry.dtype])} {entry.shape}\n".encode())
            with path.open("rb", buffering=0) as file:
                for chunk in read_chunks(file.fileno(), path, entry):
                    found.update(chunk)
        for tensor in model.graph.initializer:
            if tensor.name in places:
                del tensor.external_data[:]  # where the weights are in their file says nothing of the values
        found.update(repr([(kept.name, kept.sizes) for kept in self.values]).encode())
        graph = model.graph
        for part in (*model.opset_import, *graph.input, *graph.node, *graph.initializer):
            found.update(part.SerializeToString(deterministic=True))
        return found.digest()


def plan_cut(bundle: Bundle, trained: Collection[str] | None = None, *, least: float = 0.0) -> Cut:
    """Find where to cut a bundle's graph.

    Of each value that is computed without a trained tensor, the back gets it as an input, or computes it, or does not
    need it. What it gets is kept for each example, and what it computes is computed by every forward pass. Among all
    choices this finds the one with the least cost, where a byte that is kept costs as much as some multiply-adds: a
    minimum cut.

    Parameters
    ----------
    bundle : Bundle
        With a probing batch.
    trained : collection of str, optional
        The names of the tensors that are trained; by default all that are trainable.
    least : float
        The least share of the products of a forward pass, by the sizes of their matrices, that come before what is
        trained. This is found without running the model, which takes about as long as loading it.

    Raises
    ------
    NotCuttableError
        There is nothing to compute before the first trained tensor, or it cannot be kept; says why.
    """
    names = {
        tensor.name for tensor in bundle.tensors if tensor.trainable and (trained is None or tensor.name in trained)
    }
    narrow = replace(
        bundle,
        tensors=tuple(one if one.name in names else replace(one, sets=()) for one in bundle.tensors),
    )
    try:
        model = read_graph(bundle.model_path)
    except NotPrepackableError as error:
        raise NotCuttableError(str(error)) from None
    graph = model.graph
    weights = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    dependent = _dependents(graph.node, names)
    before = [node for node in graph.node if dependent.isdisjoint(node.output)]
    nothing = NotCuttableError(
        f"{bundle.path}: too little is computed before the first trained tensor to be worth keeping; train later "
        "layers only, as with prepare --train lora:layers=20-"
    )
    constants = _constants(graph.node, weights)
    products = sum(_elements(node, constants) for node in before)
    if not products or products < least * sum(_elements(node, constants) for node in graph.node):
        raise nothing
    try:
        sizes = measure(bundle, model)
    except (BundleError, NotPrepackableError) as error:
        raise NotCuttableError(str(error)) from None
    outputs = [value.name for value in graph.output]
    behind = [node for node in graph.node if not dependent.isdisjoint(node.output)]
    wanted = {name for node in _needed(behind, {*outputs} & dependent) for name in read_by(node)}
    kept = cheapest(before, wanted, sizes, weights)
    made = {name: node for node in before for name in node.output}
    repeated = ancestors(made, wanted - kept, kept)
    again = {name for node in repeated for name in node.output} | dependent
    read = {name for node in graph.node if not again.isdisjoint(node.output) for name in read_by(node)}
    cut = Cut(
        bundle=narrow,
        values=tuple(Kept(name, sizes[name]) for node in before for name in node.output if name in kept),
        others=tuple(name for name in outputs if name not in dependent),
        outputs=tuple(name for name in outputs if name in dependent),
        unread=frozenset(value.name for value in graph.input if value.name not in read),
        _nodes=tuple((node, not again.isdisjoint(node.output)) for node in graph.node),
        _sizes=sizes,
        _weights=weights,
    )
    if not kept:
        raise nothing
    for node in ancestors(made, kept, ()):
        if node.op_type.startswith("DynamicQuantize"):
            raise NotCuttableError(
                f"{bundle.path}: {node.op_type} ({node.name or node.output[0]}) rounds each row of a batch by all of "
                "them, so that what is computed before the first trained tensor cannot be kept by example; export the "
                "model in 4 bits (MatMulNBits) or float32"
            )
    return cut


def _dependents(nodes: Iterable[Any], names: Iterable[str]) -> set[str]:
    """Return tensors, and the values that depend on them."""
    found = {*names}
    for node in nodes:
        if not found.isdisjoint(read_by(node)):
            found.update(name for name in node.output if name)
    return found


def _needed(nodes: list[Any], outputs: set[str]) -> list[Any]:
    """Return the nodes that outputs need."""
    wanted, found = {*outputs}, []
    for node in reversed(nodes):
        if not wanted.isdisjoint(node.output):
            wanted |= read_by(node)
            found.append(node)
    return found


def ancestors(made: Mapping[str, Any], names: Iterable[str], given: Collection[str]) -> list[Any]:
    """Return the nodes that compute some values from others that are given."""
    left, seen, found = [*names], {*given}, []
    done: set[int] = set()
    while left:
        name = left.pop()
        if name in seen or name not in made:
            continue
        seen.add(name)
        node = made[name]
        if id(node) not in done:
            done.add(id(node))
            found.append(node)
            left += read_by(node)
    return found


def cheapest(
    nodes: list[Any],
    wanted: set[str],
    sizes: Mapping[str, Sizes],
    weights: Mapping[str, tuple[int, ...]],
    stored: Mapping[str, int] | None = None,
) -> set[str]:
    """Return the values of nodes to keep, so that those that are wanted can be computed from them and the inputs.

    A node that is repeated costs its multiply-adds, and the bytes of the tensors in ``stored`` that it reads.
    """
    network, price = Network(), _price(nodes, weights)
    for number, node in enumerate(nodes):
        count = multiply_adds(node, sizes, weights, 1, _LENGTH, 1)
        again = sum(stored.get(name, 0) for name in read_by(node)) if stored else 0
        network.connect(("run", number), "end", 1 + int(count / price) + again)
        for name in read_by(node):
            network.connect(("run", number), name, INFINITE)
        for name in node.output:
            if name:
                network.connect(name, ("run", number), cost_of(sizes.get(name)))
    makers = {name: number for number, node in enumerate(nodes) for name in node.output}
    for name in wanted & makers.keys():
        network.connect("begin", name, INFINITE)
    near = network.near_side("begin", "end")
    return {name for name, number in makers.items() if name in near and ("run", number) not in near}


def _price(nodes: list[Any], weights: Mapping[str, tuple[int, ...]]) -> int:
    """Return the multiply-adds that are rather repeated than a byte more kept.

    It is the usual number of rows of a matrix, which makes a hidden vector of float32 worth a third of a layer:
    products of unchanged projections are repeated, and their results not kept.
    """
    rows = sorted(size[0] for node in nodes if (size := _matrix(node, weights)))
    return max(1, rows[len(rows) // 2]) if rows else 1


def _matrix(node: Any, weights: Mapping[str, tuple[int, ...]]) -> tuple[int, int] | None:
    """Return the rows and columns of the weight that a node multiplies by; None if it does something else."""
    if node.op_type == "MatMulNBits":
        numbers = {one.name: one.i for one in node.attribute}
        return numbers["K"], numbers["N"]
    if node.op_type not in _PRODUCTS:
        return None
    shape = next((weights[name] for name in node.input[1:] if len(weights.get(name, ())) == 2), None)
    return None if shape is None else (shape[0], shape[1])


def _constants(nodes: Iterable[Any], weights: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of weights, and of what is computed from them alone, as by DequantizeLinear, about."""
    found = dict(weights)
    for node in nodes:
        given = [found[name] for name in node.input if name in found]
        if given and len(given) == sum(1 for name in node.input if name):
            found.update(dict.fromkeys(node.output, max(given, key=math.prod)))
    return found


def _elements(node: Any, weights: Mapping[str, tuple[int, ...]]) -> int:
    rows, columns = _matrix(node, weights) or (0, 0)
    return rows * columns


def cost_of(sizes: Sizes | None) -> float:
    """Return the bytes of a value of one example; infinite if it cannot be kept by example, or has no elements."""
    if sizes is None or sizes.dtype.name not in _TENSOR_TYPES or not sizes.axes:
        return INFINITE
    first, *others = sizes.axes
    if first not in (ROWS, ALL_TOKENS) or {ROWS, ALL_TOKENS, "positions", "?"} & {*others}:
        return INFINITE
    if first == ALL_TOKENS and TOKENS in others:
        return INFINITE
    return int(sizes.count(1, _LENGTH, 1)) * sizes.dtype.itemsize or INFINITE
