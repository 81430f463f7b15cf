"""A frozen base: weights that are not trained stay in the bundle's file, which onnxruntime maps and prepacks.

Only what is trained is in memory that the kernels write. onnxruntime drops the mapping of a weight as soon as all of
its uses are prepacked. :func:`model_over_base` edits the graph so that little of the file is resident at a time.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime as ort

from pocketzo.errors import NotPrepackableError
from pocketzo.formats.bundle import Bundle, TensorSpec
from pocketzo.runtime.image import Image
from pocketzo.runtime.onnx_proto import EXTERNAL, INT, all_nodes, onnx_messages, read_graph
from pocketzo.runtime.session import open_plain, open_with_constants
from pocketzo.runtime.variables import declare_inputs
from pocketzo.runtime.weights import Weights

_MOST_TRAINED: Final = 1 / 8  # of the bytes; trained matrices are not prepacked, which makes their products slower
_PRODUCTS: Final = "MatMul", "Gemm", "MatMulNBits"  # their second input is prepacked
_WIDE: Final = 8 << 20  # bytes as float32, from which on a quantised matrix is cut, and of each slice of 4 bits
_SLICE: Final = 1 << 20  # bytes as float32 of each slice of 8 bits


def frozen_base(bundle: Bundle) -> frozenset[str]:
    """Return the names of the weights that stay in the file: all that are not trained, or none.

    There are none where more than an eighth of the bytes are trained, unless what is trained has a file of its own.
    """
    frozen = [tensor for tensor in bundle.tensors if not tensor.trainable]
    trained = sum(_nbytes(tensor) for tensor in bundle.tensors if tensor.trainable)
    stays = stays_in_file(bundle, trained, sum(map(_nbytes, frozen)))
    return frozenset(tensor.name for tensor in frozen) if stays else frozenset()


def stays_in_file(bundle: Bundle, trained: int, frozen: int) -> bool:
    """Return whether weights that are not trained stay in the file, in a bundle or in a stage of it.

    Parameters
    ----------
    bundle : Bundle
        The whole one.
    trained, frozen : int
        Bytes of its weights, or of those of the stage.
    """
    return bundle.adapter is not None or trained <= _MOST_TRAINED * (trained + frozen)


def _nbytes(tensor: TensorSpec) -> int:
    return math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize


def trained_weights(bundle: Bundle) -> Weights:
    """Allocate memory for the weights that are written: without a frozen base, for all."""
    return Weights(bundle, Image.allocate(bundle, without=frozen_base(bundle)))


def open_over_base(
    bundle: Bundle, values: Mapping[str, ort.OrtValue], threads: int, graph: Path | None = None
) -> ort.InferenceSession:
    """Create a session over a frozen base, prepacked where that is possible.

    Parameters
    ----------
    bundle : Bundle
    values : mapping of str to OrtValue
        The trained weights; they must outlive the session.
    threads : int
    graph : Path, optional
        The bundle's ``model.onnx`` by default.
    """
    with contextlib.suppress(NotPrepackableError):
        return open_with_constants(bundle, model_over_base(bundle, graph), values, threads)
    return open_plain(bundle, values, threads, graph)


def model_over_base(bundle: Bundle, graph: Path | None = None, edit: Callable[[Any], None] | None = None) -> bytes:
    """Return the graph's file for a session over a frozen base.

    The graph is the bundle's ``model.onnx``, or another one over the same weights. ``edit`` gets it as a message
    ``Model``, and changes it in place; by default trained matrices become inputs.

    Raises
    ------
    NotPrepackableError
        The package protobuf is not installed.
    """
    model = read_graph(graph or bundle.model_path)
    if edit is None:
        declare_inputs(model.graph, bundle)
    else:
        edit(model)
    trained = {tensor.name for tensor in bundle.tensors if tensor.trainable}
    stored = {
        tensor.name: tensor
        for tensor in model.graph.initializer
        if tensor.data_location == EXTERNAL and tensor.name not in trained
    }
    _cut_wide(model.graph, stored)
    _arrange(model.graph, stored)
    data: bytes = model.SerializeToString()
    return data


def _arrange(graph: Any, stored: Mapping[str, Any]) -> None:
    """Give products names of their own for weights that others read, too, and put that of the largest weight first."""
    products = [node for node in graph.node if node.op_type in _PRODUCTS and node.input[1] in stored]
    if not products:
        return
    largest = max(products, key=lambda node: _length(stored[node.input[1]]))
    readers = Counter(name for node in all_nodes(graph) for name in node.input)
    for node in products:
        if readers[node.input[1]] > 1:
            node.input[1] = _part(graph, stored[node.input[1]], f"{node.input[1]}/{node.output[0]}")
    nodes = [largest, *(node for node in graph.node if node is not largest)]
    del graph.node[:]
    graph.node.extend(nodes)


def _cut_wide(graph: Any, stored: Mapping[str, Any]) -> None:
    """Cut quantised products of many columns, such as output projections, into products of fewer columns.

    onnxruntime 1.32 has no kernel for 8 bits, and none for 4 where it does not prepack, as in the reference session. It
    makes float32 of the whole matrix then: 113 MB for SmolLM2. That of a slice of 8 bits stays in the processor's
    cache: 45 ms instead of 206 for 4 tokens. The results are the same, bit for bit.
    """
    nodes = []
    for node in graph.node:
        nodes += _slices(graph, node, stored) if node.op_type == "MatMulNBits" else [node]
    del graph.node[:]
    graph.node.extend(nodes)


def _slices(graph: Any, node: Any, stored: Mapping[str, Any]) -> list[Any]:
    """Return the nodes in the place of a MatMulNBits: itself, or products by slices and their concatenation."""
    numbers = {attribute.name: attribute.i for attribute in node.attribute}
    inner, columns = numbers["K"], numbers["N"]
    names = [name for name in node.input[1:] if name]  # integers, scales, perhaps zero points
    if 4 * inner * columns < _WIDE or not stored.keys() >= {*names} or len(names) > 3:
        return [node]
    step = max(1, (_SLICE if numbers.get("bits", 4) == 8 else _WIDE) // (4 * inner))
    parts = []
    for at in range(0, columns, step):
        part = onnx_messages().Node()
        part.CopyFrom(node)
        part.name = part.output[0] = f"{node.output[0]}/{at}"
        count = min(step, columns - at)
        next(attribute for attribute in part.attribute if attribute.name == "N").i = count
        for place, name in enumerate(names, 1):
            part.input[place] = _part(graph, stored[name], f"{name}/{part.name}", at, count, columns)
        parts.append(part)
    whole = onnx_messages().Node(op_type="Concat", input=[part.output[0] for part in parts], output=node.output)
    whole.attribute.add(name="axis", i=-1, type=INT)
    return [*parts, whole]


def _part(graph: Any, tensor: Any, name: str, begin: int = 0, count: int = 1, of: int = 1) -> str:
    """Add an initializer of ``count`` of the ``of`` equal parts of a stored one, from part ``begin`` on."""
    part = graph.initializer.add()
    part.CopyFrom(tensor)
    part.name = name
    part.dims[0] = tensor.dims[0] * count // of
    unit = _length(tensor) // of
    for entry in part.external_data:
        if entry.key == "offset":
            entry.value = str(int(entry.value) + begin * unit)
        elif entry.key == "length":
            entry.value = str(count * unit)
    return name


def _length(tensor: Any) -> int:
    return next(int(entry.value) for entry in tensor.external_data if entry.key == "length")
