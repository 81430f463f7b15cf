"""Convert a graph to float16, and check the outputs of the converted graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from pocketzo.errors import BundleError
from pocketzo.graph.read import from_proto, read_model, to_bytes
from pocketzo.graph.weight import Weight
from pocketzo.machine.paths import utf8_path

MOST_FLOAT16: Final = 65504.0


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
    blocked = [*DEFAULT_OP_BLOCK_LIST, "LogSoftmax", "NegativeLogLikelihoodLoss", "SoftmaxCrossEntropyLoss"]
    model = from_proto(convert_float_to_float16(ir.to_proto(model), keep_io_types=ends, op_block_list=blocked))
    for value in tuple(model.graph.inputs):
        if value.name not in ends:
            model.graph.inputs.remove(value)
            model.graph.initializers.add(value)
    return model


def check_float16(source: Path, session: ort.InferenceSession, batch: Mapping[str, NDArray[Any]]) -> None:
    """Compare the original model with its float16 version on a small batch; raise BundleError if they differ.

    Without fp16 arithmetic in the CPU, the runtime computes in float32, and an overflow would show on other machines
    only. So each intermediate value of the original model is checked against the float16 range.
    """
    names, graph = _with_activations(source)
    original = open_unoptimised(source, graph)
    advice = "prepare the model in float32"
    try:
        asked = {value.name for value in original.get_inputs()}
        values = original.run(None, {name: array for name, array in batch.items() if name in asked})
        got = session.run(names, batch)
    except Exception as error:  # onnxruntime's own exceptions share no public base
        raise BundleError(f"{source}: a run on a probing batch failed: {error}") from error
    floats = [
        (output.name, value)
        for output, value in zip(original.get_outputs(), values, strict=True)
        if isinstance(value, np.ndarray) and value.dtype == np.float32
    ]
    for name, value in floats:
        largest = value[np.isfinite(value)].max(initial=0)  # large negative values are masks
        if largest > MOST_FLOAT16:
            raise BundleError(
                f"{source}: {name!r} reaches {largest:g} on a probing batch, and float16 ends at "
                f"{MOST_FLOAT16:g}: {advice}"
            )
    found = dict(zip(names, got, strict=True))
    for name, expected in floats:
        if name in found:
            size = np.abs(expected).max(initial=0, where=np.isfinite(expected))
            apart = np.abs(found[name] - expected).max(initial=0, where=np.isfinite(expected))
            if not apart <= 0.05 * size + 1e-3:
                raise BundleError(
                    f"{source}: in float16 the output {name!r} is off by {apart:.3g} where it reaches {size:.3g} (a "
                    f"constant may be beyond 6e-08 .. {MOST_FLOAT16:g}): {advice}"
                )


def _with_activations(source: Path) -> tuple[list[str], bytes]:
    """Return the names of a graph's outputs, and the graph with every value that depends on its inputs as an output."""
    model = read_model(source)
    graph = model.graph
    names = [str(value.name) for value in graph.outputs]
    computed = set(graph.inputs)
    for node in graph:
        if not computed.isdisjoint(node.inputs):
            values = [value for value in node.outputs if value.name]
            computed.update(values)
            graph.outputs.extend(value for value in values if not value.is_graph_output())
    return names, to_bytes(model)


def open_unoptimised(source: Path, graph: Path | bytes) -> ort.InferenceSession:
    """Open a session without graph optimizations or prepacking."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.add_session_config_entry("session.disable_prepacking", "1")  # weights are mapped, not copied
    if isinstance(graph, bytes):
        folder = utf8_path(source.parent.resolve())
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    opened = graph if isinstance(graph, bytes) else utf8_path(graph)
    try:
        return ort.InferenceSession(opened, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own exceptions share no public base
        raise BundleError(f"{source}: onnxruntime cannot run it: {str(error).splitlines()[0]}") from None
