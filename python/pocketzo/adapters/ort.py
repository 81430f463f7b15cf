"""onnxruntime's own adapters: values of inputs that have defaults, in a file of flatbuffers.

The graph beside the file is the bundle's, in which what was trained is declared as inputs: initializers that are
inputs, too, are their defaults.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime as ort

from pocketzo.adapters.tuned import Tuned
from pocketzo.formats.bundle import MODEL
from pocketzo.formats.files import copy_file, write_file
from pocketzo.formats.generation import GENERATE
from pocketzo.runtime.onnx_proto import declare, read_graph

ADAPTER: Final = "adapter.onnx_adapter"


def write_onnx(tuned: Tuned, folder: Path) -> None:
    """Write the adapter, the graphs, and the weights that these read.

    Raises
    ------
    NotPrepackableError
        The package protobuf is not installed.
    """
    bundle = tuned.bundle
    names = [tensor.name for tensor in bundle.tensors if tensor.trainable]
    for name in (MODEL, GENERATE):
        if (bundle.path / name).is_file():
            write_file(folder / name, _with_inputs(bundle.path / name, names))
    for path in {bundle.weights_path, bundle.trained_path}:
        copy_file(path, folder / path.name)
    values = {name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(tuned.tensors[name])) for name in names}
    adapter = ort.AdapterFormat()
    adapter.set_adapter_version(1)
    adapter.set_model_version(1)
    adapter.set_parameters(values)
    adapter.export_adapter(str(folder / ADAPTER))


def _with_inputs(path: Path, names: list[str]) -> bytes:
    model: Any = read_graph(path)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for name in names:
        if name in tensors:
            declare(model.graph.input, name, tensors[name].data_type, tensors[name].dims)
    data: bytes = model.SerializeToString(deterministic=True)
    return data
