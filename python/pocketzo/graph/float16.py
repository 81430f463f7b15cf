"""Convert a graph to float16, and check the range of its values."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from pocketzo.errors import BundleError
from pocketzo.graph.read import from_proto, read_model
from pocketzo.graph.sessions import open_graph
from pocketzo.graph.weight import Weight

MOST_FLOAT16: Final = 65504.0


def needs_conversion(weights: Iterable[Weight], chosen: Collection[str], dtype: str | None) -> bool:
    """Return whether weights have to be converted to get a type; None is what they have.

    Raises
    ------
    BundleError
        float32 is asked for, and a trainable weight is float16.
    """
    if dtype == "float32":
        for weight in weights:
            if weight.name in chosen and weight.array.dtype == np.float16:
                raise BundleError(
                    f"weight {weight.name!r} is float16 in the file, and is trained as that: leave out the type "
                    "float32, or export the model in it"
                )
    return dtype == "float16" and any(weight.parameter and weight.array.dtype == np.float32 for weight in weights)


def to_float16(model: ir.Model, weights: Iterable[Weight]) -> ir.Model:
    """Convert a graph from float32 to float16; its inputs and outputs keep their types.

    Parameters
    ----------
    model : Model
        The result of :func:`extract_weights`. Do not use it afterwards.
    weights : iterable of Weight
        The storage type of float32 weights is set to float16.

    Returns
    -------
    Model

    Raises
    ------
    BundleError
        If a weight is too large for float16.
    """
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    graph = model.graph
    ends = [value.name for value in (*graph.inputs, *graph.outputs)]
    for weight in weights:
        graph.inputs.append(graph.initializers.pop(weight.name))  # the converter would read and keep initializers
        if weight.array.dtype == np.float32:
            weight.storage_dtype = "float16"
            largest = np.abs(weight.array).max(initial=0)
            if weight.parameter and largest > MOST_FLOAT16:
                raise BundleError(f"weight {weight.name!r} holds {largest:g}, and float16 ends at {MOST_FLOAT16}")
            if largest > MOST_FLOAT16:  # a mask works as well when clipped
                weight.array = np.clip(weight.array, -MOST_FLOAT16, MOST_FLOAT16)
    for node in graph.all_nodes():
        if node.op_type == "LayerNormalization" and not any(value.uses() for value in node.outputs[1:]):
            node.resize_outputs(1)  # mean and deviation are float32 whatever the input is, which the converter ignores
    blocked = [*DEFAULT_OP_BLOCK_LIST, "LogSoftmax", "NegativeLogLikelihoodLoss", "SoftmaxCrossEntropyLoss"]
    model = from_proto(convert_float_to_float16(ir.to_proto(model), keep_io_types=ends, op_block_list=blocked))
    for value in tuple(model.graph.inputs):
        if value.name not in ends:
            model.graph.inputs.remove(value)
            model.graph.initializers.add(value)
    return model


def open_with_activations(source: Path) -> ort.InferenceSession:
    """Open a session of a graph whose outputs are its own and every value that depends on its inputs."""
    return open_graph(source, _with_activations(source))


def _with_activations(source: Path) -> onnx.ModelProto:
    model = read_model(source)
    graph = model.graph
    computed = set(graph.inputs)
    for node in graph:
        if not computed.isdisjoint(node.inputs):
            values = [value for value in node.outputs if value.name]
            computed.update(values)
            graph.outputs.extend(value for value in values if not value.is_graph_output())
    return ir.to_proto(model)


def check_range(source: Path, values: Mapping[str, NDArray[Any]]) -> None:
    """Raise BundleError if a value of a graph, by name, is too large for float16.

    Without fp16 arithmetic in the CPU, the runtime computes in float32, and an overflow would show on other machines
    only.
    """
    for name, value in values.items():
        if value.dtype == np.float32:
            largest = value[np.isfinite(value)].max(initial=0)  # large negative values are masks
            if largest > MOST_FLOAT16:
                raise BundleError(
                    f"{source}: {name!r} reaches {largest:g} on a probing batch, and float16 ends at "
                    f"{MOST_FLOAT16:g}: prepare the model in float32"
                )
