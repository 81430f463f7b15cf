"""The bytes of a graph's tensors, in the graph's own file or in those beside it."""

from __future__ import annotations

from math import prod
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from pocketzo.errors import BundleError
from pocketzo.graph.weight import Array
from pocketzo.safetensors import DTYPES


class ExternalFiles:
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
