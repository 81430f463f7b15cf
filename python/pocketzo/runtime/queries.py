"""The graph of several directions at once: each trained tensor becomes an input [Q, ...], for any Q.

The rows of a batch are in Q groups of one size: row i of B belongs to group g = i // (B / Q), and reads the values
[g, ...] of the trained tensors. Without values a run has one group, of the weights that the model has.

Nodes that read a trained tensor are applied by groups: x [B, ...] becomes [Q, -1, columns] before, and has the axes of
before behind. All other nodes stay as they are. There are plain ONNX operators only, and the bundle's file is edited at
load, so that bundles need not be prepared for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from pocketzo.errors import BundleError
from pocketzo.formats.bundle import Bundle
from pocketzo.formats.inputs import row_axis
from pocketzo.formats.past import is_flag
from pocketzo.runtime.onnx_proto import INT, INT64, all_nodes, declare, inner_inputs, onnx_messages, opset_of
from pocketzo.runtime.weights import Weights

INSTEAD: Final = (
    "prepare the model with --train lora, ia3, adapter:R, prefix:N or parallel-adapter:R, or train one direction "
    "after the other, without --share"
)
_PREFIX: Final = "pocketzo.queries."
_OPSET: Final = 13  # of the operators that are added
_ELEMENTWISE: Final = ("Relu", "Cast", "Identity")  # may be applied to groups as they are


class Grouped(NamedTuple):
    """A value by groups, [Q, -1, columns].

    Attributes
    ----------
    name : str
    like : str
        A value that has the axes of the value without groups, but for the last.
    columns : int or None
        The size of the last axis; None if that is `like`'s, too.
    """

    name: str
    like: str
    columns: int | None


def group_rows(model: Any, bundle: Bundle) -> None:
    """Make the trained tensors of a graph inputs [Q, ...].

    Parameters
    ----------
    model : message Model
        Of :func:`read_graph`, changed in place.
    bundle : Bundle

    Raises
    ------
    BundleError
        A trained tensor is read by a node that cannot be applied by groups, or rows of a batch depend on each other.
    """
    version = opset_of(model)
    if version < _OPSET:
        raise _refused(bundle, f"the graph is of operator set {version}, expected {_OPSET} or later")
    for node in all_nodes(model.graph):
        if node.op_type.startswith("DynamicQuantize"):
            raise _refused(bundle, f"{node.op_type} rounds each row of a batch by all of them")
    _Grouping(model.graph, bundle).edit()


def _refused(bundle: Bundle, reason: str) -> BundleError:
    return BundleError(f"{bundle.path}: several directions cannot be run in one forward pass: {reason}; {INSTEAD}")


class _Grouping:
    """Rewrites the nodes of a graph in order."""

    def __init__(self, graph: Any, bundle: Bundle) -> None:
        self._graph = graph
        self._bundle = bundle
        self._tensors = {spec.name: spec.shape for spec in bundle.tensors if spec.trainable}
        self._scalars = {tensor.name for tensor in graph.initializer if not tensor.dims}
        self._nodes: list[Any] = []
        self._grouped: dict[str, Grouped] = {}
        self._done: dict[tuple[str, ...], str] = {}

    def edit(self) -> None:
        """Rewrite the graph."""
        graph = self._graph
        inner = {name for node in graph.node for name in inner_inputs(node)}
        if hidden := sorted(inner & self._tensors.keys()):
            raise _refused(self._bundle, f"{hidden[0]!r} is read in a branch")
        nodes = list(graph.node)
        self._declare()
        for node in nodes:
            self._rewrite(node, inner)
        for value in graph.output:
            self._ungroup(value.name)
        del graph.node[:]
        graph.node.extend(self._nodes)

    def _declare(self) -> None:
        for tensor in self._graph.initializer:
            if tensor.name not in self._tensors:
                continue
            declare(self._graph.input, tensor.name, tensor.data_type, ["queries", *tensor.dims])
            tensor.dims.insert(0, 1)

    def _rewrite(self, node: Any, inner: set[str]) -> None:
        places = [place for place, name in enumerate(node.input) if name in self._tensors]
        if node.op_type == "Constant" and any(one.name == "value" and not one.t.dims for one in node.attribute):
            self._scalars.add(node.output[0])
        if not places:
            if self._keeps_groups(node):
                self._by_groups(node, next(name for name in node.input if name in self._grouped))
                return
            for name in (*node.input, *inner_inputs(node)):
                self._ungroup(name)
            self._nodes.append(node)
            return
        name, rank = node.input[places[0]], len(self._tensors[node.input[places[0]]])
        if len(places) == 1:
            if node.op_type == "MatMul" and places == [1] and rank == 2:
                self._multiply(node)
                return
            if node.op_type in ("Add", "Mul") and rank == 1:
                self._combine(node, places[0])
                return
            if node.op_type == "Expand" and places == [0]:
                self._expand(node)
                return
            if node.op_type == "Cast":
                self._tensors[node.output[0]] = self._tensors[name]
                self._nodes.append(node)
                return
        raise _refused(self._bundle, f"{name!r} {list(self._tensors[name])} is read by {node.op_type}")

    def _keeps_groups(self, node: Any) -> bool:
        grouped = [name for name in node.input if name in self._grouped]
        if len(grouped) != 1 or node.domain not in ("", "ai.onnx"):
            return False
        others = {*node.input} - {*grouped}
        return node.op_type in _ELEMENTWISE or (node.op_type in ("Add", "Mul", "Div") and others <= self._scalars)

    def _by_groups(self, node: Any, name: str) -> None:
        """Apply a node to a value by groups; its output has groups."""
        grouped = self._grouped[name]
        inputs = [grouped.name if one == name else one for one in node.input]
        del node.input[:]
        node.input.extend(inputs)
        self._add_grouped(node, grouped.like, grouped.columns)

    def _add_grouped(self, node: Any, like: str, columns: int | None) -> None:
        output = node.output[0]
        self._grouped[output] = Grouped(f"{output}/queries", like, columns)
        node.output[0] = self._grouped[output].name
        self._nodes.append(node)

    def _multiply(self, node: Any) -> None:
        rows, columns = self._tensors[node.input[1]]
        x = self._group(node.input[0], rows)
        node.input[0] = x.name
        self._add_grouped(node, x.like, columns)

    def _combine(self, node: Any, place: int) -> None:
        (size,) = self._tensors[node.input[place]]
        x = self._group(node.input[1 - place], size)
        node.input[1 - place] = x.name
        node.input[place] = self._op("Unsqueeze", node.input[place], self._constant(1))
        self._add_grouped(node, x.like, x.columns)

    def _expand(self, node: Any) -> None:
        """Repeat each tensor for the rows of its group."""
        tensor, shape = node.input
        self._ungroup(shape)
        rows = self._op("Div", self._op("Slice", shape, self._constant(0), self._constant(1)), self._count())
        rest = self._op("Slice", shape, self._constant(1), self._constant(1 << 31))
        wide = self._op("Concat", self._count(), rows, rest, axis=0)
        repeated = self._op("Expand", self._op("Unsqueeze", tensor, self._constant(1)), wide)
        self._op("Reshape", repeated, shape, output=node.output[0])

    def _group(self, name: str, columns: int) -> Grouped:
        """Return a value by groups."""
        if name in self._grouped:
            return self._grouped[name]
        shape = self._op("Concat", self._count(), self._constant(-1, columns), axis=0)
        return Grouped(self._op("Reshape", name, shape), name, None)

    def _ungroup(self, name: str) -> None:
        """Compute a value without groups, if there is only one with."""
        grouped = self._grouped.get(name)
        if grouped is None or ("", name) in self._done:
            return
        self._done["", name] = name
        shape = self._op("Shape", grouped.like)
        if grouped.columns is not None:
            axes = self._op("Slice", shape, self._constant(0), self._constant(-1))
            shape = self._op("Concat", axes, self._constant(grouped.columns), axis=0)
        self._op("Reshape", grouped.name, shape, output=name)

    def _count(self) -> str:
        """Return Q, a vector of one element."""
        shape = self._op("Shape", next(iter(self._tensors)))
        return self._op("Slice", shape, self._constant(0), self._constant(1))

    def _constant(self, *values: int) -> str:
        name = f"{_PREFIX}{','.join(map(str, values))}"
        if (name,) not in self._done:
            self._done[name,] = name
            self._graph.initializer.add(name=name, dims=[len(values)], data_type=INT64, int64_data=values)
        return name

    def _op(self, kind: str, *inputs: str, output: str | None = None, axis: int | None = None) -> str:
        """Add a node, or return the output of the same one that was added before."""
        key = (kind, *inputs)
        if output is None and key in self._done:
            return self._done[key]
        name = f"{_PREFIX}{kind}_{len(self._nodes)}" if output is None else output
        node = onnx_messages().Node(op_type=kind, input=inputs, output=[name], name=f"{_PREFIX}{name}")
        if axis is not None:
            node.attribute.add(name="axis", i=axis, type=INT)
        self._nodes.append(node)
        self._done[key] = name
        return name


# ---- the loss of each group ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reduced:
    """The mean, or the sum, of all elements of a value, whose rows are those of the batch or of its positions."""

    value: str
    is_mean: bool


@dataclass(frozen=True)
class GroupLoss:
    """A loss that is computed from means and sums over rows, so that some rows have one, too.

    Attributes
    ----------
    terms : tuple of Reduced
        The loss is the first, or the quotient of two.
    sign : int
    """

    terms: tuple[Reduced, ...]
    sign: int = 1

    @property
    def values(self) -> list[str]:
        """The values that are needed of each row."""
        return [term.value for term in self.terms]

    def __call__(self, rows: Mapping[str, NDArray[Any]]) -> float:
        """Return the loss of some rows; NaN if there are none."""
        found = []
        for term in self.terms:
            array = rows[term.value]
            if term.is_mean and not array.size:
                return float("nan")
            found.append(float(array.mean(dtype=np.float64) if term.is_mean else array.sum(dtype=np.float64)))
        if len(found) == 1:
            return self.sign * found[0]
        return self.sign * found[0] / found[1] if found[1] else float("nan")


def group_loss(graph: Any, bundle: Bundle) -> GroupLoss | None:
    """Return how the loss of some rows is computed, and make what it needs outputs of the graph.

    Parameters
    ----------
    graph : message Graph
        Changed in place.
    bundle : Bundle

    Raises
    ------
    BundleError
        The loss is computed in another way than by means or sums over all rows.
    """
    if bundle.loss is None:
        return None
    makers = {output: node for node in graph.node for output in node.output}
    sign, node = 1, makers.get(bundle.loss)
    while node is not None and node.op_type == "Neg":
        sign, node = -sign, makers.get(node.input[0])
    ends = [node] if node is None or node.op_type != "Div" else [makers.get(name) for name in node.input]
    terms = []
    for end in ends:
        if end is None or end.op_type not in ("ReduceMean", "ReduceSum") or not _is_over_all(end):
            what = "the graph's inputs" if end is None else end.op_type
            raise BundleError(
                f"{bundle.path}: several directions cannot be run in one forward pass: the loss {bundle.loss!r} is "
                f"computed by {what}, expected a mean over the rows of a batch: prepare an export without its loss, "
                "or train without --share"
            )
        terms.append(Reduced(end.input[0], end.op_type == "ReduceMean"))
    declared = {value.name for value in graph.output}
    for term in terms:
        if term.value not in declared:
            declared.add(term.value)
            graph.output.add(name=term.value)
    return GroupLoss(tuple(terms), sign)


def _is_over_all(node: Any) -> bool:
    """Return whether a node reduces all axes, to a scalar."""
    numbers = {attribute.name: attribute.i for attribute in node.attribute}
    keeps, given = numbers.get("keepdims", 1), "axes" in numbers or len(node.input) > 1
    return not keeps and not given and not numbers.get("noop_with_empty_axes", 0)


# ---- the values at several points ------------------------------------------------------------------------------------


def check_values(bundle: Bundle, weights: Mapping[str, NDArray[Any]]) -> int:
    """Return Q of the values of all trained tensors.

    Raises
    ------
    ValueError
        One is missing, unknown, or not of the shape [Q, ...].
    """
    shapes = {spec.name: spec.shape for spec in bundle.tensors if spec.trainable}
    if unknown := sorted(weights.keys() ^ shapes.keys()):
        raise ValueError(f"weights: expected a value of each trained tensor, {unknown[0]!r} is missing or not trained")
    counts = {len(array) for array in weights.values() if array.ndim}
    for name, array in weights.items():
        if len(counts) != 1 or array.shape[1:] != shapes[name] or array.ndim != len(shapes[name]) + 1:
            raise ValueError(f"weights[{name!r}] is {list(array.shape)}, expected [Q, *{list(shapes[name])}]")
    return counts.pop()


def one_of_each(weights: Weights) -> dict[str, ort.OrtValue]:
    """Return weights [1, ...] for a session, which uses their memory."""
    return {name: ort.OrtValue.ortvalue_from_numpy(view[np.newaxis]) for name, view in weights.image.views.items()}


def repeated(bundle: Bundle, batch: Mapping[str, NDArray[Any]], times: int) -> dict[str, NDArray[Any]]:
    """Return a batch whose rows are repeated, all of them so often."""
    found: dict[str, NDArray[Any]] = {}
    size = batch["input_ids"].size if "positions" in batch else 0
    for spec in bundle.inputs:
        array = batch[spec.name]
        if spec.name == "positions":
            found[spec.name] = np.concatenate([array + number * size for number in range(times)])
        elif not spec.shape or is_flag(spec):
            found[spec.name] = array
        else:
            found[spec.name] = np.concatenate([array] * times, row_axis(spec))
    return found
