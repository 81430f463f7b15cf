"""Read the elements of a graph's tensors, from the graph's own file or from external data files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from pocketzo.errors import BundleError
from pocketzo.graph.weight import Array


class ExternalFiles:
    """The external data files of a graph, each mapped once.

    ``ir.ExternalTensor`` is not used to read elements: it maps the file again for each tensor, ignores the declared
    length, and refuses symbolic and hard links, which the Hugging Face cache uses.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.maps: dict[str, Array] = {}

    def read(self, tensor: ir.TensorProtocol) -> Array:
        """Return a tensor's elements; a view of the file or of the graph's own bytes if possible."""
        try:
            return self._read(tensor)
        except ValueError as error:
            raise BundleError(f"weight {tensor.name!r} cannot be read: {error}") from None
        except OSError as error:  # its external data has too long a name, or may not be read
            raise BundleError(f"weight {tensor.name!r} cannot be read: {error.filename}: {error.strerror}") from None

    def _read(self, tensor: ir.TensorProtocol) -> Array:
        if tensor.dtype == ir.DataType.UNDEFINED:
            raise BundleError(f"weight {tensor.name!r} has no element type")
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
