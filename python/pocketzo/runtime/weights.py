"""The weights of a bundle in memory: a session reads them, the kernels write them."""

from __future__ import annotations

import hashlib
import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pocketzo._core import Packing
from pocketzo.errors import BundleError
from pocketzo.formats.bundle import FLOATS, Bundle
from pocketzo.formats.safetensors import read_chunks
from pocketzo.formats.staging import staged_file
from pocketzo.runtime.image import Image
from pocketzo.runtime.layout import Location

_CHUNK = 1 << 22  # elements that are copied between a file and prepacked memory at a time


class Weights(Mapping[str, NDArray[Any]]):
    """Every weight by name. ``weights[name]`` is a copy; ``weights[name] = array`` writes to what the session reads.

    Arrays are of the bundle's type, float32 or float16.

    Between the steps of a training loop a pass over the weights may be pending. Every access applies it first.

    Parameters
    ----------
    bundle : Bundle
        The names and shapes of the weights; their bytes come by :meth:`read`.
    image : Image, optional
        Memory of the weights in the plain layout; by default all of them, allocated now.
    locations : mapping of str to Location, optional
        Prepacked memory: of weights that are not in the image, and a second copy of some that are.

    Weights that are in neither stay in the bundle's files, which are kept open. They are read from there, and are not
    written.
    """

    def __init__(
        self, bundle: Bundle, image: Image | None = None, locations: Mapping[str, Location] | None = None
    ) -> None:
        self.image = Image.allocate(bundle) if image is None else image
        self.locations = dict(locations or {})
        self._path = bundle.trained_path
        self._specs = {spec.name: spec for spec in bundle.tensors if spec.dtype in FLOATS}
        self._places = bundle.places
        left = {part for part in self.image.parts if isinstance(part, str)} - self.locations.keys()
        paths = {path for name, (path, _) in self._places.items() if name in left or path != self._path}
        self._files = {path: os.open(path, os.O_RDONLY) for path in paths}
        for file in self._files.values():
            weakref.finalize(self, os.close, file)
        self._finish: Callable[[], None] = lambda: None

    # ---- passes that are pending ----------------------------------------------------------------------------------

    def defer(self, finish: Callable[[], None]) -> None:
        """Have ``finish`` apply what is pending as soon as the weights are read or written.

        It is called at every access, until another one replaces it, and does nothing when nothing is pending.
        """
        self.flush()
        self._finish = finish

    def flush(self) -> None:
        """Apply what is pending; all that reads or writes the weights does so first."""
        self._finish()

    # ---- by name --------------------------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> NDArray[Any]:
        self.flush()
        spec = self._specs[name]
        if name in self.image.views:
            array = self.image.views[name].copy()
        elif name in self.locations:
            array = np.empty(spec.shape, np.float32)
            self.locations[name].packing.unpack(self.locations[name].memory, array, 0)
        else:
            array = np.concatenate([block.copy() for block in self.blocks(name)]).reshape(spec.shape)
        array.flags.writeable = False
        return array

    def __setitem__(self, name: str, value: ArrayLike) -> None:
        self.flush()
        shape = self._specs[name].shape
        if np.ndim(value) and np.shape(value) != shape:
            raise ValueError(f"{name} has shape {list(shape)}, got {list(np.shape(value))}")
        if name not in self.image.views and name not in self.locations:
            raise ValueError(f"{name} is frozen: it stays in {self._places[name][0]}, and nothing is written there")
        array = np.empty(shape, self._specs[name].dtype)
        np.copyto(array, value, casting="same_kind")
        if name in self.image.views:
            self.image.views[name][...] = array
        if name in self.locations:
            self.locations[name].packing.pack(self.locations[name].memory, array, 0)

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)

    # ---- memory ---------------------------------------------------------------------------------------------------

    def segments(self, name: str) -> list[tuple[NDArray[Any], int, Packing | None]]:
        """Return all memory in which a weight is kept, as :class:`_core.Segments` takes it."""
        number = self._specs[name].id
        segments: list[tuple[NDArray[Any], int, Packing | None]] = []
        if name in self.image.views:
            segments.append((self.image.views[name], number, None))
        if name in self.locations:
            segments.append((self.locations[name].memory, number, self.locations[name].packing))
        return segments

    def blocks(self, name: str) -> Iterator[NDArray[Any]]:
        """Yield a weight as vectors of consecutive elements; each may be overwritten by the next."""
        self.flush()
        if name in self.image.views:
            values = self.image.views[name].reshape(-1)
            for at in range(0, values.size, _CHUNK):
                yield values[at : at + _CHUNK]
        elif name in self.locations:
            location = self.locations[name]
            for at, chunk in _chunks(location):
                location.packing.unpack(location.memory, chunk, at)
                yield chunk
        else:
            for data in self._stored(name):
                yield np.frombuffer(data, self._specs[name].dtype)

    def _stored(self, name: str) -> Iterator[bytes]:
        """Yield a tensor of a file of the bundle: of the one that was opened, also if another has its name by now."""
        path, entry = self._places[name]
        yield from read_chunks(self._files[path], path, entry)

    def fill(self, name: str, value: float) -> None:
        """Write one value to all of a weight, and to the padding of prepacked memory."""
        self.flush()
        for memory, _, _ in self.segments(name):
            memory[...] = value

    @property
    def nbytes(self) -> int:
        """Size of the weights' memory in bytes."""
        plain = sum(part.size for part in self.image.parts if not isinstance(part, str))
        return plain + sum(location.memory.nbytes for location in self.locations.values())

    # ---- files ----------------------------------------------------------------------------------------------------

    def read(self, path: Path | None = None) -> None:
        """Read all weights that training may change from the bundle, or from another file with the same header.

        Raises
        ------
        BundleError
            The file cannot be read, or is not as long as the bundle's.
        """
        self.flush()
        path = self._path if path is None else path
        try:
            expected = self._path.stat().st_size
            with path.open("rb", buffering=0) as file:
                if path.stat().st_size != expected:
                    raise BundleError(f"{path}: expected {expected} bytes, the size of the bundle's weights")
                for part in self.image.parts:
                    if isinstance(part, str) and part not in self.locations:
                        file.seek(self._places[part][1].stop)
                    elif isinstance(part, str):
                        _read_packed(file, self.locations[part])
                    else:
                        _read_into(file, part)
        except OSError as error:
            raise BundleError(f"{path}: cannot be read: {error.strerror}") from None
        for name, location in self.locations.items():
            if name in self.image.views:
                location.packing.pack(location.memory, self.image.views[name], 0)

    def _bytes(self) -> Iterator[memoryview]:
        """Yield the bundle's trained file as it is now, in chunks; each is overwritten by the next."""
        self.flush()
        for part in self.image.parts:
            if not isinstance(part, str):
                for at in range(0, part.size, 4 * _CHUNK):
                    yield part[at : at + 4 * _CHUNK].data
            elif part in self.locations:
                location = self.locations[part]
                for at, chunk in _chunks(location):
                    location.packing.unpack(location.memory, chunk, at)
                    yield chunk.view(np.uint8).data
            else:
                for data in self._stored(part):
                    yield memoryview(data)

    def sha256(self) -> str:
        """Return the SHA-256 of the file that :meth:`save` would write now."""
        digest = hashlib.sha256()
        for chunk in self._bytes():
            digest.update(chunk)
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """Write what takes the place of :attr:`Bundle.trained_path`, beside it first and then renamed."""
        with staged_file(path) as file:
            for chunk in self._bytes():
                file.write(chunk)


def _chunks(location: Location) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Yield logical indices and buffers that together are as long as a matrix."""
    size = location.packing.rows * location.packing.columns
    buffer = np.empty(min(size, _CHUNK), np.float32)
    for at in range(0, size, _CHUNK):
        yield at, buffer[: size - at]


def _read_packed(file: BinaryIO, location: Location) -> None:
    for at, chunk in _chunks(location):
        _read_into(file, chunk.view(np.uint8))
        location.packing.pack(location.memory, chunk, at)


def _read_into(file: Any, memory: NDArray[np.uint8]) -> None:
    at = 0
    while at < memory.size:
        got = file.readinto(memory.data[at : at + (1 << 28)])
        if not got:
            raise BundleError(f"{file.name}: shorter than it was a moment ago")
        at += got
