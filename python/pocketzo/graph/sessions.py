"""onnxruntime sessions of graphs that are being prepared."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx
import onnxruntime as ort

from pocketzo.errors import BundleError, first_line
from pocketzo.machine.paths import utf8_path


def open_graph(source: Path, graph: Path | onnx.ModelProto, folder: Path | None = None) -> ort.InferenceSession:
    """Open a session without graph optimizations or prepacking, so that weights in external data are mapped only.

    Parameters
    ----------
    source : Path
        The model's file, which is named in errors.
    graph : Path or ModelProto
        What is to be run: a file, or a graph whose locations of external data are changed.
    folder : Path, optional
        Where the external data of a ModelProto is; by default beside the model's file.

    Raises
    ------
    BundleError
        onnxruntime cannot run it.
    """
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1  # sums in one order
    options.log_severity_level = 4
    options.add_session_config_entry("session.disable_prepacking", "1")
    try:
        if isinstance(graph, Path):
            content: str | bytes = utf8_path(graph)
        else:
            real = _relocate(_external_tensors(graph.graph), folder or source.parent)
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", utf8_path(real))
            content = graph.SerializeToString()
            del graph  # it may hold the weights
        return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own exceptions share no public base
        raise BundleError(f"{source}: onnxruntime cannot run it: {first_line(error)}") from None


def open_source(source: Path, *, external: bool) -> ort.InferenceSession:
    """Open a session of a model as it was exported, which may have external data, as :func:`open_graph` does."""
    if external:
        return open_graph(source, onnx.load(source, format="protobuf", load_external_data=False))
    return open_graph(source, source)  # onnxruntime reads the file itself, once


def _external_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Yield the tensors of a graph and its subgraphs that are in external files."""
    tensors: list[onnx.TensorProto] = list(graph.initializer)
    for node in graph.node:
        for attribute in node.attribute:
            tensors += [attribute.t, *attribute.tensors]
            for subgraph in (attribute.g, *attribute.graphs):
                yield from _external_tensors(subgraph)
    yield from (tensor for tensor in tensors if tensor.data_location == onnx.TensorProto.EXTERNAL)


def _relocate(tensors: Iterable[onnx.TensorProto], folder: Path) -> Path:
    """Have external data named by its real files, and return the folder of all of them.

    onnxruntime refuses a link that leads out of the folder, as all links of the Hugging Face cache do.
    """
    locations = [entry for tensor in tensors for entry in tensor.external_data if entry.key == "location"]
    files = [(folder / entry.value).resolve() for entry in locations]
    common = Path(os.path.commonpath([folder.resolve(), *(file.parent for file in files)]))
    for entry, file in zip(locations, files, strict=True):
        entry.value = file.relative_to(common).as_posix()
    return common
