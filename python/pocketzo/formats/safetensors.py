"""Read and write safetensors files. Every written tensor starts at a multiple of 64 bytes.

The format allows no gaps between tensors, so padding is explicit: ``U8`` entries named ``pocketzo.padding.N``. Any
reader can open them; :func:`read_header` omits them. The header is padded with spaces, as the format allows.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from pocketzo.errors import BundleError
from pocketzo.formats import strict_json
from pocketzo.formats.files import named
from pocketzo.formats.staging import staged_file

ALIGNMENT: Final = 64
PADDING: Final = "pocketzo.padding."
_MAX_HEADER = 100_000_000  # the limit of the reference implementation
DTYPES: Final[Mapping[str, str]] = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
}
"""NumPy's name of each element type of the format."""
FOREIGN: Final[Mapping[str, str]] = {**DTYPES, "BF16": "uint16", "F8_E4M3": "uint8", "F8_E5M2": "uint8"}
"""The same, and types that NumPy lacks by their bits."""
_CHUNK: Final = 1 << 22  # bytes; a whole number of elements of any type
_CODES: Final[Mapping[str, str]] = {name: code for code, name in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """The place of one tensor in a file.

    Attributes
    ----------
    dtype : str
        The format's name of the element type, such as ``"F32"``.
    shape : tuple of int
    start, stop : int
        Half-open range of bytes, counted from the beginning of the file.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def header_bytes(path: str | os.PathLike[str]) -> bytes:
    """Return everything before the tensors' bytes: the length field and the padded JSON header, verbatim.

    Raises
    ------
    BundleError
        If the file is too short for the header it announces.
    """
    path = Path(path)
    size = path.stat().st_size
    with named(path), path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(size - 8, _MAX_HEADER):
            raise BundleError(f"{path}: not a safetensors file, or cut off: {size} bytes cannot hold its header")
        return prefix + file.read(length)


def read_header(path: str | os.PathLike[str], types: Mapping[str, str] = DTYPES) -> dict[str, Entry]:
    """Read the place of each tensor, and check that the file is exactly as long as its header says.

    Parameters
    ----------
    path : path-like
        A safetensors file, of this module or of any other writer.
    types : mapping of str to str
        The element types that are known: :data:`DTYPES` or :data:`FOREIGN`.

    Returns
    -------
    dict of str to Entry
        In the order of the bytes, without padding entries.

    Raises
    ------
    BundleError
        If the header is damaged, tensors overlap or leave gaps, or the file is too short or too long.
    """
    path = Path(path)
    head = header_bytes(path)
    try:
        header = strict_json.parse(head[8:])
    except ValueError as error:
        raise BundleError(f"{path}: the safetensors header is damaged: {error}") from None
    header.pop("__metadata__", None)
    entries = {name: _entry(path, name, fields, len(head), types) for name, fields in header.items()}
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)))

    position = len(head)
    for name, entry in entries.items():
        if entry.start != position:
            fault = "overlaps the tensor before it" if entry.start < position else "leaves a hole before it"
            raise BundleError(f"{path}: the safetensors header is damaged: {name!r} {fault}")
        position = entry.stop
    size = path.stat().st_size
    if size != position:
        fault = "cut off" if size < position else "too long"
        raise BundleError(f"{path}: the file is {fault}: {size} bytes, its header describes {position}")
    return {name: entry for name, entry in entries.items() if not name.startswith(PADDING)}


def map_tensors(path: str | os.PathLike[str]) -> dict[str, npt.NDArray[Any]]:
    """Return the tensors of a file as read-only views of it, in the order of the bytes; see :func:`read_header`."""
    path = Path(path)
    entries = read_header(path)
    data = np.memmap(path, np.uint8, "r")
    return {
        name: data[entry.start : entry.stop].view(np.dtype(DTYPES[entry.dtype]).newbyteorder("<")).reshape(entry.shape)
        for name, entry in entries.items()
    }


def read_chunks(file: int, path: Path, entry: Entry) -> Iterator[bytes]:
    """Yield the bytes of a tensor of an open file; what is read through a mapping would stay in memory.

    Raises
    ------
    BundleError
        The file ends before.
    """
    for at in range(entry.start, entry.stop, _CHUNK):
        size = min(_CHUNK, entry.stop - at)
        data = os.pread(file, size, at)
        if len(data) < size:
            raise BundleError(f"{path}: shorter than it was a moment ago")
        yield data


def tensor_shapes(path: str | os.PathLike[str]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors of a file of any writer; see :func:`read_header`."""
    return {name: entry.shape for name, entry in read_header(path, FOREIGN).items()}


def read_floats(path: str | os.PathLike[str]) -> dict[str, npt.NDArray[np.float32]]:
    """Return the tensors of a small file of any writer as float32.

    Raises
    ------
    BundleError
        As for :func:`read_header`, or a tensor is not of floats of 16 bits or more.
    """
    path = Path(path)
    data = path.read_bytes()
    found = {}
    for name, entry in read_header(path, FOREIGN).items():
        if entry.dtype not in ("BF16", "F16", "F32", "F64"):
            raise BundleError(f"{path}: {name!r} is of type {entry.dtype}, expected BF16, F16, F32 or F64")
        array = np.frombuffer(data[entry.start : entry.stop], np.dtype(FOREIGN[entry.dtype]).newbyteorder("<"))
        if entry.dtype == "BF16":
            array = (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
        found[name] = array.reshape(entry.shape).astype(np.float32)
    return found


def write(
    path: str | os.PathLike[str],
    tensors: Iterable[tuple[str, npt.NDArray[Any]]],
    dtypes: Mapping[str, np.dtype[Any]] | None = None,
    *,
    padded: bool = True,
) -> None:
    """Write tensors in the given order, each at a multiple of 64 bytes.

    One tensor at a time is made contiguous. So views of memory-mapped files, even transposed ones, need no more memory
    than the largest tensor. The file is written under a temporary name and renamed: a reader sees the old file or the
    complete new one.

    Parameters
    ----------
    path : path-like
    tensors : iterable of (str, ndarray)
        Unique names, and arrays of a dtype that the format supports.
    dtypes : mapping of str to dtype, optional
        Storage types by name, for tensors whose storage type differs from the array's.
    padded : bool
        False for a file of other libraries, which would take padding for tensors: these then follow each other.

    Raises
    ------
    TypeError
        If the format does not support a storage type.
    ValueError
        If a name occurs twice, or is reserved by the format or for padding.
    """
    path = Path(path)
    tensors = list(tensors)
    header: dict[str, dict[str, object]] = {}
    offset = 0
    dtypes = {name: array.dtype for name, array in tensors} | dict(dtypes or {})
    for count, (name, array) in enumerate(tensors):
        dtype = dtypes[name]
        if name in header or name == "__metadata__" or name.startswith(PADDING):
            raise ValueError(f"tensor name {name!r}: expected a unique one that is not reserved")
        if dtype.name not in _CODES:
            raise TypeError(f"tensor {name!r}: dtype {dtype} cannot be stored; expected one of {', '.join(_CODES)}")
        nbytes = array.size * dtype.itemsize
        if hole := -offset % ALIGNMENT * padded:
            header[f"{PADDING}{count}"] = _fields("U8", (hole,), offset, hole)
            offset += hole
        header[name] = _fields(_CODES[dtype.name], array.shape, offset, nbytes)
        offset += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)

    with staged_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, array in tensors:
            file.write(bytes(-file.tell() % ALIGNMENT * padded))
            file.write(np.ascontiguousarray(array, dtype=dtypes[name].newbyteorder("<")).data)


def file_sha256(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with named(path), Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fields(code: str, shape: tuple[int, ...], offset: int, nbytes: int) -> dict[str, object]:
    return {"dtype": code, "shape": list(shape), "data_offsets": [offset, offset + nbytes]}


def _entry(path: Path, name: str, fields: object, base: int, types: Mapping[str, str]) -> Entry:
    match fields:
        case {"dtype": str(code), "shape": list(shape), "data_offsets": [int(start), int(stop)]} if (
            code in types
            and all(type(size) is int and size >= 0 for size in shape)
            and start >= 0
            and stop - start == prod(shape) * np.dtype(types[code]).itemsize
        ):
            return Entry(code, tuple(shape), base + start, base + stop)
    raise BundleError(f"{path}: the safetensors header is damaged, or of a type not known here, at {name!r}: {fields}")
