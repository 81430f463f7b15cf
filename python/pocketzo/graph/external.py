"""The elements of a graph's tensors, in the graph's own file or in those beside it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from pocketzo.errors import BundleError
from pocketzo.graph.weight import Array


class ExternalFiles:
    """The files beside a graph that hold its external data, each mapped once.

    ``ir.ExternalTensor`` is not asked for its elements: it maps the file once more for each tensor, does not look at
    the declared length, and refuses what symbolic or hard links lead to, as in the Hugging Face cache.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.maps: dict[str, Array] = {}

    def read(self, tensor: ir.TensorProtocol) -> Array:
        """Return a tensor's elements, as a view of the file or of the graph's own bytes where possible."""
        try:
            return self._read(tensor)
        except ValueError as error:
            raise BundleError(f"weight {tensor.name!r} cannot be read: {error}") from None

    def _read(self, tensor: ir.TensorProtocol) -> Array:
        if isinstance(tensor, ir.ExternalTensor):
            data = self._slice(tensor, self._map(tensor), tensor.offset or 0, tensor.length)
        elif isinstance(tensor, ir.TensorProtoTensor) and tensor.raw.HasField("raw_data"):
            data = self._slice(tensor, np.frombuffer(tensor.raw.raw_data, np.uint8), 0, None)
        else:
            return tensor.numpy()
        if tensor.dtype.bitwidth < 8:
            return ir.PackedTensor(data, tensor.dtype, shape=tensor.shape).numpy()
        return data.view(tensor.dtype.numpy().newbyteorder("<")).reshape(tensor.shape.numpy())

    def _map(self, tensor: ir.ExternalTensor) -> Array:
        location = str(tensor.location)
        if location not in self.maps:
            path = self.folder / location
            if not location or Path(location).is_absolute() or ".." in Path(location).parts:
                raise BundleError(
                    f"weight {tensor.name!r}: its external data {location!r} is not a file beside the model"
                )
            if not path.is_file():
                raise BundleError(f"its external data {location!r} is missing; it must be beside the model")
            self.maps[location] = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0, np.uint8)
        return self.maps[location]

    @staticmethod
    def _slice(tensor: ir.TensorProtocol, data: Array, start: int, length: int | None) -> Array:
        available = data.size - start if length is None else min(length, data.size - start)
        if start < 0 or available < tensor.nbytes:
            raise BundleError(
                f"weight {tensor.name!r}: {tensor.nbytes} bytes expected, {max(available, 0)} there; "
                "its data is cut off"
            )
        return data[start : start + tensor.nbytes]
