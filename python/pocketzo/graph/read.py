"""Read an ONNX file, and say what is in it."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import onnx
import onnx.inliner
from google.protobuf.message import DecodeError
from onnx import ModelProto, ValueInfoProto

from pocketzo.bundle import ValueSpec
from pocketzo.errors import BundleError
from pocketzo.graph.proto import all_nodes, dtype_of, replace, shape_of

MIN_OPSET: Final = 13


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
    replace(model.graph.input, [value for value in model.graph.input if value.name not in constants])
    model.ir_version = max(model.ir_version, 4)  # before, each initializer had to be an input too
    return model


def expose_activations(model: ModelProto) -> None:
    """Make outputs of all that the graph computes from its inputs."""
    computed = {value.name for value in model.graph.input}
    outputs = {value.name for value in model.graph.output}
    for node in model.graph.node:
        if computed.intersection(node.input):
            computed.update(filter(None, node.output))
            model.graph.output.extend(ValueInfoProto(name=name) for name in node.output if name and name not in outputs)


def drop_provenance(model: ModelProto) -> None:
    """Remove the stack traces that exporters attach to each node: often more bytes than all else in a graph."""
    for node in all_nodes(model.graph):
        node.ClearField("metadata_props")
        node.ClearField("doc_string")


def describe(value: ValueInfoProto) -> ValueSpec:
    """Return the name, element type and shape of an input or output.

    Raises
    ------
    BundleError
        If it is not a tensor, or of unknown rank.
    """
    shape = shape_of(value)
    if shape is None:
        raise BundleError(f"the graph's input or output {value.name!r} is not a tensor of known rank")
    return ValueSpec(value.name, dtype_of(value), tuple(shape))
