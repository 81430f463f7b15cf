"""A GGUF file: its facts and its tensors, after a check that all of them can be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np
import numpy.typing as npt

from pocketzo.errors import Error, first_line

TYPES: Final = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q6_K")
"""The tensor types that are read."""


class GgufFile:
    """The facts and the memory-mapped tensors of a GGUF file.

    Attributes
    ----------
    path : Path
    architecture : str
        ``general.architecture``: ``llama``, ``gemma3`` and so on.
    tensors : dict of str to ReaderTensor
        By GGUF name. ``data`` is ``[rows, bytes of a row]`` in quantised types.

    Raises
    ------
    Error
        If the file is damaged, is one part of several, is big-endian, or has a tensor of another type than `TYPES`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        try:
            self._reader = gguf.GGUFReader(path)
        except (ValueError, LookupError, OverflowError, MemoryError) as error:
            raise Error(
                f"{path}: damaged or not a GGUF file ({type(error).__name__}: {first_line(error)}); download it again"
            ) from error
        self.tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self.architecture = str(self.fact("general.architecture", ""))
        if self._reader.endianess == gguf.GGUFEndian.BIG:
            raise Error(
                f"{path}: expected a little-endian file, got a big-endian one; convert it with gguf-convert-endian"
            )
        if (parts := int(self.fact("split.count", 1))) > 1:
            raise Error(f"{path}: one of {parts} parts; join them with llama-gguf-split --merge")
        self._check_types()

    def fact(self, key: str, default: Any = None) -> Any:
        """Return an entry of the metadata; `default` if there is none."""
        field = self._reader.fields.get(key)
        return default if field is None else field.contents()

    def model_fact(self, key: str, default: Any = None) -> Any:
        """Return an entry of the architecture's own: ``attention.head_count`` for ``llama.attention.head_count``."""
        return self.fact(f"{self.architecture}.{key}", default)

    def array(self, name: str, data: npt.NDArray[Any] | None = None) -> npt.NDArray[np.float32]:
        """Dequantise a tensor to float32, in the order of rows of `data` if that is given."""
        tensor = self.tensors[name]
        array = gguf.quants.dequantize(tensor.data if data is None else data, tensor.tensor_type)
        return np.ascontiguousarray(array, np.float32)

    def _check_types(self) -> None:
        for name, tensor in self.tensors.items():
            if tensor.tensor_type.name not in TYPES:
                raise Error(
                    f"{self.path}: tensor {name!r} is of type {tensor.tensor_type.name}, which is not supported; "
                    f"expected one of {', '.join(TYPES)}: requantise the file with llama-quantize"
                )
