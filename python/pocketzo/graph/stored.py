"""A graph whose weights are stored once, under readable names, in float32 or float16."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir

from pocketzo.graph.extract import extract_weights
from pocketzo.graph.float16 import to_float16
from pocketzo.graph.read import drop_provenance, read_model
from pocketzo.graph.weight import Array, Weight


def store(source: Path, target: Path, dtype: Literal["float32", "float16"] = "float32") -> None:
    """Write a float32 graph as nodes read its weights.

    Exporters write a table that is read and multiplied twice, once transposed: 671 MB of Gemma-3-270M.

    Parameters
    ----------
    source, target : Path
        The ONNX files. The weights are written to a file of the name of `target` and ``.data``.
    dtype : {"float32", "float16"}
        The type of the weights, and of the arithmetic where the CPU supports it. Inputs and outputs stay float32.

    Raises
    ------
    BundleError
        If a weight is too large for float16.
    """
    model = read_model(source)
    weights = [weight for weight in extract_weights(model, source.parent) if not weight.inline]
    drop_provenance(model)
    if dtype == "float16":
        model = to_float16(model, weights)
    for weight in weights:
        model.graph.initializers[weight.name].const_value = _tensor(weight)
    ir.save(model, target, external_data=f"{target.name}.data")


def _tensor(weight: Weight) -> ir.LazyTensor:
    """Return the elements of a weight, of which one at a time is converted."""

    def elements() -> ir.TensorProtocol:
        array: Array = np.ascontiguousarray(weight.array, weight.dtype)
        return ir.tensor(array, name=weight.name)

    shape = ir.Shape(weight.array.shape)
    return ir.LazyTensor(elements, ir.DataType.from_numpy(weight.dtype), shape=shape, name=weight.name)
