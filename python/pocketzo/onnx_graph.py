"""Rewrite an ONNX graph so that its nodes read their weights as they are stored.

A write to a weight is seen by the runtime only if the node that uses it reads the stored bytes. What exporters leave
between the two is undone here:

1. views of a weight (Identity, Transpose, Reshape, ...) are folded into what is stored;
2. a matrix that was stored twice, perhaps once transposed, becomes one again (a tied embedding and output projection);
3. weights that were merged only because all their elements had one value become separate again;
4. a transposed use of a weight that is also used plainly becomes ``Gemm(transB=1)``, which reads it as it is stored.

This module needs the package ``onnx`` and is imported by :mod:`pocketzo.prepare` only.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx.inliner  # noqa: TID253 - see the module's docstring
from google.protobuf.message import DecodeError
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper  # noqa: TID253

from pocketzo.errors import BundleError, DeadWeightError
from pocketzo.formats.bundle import ValueSpec
from pocketzo.formats.safetensors import DTYPES, Entry

Array = npt.NDArray[Any]

MIN_OPSET: Final = 13
IGNORED_LABEL: Final = -100
"""The label of a token that does not count in the loss, as everywhere in the field."""

_FLOATS: Final = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE}
MOST_FLOAT16: Final = 65504.0
_INLINE_BYTES = 1024  # constants that are no weights stay in the graph up to this size, as in onnx and onnxruntime

# Which inputs of which operators are weights, and what torch calls them.
_ROLES: Final[Mapping[str, Mapping[int, str]]] = {
    "MatMul": {0: "weight", 1: "weight"},
    "Gemm": {0: "weight", 1: "weight", 2: "bias"},
    "Einsum": {0: "weight", 1: "weight"},
    "Conv": {1: "weight", 2: "bias"},
    "ConvTranspose": {1: "weight", 2: "bias"},
    "Gather": {0: "weight"},
    "Add": {0: "bias", 1: "bias"},
    "Mul": {0: "weight", 1: "weight"},
    "PRelu": {1: "weight"},
    "LSTM": {1: "weight_ih", 2: "weight_hh", 3: "bias"},
    "GRU": {1: "weight_ih", 2: "weight_hh", 3: "bias"},
    "BatchNormalization": {1: "weight", 2: "bias"},
    "GroupNormalization": {1: "weight", 2: "bias"},
    "InstanceNormalization": {1: "weight", 2: "bias"},
    "LayerNormalization": {1: "weight", 2: "bias"},
    "RMSNormalization": {1: "weight"},
    "SimplifiedLayerNormalization": {1: "weight"},
}
_ELEMENTWISE = {
    "Abs",
    "Add",
    "Cast",
    "Div",
    "Exp",
    "Mul",
    "Neg",
    "Pow",
    "Reciprocal",
    "Sigmoid",
    "Softplus",
    "Sqrt",
    "Sub",
}

# Tables that torch modules keep beside their parameters: rotary position embeddings.
_BUFFER = re.compile(r"(^|[._])(inv_freq|(cos|sin)_cached?)$")
# Names that an exporter made up: "onnx::MatMul_370", "val_87", "/bert/Constant_3_output_0", "1234".
_GENERATED = re.compile(r"onnx::|/|\d+$|(val|const|constant|initializer|tensor|t)_?\d*$|.*_output_\d+$", re.IGNORECASE)


class Use(NamedTuple):
    """An input of a node that reads a tensor."""

    node: NodeProto
    position: int


@dataclass
class Weight:
    """A tensor to be stored outside of the graph.

    Attributes
    ----------
    name : str
    array : ndarray
        The elements; often a view of a mapped file.
    parameter : bool
        Whether an operator uses it as a weight, so that it can be trained.
    dead : str or None
        A node that the runtime computes once, when it loads the graph, so that later writes are not seen.
    uses, transposed : list of Use
        Who reads it as it is stored, and who reads it transposed.
    stored : str or None
        The type in which it is to be stored, if it is another one than the array's.
    """

    name: str
    array: Array
    parameter: bool = False
    dead: str | None = None
    uses: list[Use] = field(default_factory=list)
    transposed: list[Use] = field(default_factory=list)
    stored: str | None = None

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type in which it is to be stored."""
        return np.dtype(self.stored or self.array.dtype)


def read_model(path: Path) -> ModelProto:
    """Read a graph without its external data, and bring it to one form: no local functions, constants are no inputs.

    Raises
    ------
    BundleError
        If the file is not an ONNX model, or of an operator set before 13.
    """
    try:
        model = onnx.load(path, format="protobuf", load_external_data=False)
    except DecodeError:
        raise BundleError("not an ONNX file, or cut off") from None
    versions = [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    if not model.graph.node or not versions:
        raise BundleError("not an ONNX file, or an empty one: it has no nodes or names no operator set")
    if versions[0] < MIN_OPSET:
        raise BundleError(f"operator set {versions[0]}; export the model with opset {MIN_OPSET} or later")
    if model.graph.sparse_initializer:
        raise BundleError("sparse initializers are not supported; export the model with dense weights")
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    constants = {tensor.name for tensor in model.graph.initializer}
    _replace(model.graph.input, [value for value in model.graph.input if value.name not in constants])
    model.ir_version = max(model.ir_version, 4)  # before, each initializer had to be an input too
    return model


def extract_weights(model: ModelProto, folder: Path) -> list[Weight]:
    """Take the weights out of a graph, and rewrite it so that each node reads its weights as they are returned.

    Parameters
    ----------
    model : ModelProto
        As :func:`read_model` returns it; changed in place. :func:`point_to_weights` completes it.
    folder : Path
        Where the files of external data are.

    Returns
    -------
    list of Weight
        With unique, readable names.

    Raises
    ------
    BundleError
        If external data is missing or cut off, or a weight is not of type float32.
    DeadWeightError
        If a tied weight is used in ways that cannot read one stored tensor.
    """
    return _Extraction(model.graph, folder).run()


def point_to_weights(model: ModelProto, weights: Iterable[Weight], location: str, entries: Mapping[str, Entry]) -> None:
    """Declare the weights in the graph as external data.

    Parameters
    ----------
    model : ModelProto
        As :func:`extract_weights` left it; changed in place.
    weights : iterable of Weight
    location : str
        Name of the weights' file, relative to the graph's.
    entries : mapping of str to Entry
        Where each lies in that file.
    """
    for weight in weights:
        entry = entries[weight.name]
        tensor = model.graph.initializer.add(
            name=weight.name,
            dims=weight.array.shape,
            data_type=helper.np_dtype_to_tensor_dtype(weight.dtype),
            data_location=TensorProto.EXTERNAL,
        )
        for key, value in ("location", location), ("offset", entry.start), ("length", entry.stop - entry.start):
            tensor.external_data.add(key=key, value=str(value))


def to_float16(model: ModelProto, weights: Iterable[Weight]) -> ModelProto:
    """Have a graph compute in float16 what it computes in float32, between inputs and outputs of the old types.

    Parameters
    ----------
    model : ModelProto
        As :func:`extract_weights` left it.
    weights : iterable of Weight
        Those in float32 are marked to be stored in float16.

    Returns
    -------
    ModelProto

    Raises
    ------
    BundleError
        If a weight is too large for float16.
    """
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    ends = [value.name for value in (*model.graph.input, *model.graph.output)]
    for weight in weights:
        dtype = helper.np_dtype_to_tensor_dtype(weight.array.dtype)
        # As inputs, since the converter would read and keep initializers.
        model.graph.input.append(helper.make_tensor_value_info(weight.name, dtype, weight.array.shape))
        if weight.array.dtype == np.float32:
            weight.stored = "float16"
            largest = np.abs(weight.array).max(initial=0)
            if weight.parameter and largest > MOST_FLOAT16:
                raise BundleError(f"weight {weight.name!r} holds {largest:g}, and float16 ends at {MOST_FLOAT16}")
            if largest > MOST_FLOAT16:  # what masks is as good
                weight.array = np.clip(weight.array, -MOST_FLOAT16, MOST_FLOAT16)
    blocked = [*DEFAULT_OP_BLOCK_LIST, "LogSoftmax", "NegativeLogLikelihoodLoss", "SoftmaxCrossEntropyLoss"]
    model = convert_float_to_float16(model, keep_io_types=ends, op_block_list=blocked)
    _replace(model.graph.input, [value for value in model.graph.input if value.name in ends])
    _replace(model.graph.node, _sorted(model.graph))  # the converter leaves its casts at the end
    return model


def expose_activations(model: ModelProto) -> None:
    """Make outputs of all that the graph computes from its inputs."""
    computed = {value.name for value in model.graph.input}
    outputs = {value.name for value in model.graph.output}
    for node in model.graph.node:
        if computed.intersection(node.input):
            computed.update(filter(None, node.output))
            model.graph.output.extend(ValueInfoProto(name=name) for name in node.output if name and name not in outputs)


def _sorted(graph: GraphProto) -> list[NodeProto]:
    """Return the nodes in their order, but each behind those that make what it reads."""
    nodes = list(graph.node)
    makers = {output: number for number, node in enumerate(nodes) for output in node.output}
    order: dict[int, None] = {}
    for number in range(len(nodes)):
        stack = [number]
        while stack:
            node = nodes[stack[-1]]
            inner = (name for inside in _subgraphs([node]) for reader in _nodes(inside) for name in reader.input)
            before = {makers[name] for name in (*node.input, *inner) if name in makers} - order.keys()
            if before:
                stack += sorted(before)
            else:
                order[stack.pop()] = None
    return [nodes[number] for number in order]


def add_loss(model: ModelProto) -> tuple[str | None, str | None]:
    """Find the loss of a graph, or add it to one that ends in class scores.

    The loss is the mean cross-entropy of an int64 input ``labels``: of shape [batch] for logits [batch, classes], or
    [batch, sequence] for logits [batch, sequence, classes], where tokens labelled -100 do not count.

    Returns
    -------
    loss, logits : str or None
        Names of the outputs; None where the graph has none.

    Raises
    ------
    BundleError
        If the graph has logits but a loss cannot be added.
    """
    graph = model.graph
    outputs = {value.name: value for value in graph.output}
    floats = [value for value in graph.output if value.type.tensor_type.elem_type == TensorProto.FLOAT]
    logits = outputs.get("logits")
    if "loss" in outputs:
        if any(size != 1 for size in _shape(outputs["loss"]) or ()):
            raise BundleError("the graph's output 'loss' is not a scalar; export the mean loss, or the logits alone")
        return "loss", logits.name if logits is not None else None
    if logits is None and len(floats) == 1 and len(_shape(floats[0]) or ()) == 2:
        logits = floats[0]
    if logits is None:
        return None, None

    shape = _shape(logits)
    if shape is None or len(shape) not in (2, 3) or logits.type.tensor_type.elem_type != TensorProto.FLOAT:
        raise BundleError(
            f"no loss can be added to the graph's output {logits.name!r}: expected float32 of shape [batch, classes] "
            f"or [batch, sequence, classes], got {_dtype(logits)} of shape {shape}"
        )
    if any(value.name == "labels" for value in graph.input):
        raise BundleError("the graph has an input 'labels' but no output 'loss'; export it with both, or with neither")
    for name in "labels", "loss":
        if name in _value_names(graph):
            _rename_value(graph, name, f"{name}_in_graph")
    _append_cross_entropy(graph, logits.name, shape)
    return "loss", logits.name


def drop_provenance(model: ModelProto) -> None:
    """Remove the stack traces that exporters attach to each node: often more bytes than all else in a graph."""
    for node in _nodes(model.graph):
        node.ClearField("metadata_props")
        node.ClearField("doc_string")


def describe(value: ValueInfoProto) -> ValueSpec:
    """Return the name, element type and shape of an input or output.

    Raises
    ------
    BundleError
        If it is not a tensor, or of unknown rank.
    """
    shape = _shape(value)
    if shape is None:
        raise BundleError(f"the graph's input or output {value.name!r} is not a tensor of known rank")
    return ValueSpec(value.name, _dtype(value), tuple(shape))


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


class _Extraction:
    """One run of :func:`extract_weights`, step by step.

    Attributes
    ----------
    tensors : dict of str to ndarray
        All floating-point constants by the name of the value that the graph knows them by.
    root : dict of str to str
        The tensor that each is a view of.
    label : dict of str to (str or None)
        The name of the parameter that each is, where the exporter kept it.
    """

    def __init__(self, graph: GraphProto, folder: Path) -> None:
        self.graph = graph
        self.files = _ExternalFiles(folder)
        self.tensors: dict[str, Array] = {}
        self.large: list[Weight] = []
        self._collect(graph)
        self.root = {name: name for name in self.tensors}
        self.label = {name: None if _GENERATED.match(name) else name for name in self.tensors}
        # Nodes are told apart by id(): protobuf hands out one wrapper for a message as long as somebody holds it.
        self.nodes: list[NodeProto] = []
        self.constant_nodes: set[int] = set()

    def run(self) -> list[Weight]:
        self._unify_equal_matrices()
        self._fold_views()
        self.uses: dict[str, list[Use]] = {name: [] for name in self.tensors}
        self.readers: defaultdict[str, list[NodeProto]] = defaultdict(list)
        self.nodes = list(_nodes(self.graph))
        for node in self.nodes:
            for index, name in enumerate(node.input):
                self.readers[name].append(node)
                if name in self.tensors:
                    self.uses[name].append(Use(node, index))

        families: defaultdict[str, list[str]] = defaultdict(list)
        for name, uses in self.uses.items():
            if uses:
                families[self.root[name]].append(name)
        dead = self._find_dead()
        weights: list[Weight] = []
        for root, names in families.items():
            members = self._settle(names)
            for weight in members:
                weight.dead = dead.get(root)
                weight.parameter = weight.parameter or weight.dead is not None
                if weight.parameter and weight.array.dtype != np.float32:
                    raise BundleError(
                        f"weight {weight.name!r} of node {_title((weight.uses + weight.transposed)[0].node)} is "
                        f"{weight.array.dtype.name}; this version needs float32, so export the model in float32"
                    )
            weights += members
        weights = self._keep_small_constants(weights)
        self._name(weights)
        self._connect(weights)
        produced = {output for node in self.graph.node for output in node.output}
        _replace(self.graph.value_info, [value for value in self.graph.value_info if value.name in produced])
        return weights + self.large

    def _collect(self, graph: GraphProto) -> None:
        """Take all floating-point tensors out of a graph and its subgraphs; make the others part of it."""
        outputs = {value.name for value in graph.output}
        kept = []
        for tensor in graph.initializer:
            array = self.files.open(tensor)
            if tensor.name in outputs or tensor.name in self.tensors:
                kept.append(numpy_helper.from_array(array, tensor.name))
            elif tensor.data_type in _FLOATS:
                self.tensors[tensor.name] = array
            elif array.nbytes > _INLINE_BYTES and array.dtype.name in DTYPES.values() and graph is self.graph:
                self.large.append(Weight(tensor.name, array))
            elif tensor.data_location == TensorProto.EXTERNAL:
                kept.append(numpy_helper.from_array(array, tensor.name))
            else:
                kept.append(tensor)
        _replace(graph.initializer, kept)

        nodes = []
        for node in graph.node:
            value = next((item.t for item in node.attribute if item.name == "value"), None)
            name = node.output[0] if node.output else ""
            if (
                node.op_type == "Constant"
                and value is not None
                and value.data_type in _FLOATS
                and prod(value.dims) > 1
                and name not in outputs | self.tensors.keys()
            ):
                self.tensors[name] = self.files.open(value)
            else:
                nodes.append(node)
        if len(nodes) < len(graph.node):
            _replace(graph.node, nodes)
        for subgraph in _subgraphs(graph.node):
            self._collect(subgraph)

    def _unify_equal_matrices(self) -> None:
        """Let equal matrices share their memory, also where one is the other transposed.

        Folding the transpose of a tied weight, exporters store it twice. A diagonal is the same for both, so that few
        matrices need be compared whole. Equality of matrices whose elements all have one value is coincidence.
        """
        families: defaultdict[tuple[object, ...], list[str]] = defaultdict(list)
        for name, array in self.tensors.items():
            if array.ndim == 2 and min(array.shape) > 1:
                families[array.dtype, frozenset(array.shape), array.diagonal().tobytes()].append(name)
        for names in families.values():
            originals: list[str] = []
            for name in names if len(names) > 1 else []:
                array = self.tensors[name]
                views = ((original, view) for original in originals for view in _both_ways(self.tensors[original]))
                original, view = next((pair for pair in views if np.array_equal(pair[1], array)), (None, array))
                if original is not None:
                    self.root[name] = original
                    self.tensors[name] = view
                elif not _is_constant(array):
                    originals.append(name)

    def _fold_views(self) -> None:
        """Replace each node that only views a tensor by that view; the graph's order lets chains fold in one pass."""
        outputs = {value.name for value in self.graph.output}
        integers = _integers(self.graph)
        nodes = []
        for node in self.graph.node:
            source = node.input[0] if node.input else ""
            view = None
            if source in self.tensors and node.output[0] not in outputs:
                view = _view(node, self.tensors[source], integers)
            if view is None:
                nodes.append(node)
                continue
            name = node.output[0]
            self.tensors[name] = view
            self.root[name] = self.root[source]
            named = node.op_type == "Identity" and not _GENERATED.match(name)
            self.label[name] = name if named else self.label[source]
        _replace(self.graph.node, nodes)

    def _find_dead(self) -> dict[str, str]:
        """Find weights that reach their operator only through nodes that compute from constants alone.

        The runtime computes such nodes once. What they use is a weight if it comes out at a weight's place, or if it
        has a parameter's name; else it is a constant: tables of sines are made so.

        Returns
        -------
        dict of str to str
            The node that stands between, by the root of the weight.
        """
        dead: dict[str, str] = {}
        constants = {tensor.name for tensor in self.graph.initializer} | {weight.name for weight in self.large}
        derived: dict[str, _Derived] = {}
        for node in self.graph.node:
            names = [name for name in node.input if name]
            known = all(name in constants or name in self.tensors or name in derived for name in names)
            if known and not any(_subgraphs([node])):
                result = _Derived(set(), _title(node), node.op_type in _ELEMENTWISE)
                for index, name in enumerate(node.input):
                    if name in derived:
                        result = result.using(derived[name].roots, derived[name].by_channel)
                    elif name in self.tensors and self.tensors[name].size > 1 and not self._is_buffer(name):
                        result = result.using({self.root[name]}, _is_vector(self.tensors[name]))
                        if node.op_type not in _ELEMENTWISE and self.label[name] and self._role(name, Use(node, index)):
                            dead.setdefault(self.root[name], result.node)
                constants.update(node.output)
                self.constant_nodes.add(id(node))
                if result.roots:
                    derived.update(dict.fromkeys(node.output, result))
                continue
            for index, name in enumerate(node.input):
                if name in derived and index in _ROLES.get(node.op_type, {}) and (node.op_type, index) != ("MatMul", 0):
                    roots, between, by_channel = derived[name]
                    if by_channel or node.op_type not in _ELEMENTWISE:
                        dead.update((root, between) for root in roots if root not in dead)
        return dead

    def _is_buffer(self, name: str) -> bool:
        return _BUFFER.search(self.label[name] or "") is not None

    def _role(self, name: str, use: Use) -> str | None:
        """Return what a use makes of a tensor, such as "weight" or "bias"; None if it is a mere constant there."""
        node, index = use
        array = self.tensors[name]
        role = _ROLES.get(node.op_type, {}).get(index)
        if (
            role is None
            or array.ndim == 0
            or array.size == 0
            or self._is_buffer(name)
            or id(node) in self.constant_nodes
        ):
            return None
        match node.op_type:
            case "MatMul" if index == 0 and array.ndim != 2:  # rotary frequencies are multiplied from the left
                return None
            case "Gather" if array.ndim < 2:
                return None
            case "Mul" if array.size == 1 or not _is_vector(array):  # else a table of sines, a mask
                return None
            case "Add" if array.size == 1 or (not _is_vector(array) and array.min() <= -1e4):  # an attention mask
                return None
        return role

    def _settle(self, names: list[str]) -> list[Weight]:
        """Decide which tensors to store for the views of one root: one if it is tied, else one for each parameter."""
        roles = [(name, use, self._role(name, use)) for name in names for use in self.uses[name]]
        if not any(role for _, _, role in roles):
            return [Weight(name, self.tensors[name], uses=self.uses[name]) for name in names]
        if len(roles) > 1 and _is_constant(self.tensors[names[0]]):
            return self._split(roles)

        for stored in names:
            array = self.tensors[stored]
            others = [name for name in names if not _same_view(self.tensors[name], array)]
            if not others or (
                array.ndim == 2
                and all(
                    _same_view(self.tensors[name], array.T)
                    and all(self._reads_transposed(use) for use in self.uses[name])
                    for name in others
                )
            ):
                return [
                    Weight(
                        next((label for name in names if (label := self.label[name])), self.root[stored]),
                        array,
                        parameter=True,
                        uses=[use for name in names if name not in others for use in self.uses[name]],
                        transposed=[use for name in others for use in self.uses[name]],
                    )
                ]
        name = next(name for name in names[1:] if not _same_view(self.tensors[name], self.tensors[names[0]]))
        raise DeadWeightError(
            f"weight {self.label[name] or self.root[name]!r} is used as it is stored and, by node "
            f"{_title(self.uses[name][0].node)}, in another form that cannot read the same memory"
        )

    def _split(self, roles: list[tuple[str, Use, str | None]]) -> list[Weight]:
        """Give each parameter its own copy of a tensor that is shared because all its elements had one value.

        The old torch exporter left an Identity node with the name of each parameter. The new one left nothing, but
        tells from which module each node comes: uses by one module are one parameter.
        """
        scopes = {
            name: {_scope(use.node) for other, use, role in roles if other == name and role} for name, _, _ in roles
        }
        weights: dict[tuple[str, tuple[int, ...]], Weight] = {}
        for name, use, role in roles:
            label = self.label[name]
            array = self.tensors[name]
            if role is None:
                key = f"{name}.constant"
            elif len(scopes[name]) == 1 and None not in scopes[name] and label:
                key = label
            elif scope := _scope(use.node):
                key = f"{scope}.{role}"
            else:
                key = (
                    label if label and (label, array.shape) not in weights else f"{_title(use.node, bare=True)}.{role}"
                )
            weight = weights.setdefault((key, array.shape), Weight(key, array, parameter=role is not None))
            weight.uses.append(use)
        return list(weights.values())

    def _reads_transposed(self, use: Use) -> bool:
        is_top_level = any(node is use.node for node in self.graph.node)
        return is_top_level and (use.node.op_type, use.position) in {("MatMul", 1), ("Gemm", 0), ("Gemm", 1)}

    def _keep_small_constants(self, weights: list[Weight]) -> list[Weight]:
        """Put constants that are no weights back into the graph, the large ones excepted."""
        stored = []
        for weight in weights:
            if weight.parameter or (weight.array.nbytes > _INLINE_BYTES and weight.array.dtype.name in DTYPES.values()):
                stored.append(weight)
            else:
                self.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(weight.array), weight.name))
                for node, index in weight.uses:
                    node.input[index] = weight.name
        return stored

    def _name(self, weights: list[Weight]) -> None:
        """Give each weight a unique name: its own, else one made from the module that uses it, else the exporter's."""
        taken = _value_names(self.graph) | {weight.name for weight in self.large}
        named: dict[tuple[int, int], str] = {}  # by node and input
        for weight in sorted(weights, key=lambda weight: not self._is_named(weight)):
            name = weight.name
            if not self._is_named(weight):
                name = self._name_from_use(weight, named) or name
            count = 1
            unique = name
            while unique in taken:
                count += 1
                unique = f"{name}.{count}"
            taken.add(unique)
            weight.name = unique
            named.update(((id(node), index), unique) for node, index in weight.uses)

    @staticmethod
    def _is_named(weight: Weight) -> bool:
        return not _GENERATED.match(weight.name)

    def _name_from_use(self, weight: Weight, named: Mapping[tuple[int, int], str]) -> str | None:
        node, index = (weight.uses + weight.transposed)[0]
        role = _ROLES.get(node.op_type, {}).get(index)
        scope = _scope(node)
        if role is None or scope is None:
            return None
        if role == "weight":
            # The old exporter's scopes miss modules that are called past their parent's forward; a bias keeps its name.
            for reader in [node, *self.readers[node.output[0]]]:
                for position in range(len(reader.input)):
                    module, _, attribute = named.get((id(reader), position), "").rpartition(".")
                    if attribute == "bias" and module.split(".")[-1] == scope.split(".")[-1]:
                        return f"{module}.weight"
        return f"{scope}.{role}"

    def _connect(self, weights: list[Weight]) -> None:
        """Let each node read its weights under their names, transposed where it is tied."""
        replaced: dict[int, list[NodeProto]] = {}
        for weight in weights:
            for node, index in weight.uses:
                node.input[index] = weight.name
            for node, index in weight.transposed:
                node.input[index] = weight.name
                if node.op_type == "Gemm":
                    _flip(node, "transA" if index == 0 else "transB")
                else:
                    replaced[id(node)] = self._multiply_transposed(node, weight)
        if replaced:
            _replace(self.graph.node, [new for node in self.graph.node for new in replaced.get(id(node), [node])])

    def _multiply_transposed(self, node: NodeProto, weight: Weight) -> list[NodeProto]:
        """Return nodes for X @ W.T with X of any rank; Gemm, which reads W as it is stored, takes two axes only."""
        x, name = node.input
        output = node.output[0]
        classes, width = weight.array.shape

        def value(suffix: str) -> str:
            return f"{output}/{suffix}"

        for suffix, numbers in ("rows", [-1, width]), ("start", [0]), ("stop", [-1]), ("columns", [classes]):
            self.graph.initializer.append(numpy_helper.from_array(np.array(numbers, np.int64), value(suffix)))
        return [
            helper.make_node("Reshape", [x, value("rows")], [value("x")], f"{node.name}/Reshape"),
            helper.make_node("Gemm", [value("x"), name], [value("product")], f"{node.name}/Gemm", transB=1),
            helper.make_node("Shape", [x], [value("x_shape")], f"{node.name}/Shape"),
            helper.make_node(
                "Slice", [value("x_shape"), value("start"), value("stop")], [value("batch_shape")], f"{node.name}/Slice"
            ),
            helper.make_node(
                "Concat", [value("batch_shape"), value("columns")], [value("shape")], f"{node.name}/Concat", axis=0
            ),
            helper.make_node("Reshape", [value("product"), value("shape")], [output], f"{node.name}/Reshape_1"),
        ]


class _ExternalFiles:
    """The files beside a graph that hold its external data, each mapped once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.maps: dict[str, Array] = {}

    def open(self, tensor: TensorProto) -> Array:
        """Return a tensor's elements, as a view of the file or of the graph's own bytes where possible."""
        dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
        if tensor.data_location != TensorProto.EXTERNAL:
            if tensor.HasField("raw_data") and dtype.name in DTYPES.values():
                return self._view(tensor, np.frombuffer(tensor.raw_data, np.uint8), 0, None)
            return numpy_helper.to_array(tensor)
        fields = {entry.key: entry.value for entry in tensor.external_data}
        location = fields.get("location", "")
        if location not in self.maps:
            path = self.folder / location
            if not location or Path(location).is_absolute() or ".." in Path(location).parts:
                raise BundleError(
                    f"weight {tensor.name!r}: its external data {location!r} is not a file beside the model"
                )
            if not path.is_file():
                raise BundleError(f"its external data {location!r} is missing; it must be beside the model")
            self.maps[location] = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0, np.uint8)
        length = fields.get("length")
        return self._view(
            tensor, self.maps[location], int(fields.get("offset", 0)), None if length is None else int(length)
        )

    def _view(self, tensor: TensorProto, data: Array, start: int, length: int | None) -> Array:
        dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type).newbyteorder("<")
        size = prod(tensor.dims) * dtype.itemsize
        available = data.size - start if length is None else min(length, data.size - start)
        if start < 0 or available < size:
            raise BundleError(
                f"weight {tensor.name!r}: {size} bytes expected, {max(available, 0)} there; its data is cut off"
            )
        return data[start : start + size].view(dtype).reshape(tuple(tensor.dims))


def _append_cross_entropy(graph: GraphProto, logits: str, shape: Sequence[int | str]) -> None:
    """Add the input ``labels`` and the output ``loss``, as log-sum-exp: the log of a softmax is off near 0 and 1."""
    graph.input.append(helper.make_tensor_value_info("labels", TensorProto.INT64, shape[:-1]))
    graph.output.append(helper.make_tensor_value_info("loss", TensorProto.FLOAT, []))

    def constant(name: str, array: Array) -> str:
        graph.initializer.append(numpy_helper.from_array(array, f"pocketzo.loss.{name}"))
        return f"pocketzo.loss.{name}"

    def node(op_type: str, inputs: list[str], name: str, **attributes: Any) -> str:
        graph.node.append(helper.make_node(op_type, inputs, [name], f"pocketzo.loss.{op_type}_{name}", **attributes))
        return name

    last = constant("last_axis", np.array([-1], np.int64))
    log_p = node("LogSoftmax", [logits], "pocketzo.loss.log_probabilities", axis=-1)
    if len(shape) == 2:
        index = node("Unsqueeze", ["labels", last], "pocketzo.loss.index")
        chosen = node("GatherElements", [log_p, index], "pocketzo.loss.chosen", axis=-1)
        node("Neg", [node("ReduceMean", [chosen], "pocketzo.loss.mean", keepdims=0)], "loss")
        return
    ignored = node("Equal", ["labels", constant("ignored_label", np.array(IGNORED_LABEL))], "pocketzo.loss.ignored")
    label = node("Where", [ignored, constant("any_label", np.array(0)), "labels"], "pocketzo.loss.label")
    index = node("Unsqueeze", [label, last], "pocketzo.loss.index")
    chosen = node("GatherElements", [log_p, index], "pocketzo.loss.chosen", axis=-1)
    chosen = node("Squeeze", [chosen, last], "pocketzo.loss.chosen_by_token")
    zero, one = constant("zero", np.array(0, np.float32)), constant("one", np.array(1, np.float32))
    counted = node("Where", [ignored, zero, chosen], "pocketzo.loss.counted")
    weight = node("Where", [ignored, zero, one], "pocketzo.loss.weight")
    total = node("ReduceSum", [counted], "pocketzo.loss.total", keepdims=0)
    count = node("ReduceSum", [weight], "pocketzo.loss.count", keepdims=0)
    node("Neg", [node("Div", [total, count], "pocketzo.loss.mean")], "loss")


def _view(node: NodeProto, array: Array, integers: Mapping[str, Array]) -> Array | None:
    """Return what a node makes of an array, if it only looks at the same elements another way."""
    attributes = {item.name: helper.get_attribute_value(item) for item in node.attribute}
    second = integers.get(node.input[1]) if len(node.input) > 1 else None
    match node.op_type:
        case "Identity":
            return array
        case "Cast" if helper.tensor_dtype_to_np_dtype(attributes["to"]) == array.dtype:
            return array
        case "Transpose":
            return array.transpose(attributes.get("perm"))
        case "Unsqueeze" if second is not None:
            return np.expand_dims(array, tuple(second.tolist()))
        case "Squeeze" if second is not None:
            return np.squeeze(array, tuple(second.tolist()))
        case "Squeeze" if len(node.input) == 1:
            return np.squeeze(array)
        case "Reshape" if second is not None:
            keep = not attributes.get("allowzero", 0)
            return array.reshape([array.shape[i] if n == 0 and keep else n for i, n in enumerate(second.tolist())])
        case "Flatten":
            axis = attributes.get("axis", 1) % (array.ndim + 1)
            return array.reshape(prod(array.shape[:axis]), -1)
    return None


def _same_view(a: Array, b: Array) -> bool:
    return a.shape == b.shape and a.strides == b.strides and a.ctypes.data == b.ctypes.data


def _both_ways(matrix: Array) -> tuple[Array, Array]:
    return matrix, matrix.T


def _is_constant(array: Array) -> bool:
    """Return whether all elements have one value; most arrays differ in the first few."""
    flat = array.reshape(-1) if array.flags.c_contiguous else array.T.reshape(-1)
    return bool((flat[:64] == flat[0]).all() and (flat == flat[0]).all())


def _is_vector(array: Array) -> bool:
    """Return whether an array has one element for each channel, along the last axis."""
    return array.ndim > 0 and array.size == array.shape[-1]


def _scope(node: NodeProto) -> str | None:
    """Return the module that a node comes from, as torch names it: "encoder.layer.0.attention.self.query"."""
    for entry in node.metadata_props:
        if entry.key == "pkg.torch.onnx.name_scopes":  # the new exporter: "['', 'encoder', ..., 'linear_3']"
            scopes = re.findall(r"'([^']*)'", entry.value)
            return scopes[-2] or None if len(scopes) > 1 else None
    if node.name.startswith("/"):  # the old exporter: "/encoder/layer.0/attention/self/query/MatMul"
        return ".".join(node.name.split("/")[1:-1]) or None
    return None


def _title(node: NodeProto, *, bare: bool = False) -> str:
    name = node.name or next(iter(node.output), "")
    return name.strip("/").replace("/", ".") if bare else f"{name!r} ({node.op_type})"


def _flip(node: NodeProto, name: str) -> None:
    for attribute in node.attribute:
        if attribute.name == name:
            attribute.i = 1 - attribute.i
            return
    node.attribute.append(helper.make_attribute(name, 1))


def _integers(graph: GraphProto) -> dict[str, Array]:
    """Return the integer constants of a graph, which shapes and axes are made of."""
    integers = {}
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.INT64:
            integers[tensor.name] = numpy_helper.to_array(tensor)
    for node in graph.node:
        if node.op_type == "Constant":
            attribute = node.attribute[0]
            if attribute.name == "value" and attribute.t.data_type == TensorProto.INT64:
                integers[node.output[0]] = numpy_helper.to_array(attribute.t)
            elif attribute.name == "value_ints":
                integers[node.output[0]] = np.array(attribute.ints, np.int64)
    return integers


def _subgraphs(nodes: Iterable[NodeProto]) -> Iterator[GraphProto]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield attribute.g
            yield from attribute.graphs


def _nodes(graph: GraphProto) -> Iterator[NodeProto]:
    """Yield the nodes of a graph and of the graphs in it."""
    for node in graph.node:
        yield node
        for subgraph in _subgraphs([node]):
            yield from _nodes(subgraph)


def _value_names(graph: GraphProto) -> set[str]:
    names = {value.name for value in (*graph.input, *graph.output)} | {tensor.name for tensor in graph.initializer}
    return names.union(*(node.output for node in _nodes(graph)))


def _rename_value(graph: GraphProto, old: str, new: str) -> None:
    for node in _nodes(graph):
        for names in node.input, node.output:
            for index, name in enumerate(names):
                if name == old:
                    names[index] = new
    for subgraph in (graph, *_subgraphs(_nodes(graph))):
        for value in (*subgraph.initializer, *subgraph.value_info, *subgraph.output):
            if value.name == old:
                value.name = new


def _shape(value: ValueInfoProto) -> list[int | str] | None:
    if not value.type.tensor_type.HasField("shape"):
        return None
    return [
        size.dim_value if size.HasField("dim_value") and size.dim_value >= 0 else size.dim_param or "?"
        for size in value.type.tensor_type.shape.dim
    ]


def _dtype(value: ValueInfoProto) -> str:
    return helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name


def _replace(repeated: Any, items: Iterable[Any]) -> None:
    items = list(items)
    del repeated[:]
    repeated.extend(items)
