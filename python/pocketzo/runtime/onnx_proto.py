"""The part of ONNX's protobuf messages that prepacking needs: phones have no package onnx."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

from pocketzo.errors import BundleError, NotPrepackableError

FLOAT: Final = 1  # TensorProto.FLOAT
INT64: Final = 7  # TensorProto.INT64
EXTERNAL: Final = 1  # TensorProto.EXTERNAL
INT: Final = 2  # AttributeProto.INT

# By message, its fields: number, name and type, * if repeated. Fields that are not listed survive reading and writing.
_SCHEMA: Final[Mapping[str, str]] = {
    "Model": "1 ir_version int64, 7 graph Graph, 8 opset_import Opset*",
    "Opset": "1 domain string, 2 version int64",
    "Graph": "1 node Node*, 2 name string, 5 initializer Tensor*, 11 input Value*, 12 output Value*, 13 value Value*",
    "Node": (
        "1 input string*, 2 output string*, 3 name string, 4 op_type string, 5 attribute Attribute*, 7 domain string"
    ),
    "Attribute": "1 name string, 3 i int64, 5 t Tensor, 6 g Graph, 11 graphs Graph*, 20 type int32",
    "Tensor": (
        "1 dims int64*, 2 data_type int32, 5 int32_data int32*, 7 int64_data int64*, 8 name string, 9 raw_data bytes, "
        "13 external_data Entry*, 14 data_location int32"
    ),
    "Entry": "1 key string, 2 value string",
    "Value": "1 name string, 2 type Type",
    "Type": "1 tensor_type TensorType",
    "TensorType": "1 elem_type int32, 2 shape Shape",
    "Shape": "1 dim Dim*",
    "Dim": "1 dim_value int64, 2 dim_param string",
}


@functools.cache
def onnx_messages() -> Any:
    """Return the message classes of :data:`_SCHEMA`, as attributes.

    Raises
    ------
    NotPrepackableError
        The package protobuf is not installed, or cannot be imported.
    """
    try:
        from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
    except ModuleNotFoundError:
        raise NotPrepackableError("the Python package protobuf is not installed (pip install protobuf)") from None
    except Exception as error:  # a damaged package may raise anything
        raise NotPrepackableError(f"the Python package protobuf cannot be imported: {error}") from None
    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="pocketzo.onnx.proto", package="pocketzo.onnx", syntax="proto2")
    for message, fields in _SCHEMA.items():
        added = file.message_type.add(name=message)
        for field in fields.split(", "):
            number, name, kind = field.split()
            repeated = kind.endswith("*")
            kind = kind.rstrip("*")
            described = added.field.add(name=name, number=int(number))
            described.label = kinds.LABEL_REPEATED if repeated else kinds.LABEL_OPTIONAL
            if kind in _SCHEMA:
                described.type = kinds.TYPE_MESSAGE
                described.type_name = f".pocketzo.onnx.{kind}"
            else:
                described.type = getattr(kinds, f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    classes = {name: pool.FindMessageTypeByName(f"pocketzo.onnx.{name}") for name in _SCHEMA}
    # protobuf before 4.22 has the older name only, and from 5 on there is the newer one only
    make = getattr(message_factory, "GetMessageClass", None) or message_factory.MessageFactory(pool).GetPrototype
    return SimpleNamespace(**{name: make(found) for name, found in classes.items()})


def read_graph(path: Path) -> Any:
    """Return the graph file of a bundle as a message ``Model``.

    Raises
    ------
    NotPrepackableError
        As for :func:`onnx_messages`.
    BundleError
        It is no ONNX model.
    OSError
        It cannot be read.
    """
    messages, data = onnx_messages(), path.read_bytes()
    from google.protobuf.message import DecodeError

    try:
        return messages.Model.FromString(data)
    except DecodeError as error:
        raise BundleError(f"{path}: not an ONNX model: {error}; prepare the model again") from None


def try_read_graph(path: Path) -> Any:
    """Return what :func:`read_graph` does; None without the package protobuf, or if the file cannot be read."""
    try:
        return read_graph(path)
    except (NotPrepackableError, OSError):
        return None


def opset_of(model: Any) -> int:
    """Return the version of ONNX's own operators in a model; 0 if it has none."""
    return next((opset.version for opset in model.opset_import if opset.domain in ("", "ai.onnx")), 0)


def declare(values: Any, name: str, dtype: int, shape: Iterable[int | str]) -> None:
    """Add an input or an output to those of a graph, with sizes that are numbers or names."""
    tensor = values.add(name=name).type.tensor_type
    tensor.elem_type = dtype
    for size in shape:
        if isinstance(size, str):
            tensor.shape.dim.add(dim_param=size)
        else:
            tensor.shape.dim.add(dim_value=size)


def all_nodes(graph: Any) -> Iterator[Any]:
    """Yield the nodes of a graph, and of those inside it, in topological order."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for subgraph in (attribute.g, *attribute.graphs):
                yield from all_nodes(subgraph)


def inner_inputs(node: Any) -> list[str]:
    """Return what the nodes of the graphs inside a node read, by name; "" for an input that is left out."""
    graphs = [graph for attribute in node.attribute for graph in (attribute.g, *attribute.graphs)]
    return [name for graph in graphs for one in all_nodes(graph) for name in one.input]


def read_by(node: Any) -> set[str]:
    """Return the names of the values that a node reads, also in the graphs inside it."""
    return {name for name in (*node.input, *inner_inputs(node)) if name}
