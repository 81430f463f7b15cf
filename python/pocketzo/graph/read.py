"""Read an ONNX file, and describe its inputs and outputs."""

from __future__ import annotations

import logging
import re
import reprlib
from collections.abc import Iterator
from pathlib import Path

import onnx.checker
import onnx.inliner
import onnx_ir as ir
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message
from onnx_ir.passes import common

from pocketzo.errors import BundleError
from pocketzo.formats.bundle import ValueSpec
from pocketzo.graph.names import rename_shadowed, title_of
from pocketzo.graph.opset import MIN_OPSET, convert_old
from pocketzo.graph.schemas import check_nodes

CONVERTED = "pocketzo.converted"
"""Key of a model's ``meta``: the operator set that it was converted from."""

MICROSOFT = "com.microsoft"
"""The domain of onnxruntime's own operators."""


def read_model(path: Path) -> ir.Model:
    """Read a graph without its external data, and normalise it.

    Local functions are inlined. Constant nodes and the initializers of subgraphs become initializers of the main graph.
    Initializers are not inputs. The operator set of onnxruntime's own operators is named. A graph of an operator set
    before 13 is converted, and ``meta[CONVERTED]`` keeps its version.

    Raises
    ------
    BundleError
        If the file is not an ONNX model, it is not well formed, or its operator set is too old to be converted.
    """
    try:
        proto = onnx.load(path, format="protobuf", load_external_data=False)
    except DecodeError:
        raise BundleError("not an ONNX file, or cut off") from None
    versions = [entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")]
    if bad := next((text for text in _texts(proto) if not isinstance(text, str)), None):
        raise BundleError(f"not an ONNX file, or damaged: {reprlib.repr(bad)} in it is not UTF-8")
    if not proto.graph.node or not proto.opset_import:
        raise BundleError("not an ONNX file, or an empty one: it has no nodes or names no operator set")
    if not versions:
        domains = ", ".join(sorted(entry.domain for entry in proto.opset_import))
        raise BundleError(f"the model has operators of {domains} alone, and none of ai.onnx, so no weights to train")
    if proto.graph.sparse_initializer:
        raise BundleError("sparse initializers are not supported; export the model with dense weights")
    proto.ir_version = max(proto.ir_version, 4)  # before version 4, each initializer had to be an input too
    if versions[0] < MIN_OPSET:
        proto = convert_old(proto, versions[0])
    if proto.functions:
        try:
            proto = onnx.inliner.inline_local_functions(proto)
        except (RuntimeError, onnx.checker.ValidationError) as error:
            raise BundleError(f"the graph's functions cannot be inlined: {_reason(error)}") from None
    model = from_proto(proto)
    if versions[0] < MIN_OPSET:
        model.meta[CONVERTED] = versions[0]
    try:
        ir.passes.Sequential(
            common.RemoveInitializersFromInputsPass(),
            common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
            common.LiftSubgraphInitializersToMainGraphPass(),
        )(model)
    except ir.passes.PassError as error:
        raise BundleError(f"the graph's constants cannot be read: {_reason(error)}") from None
    rename_shadowed(model.graph)
    if any(node.domain == MICROSOFT for node in model.graph.all_nodes()):
        model.opset_imports.setdefault(MICROSOFT, 1)  # which onnxruntime does, and onnx's inference of types does not
    return model


def _texts(message: Message) -> Iterator[object]:
    """Yield the strings of a message and of those inside; protobuf gives bytes where they are not UTF-8."""
    if isinstance(message, onnx.TensorProto):  # without a copy of its elements
        yield message.name
        yield from (text for entry in message.external_data for text in (entry.key, entry.value))
        return
    for field, value in message.ListFields():
        values = value if field.is_repeated else (value,)
        if field.type == FieldDescriptor.TYPE_STRING and field.name != "doc_string":  # which is not read
            yield from values
        elif field.type == FieldDescriptor.TYPE_MESSAGE:
            for inner in values:
                yield from _texts(inner)


def from_proto(proto: onnx.ModelProto) -> ir.Model:
    """Return the onnx_ir model, its nodes in topological order.

    Raises
    ------
    BundleError
        If the graph is not well formed: two values have one name, no node computes a value, there is a cycle, or a
        node has not the inputs and attributes of its operator.
    """
    log = logging.getLogger("onnx_ir")
    level = log.level
    log.setLevel(logging.ERROR)  # onnx_ir warns about and repairs graphs that are refused below
    try:
        model = ir.from_proto(proto)
        model.graph.sort()
    except (ir.serde.SerdeError, ValueError) as error:
        raise BundleError(f"the graph cannot be read: {_reason(error)}") from None
    finally:
        log.setLevel(level)
    for node in model.graph.all_nodes():
        for value in node.inputs:
            if value is not None and value.producer() is None and value.graph is None:
                raise BundleError(f"node {title_of(node)} reads {value.name!r}, which nothing computes")
    for value in model.graph.outputs:
        if value.producer() is None and not value.is_graph_input() and not value.is_initializer():
            raise BundleError(f"nothing computes the graph's output {value.name!r}")
    check_nodes(model)
    return model


def to_bytes(model: ir.Model) -> bytes:
    """Serialise a graph to the bytes of an ONNX file, deterministically."""
    try:
        content: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
    except ir.serde.SerdeError as error:
        raise BundleError(f"the graph cannot be written: {_reason(error)}") from None
    return content


def _reason(error: BaseException) -> str:
    """Return the first sentence of the root cause: each error of the chain quotes its whole input."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    return re.split(r"\.?\n|\. ", str(error).strip())[0] or type(error).__name__


def drop_provenance(model: ir.Model) -> None:
    """Remove the stack traces that exporters attach to each node: often more bytes than the rest of the graph."""
    common.ClearMetadataAndDocStringPass()(model)


def describe(value: ir.Value) -> ValueSpec:
    """Return the name, element type and shape of an input or output.

    Raises
    ------
    BundleError
        If the value is not a tensor, or its rank is unknown.
    """
    shape = shape_of(value)
    if shape is None:
        raise BundleError(f"the graph's input or output {value.name!r} is not a tensor of known rank")
    return ValueSpec(str(value.name), dtype_of(value), tuple(shape))


def shape_of(value: ir.Value) -> list[int | str] | None:
    """Return the shape of a tensor, with names for dynamic axes; None if the rank is unknown."""
    if not isinstance(value.type, ir.TensorType) or value.shape is None:
        return None
    return [(size if size >= 0 else "?") if isinstance(size, int) else size.value or "?" for size in value.shape]


def dtype_of(value: ir.Value) -> str:
    """Return the name of a tensor's element type."""
    if value.dtype is None or value.dtype == ir.DataType.STRING:
        return "object"
    return value.dtype.numpy().name
