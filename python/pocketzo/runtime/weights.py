"""The weights of a bundle in memory: together the image of ``weights.safetensors``."""

from __future__ import annotations

import contextlib
import hashlib
import mmap
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pocketzo._core import TERM as TERM_DTYPE
from pocketzo._core import Packing, Segments
from pocketzo.errors import BundleError
from pocketzo.formats.bundle import FLOATS, Bundle, TensorSpec
from pocketzo.formats.files import atomic_file
from pocketzo.formats.safetensors import read_header
from pocketzo.runtime.layout import Location

_PIECE = 1 << 22  # elements that pass between a file and packed memory at a time


class Weights(Mapping[str, NDArray[Any]]):
    """Every weight by name. ``weights[name]`` is a copy; ``weights[name] = array`` writes to what the session reads.

    Arrays are of the bundle's type, float32 or float16.

    Weights lie in the order of their file, so that saving is writing out, but for those that are packed. Between the
    steps of a training loop they may be shifted along a direction, and whoever looks has them put right first.

    Parameters
    ----------
    bundle : Bundle
        Where the names, shapes and bytes come from.
    packed : collection of str
        Which weights are only kept packed, in places that :meth:`attach` brings.
    """

    def __init__(self, bundle: Bundle, packed: Collection[str] = ()) -> None:
        self._bundle = bundle
        self._locations: dict[str, Location] = {}
        self._finish: Callable[[], None] = lambda: None
        self._specs = {spec.name: spec for spec in bundle.tensors if spec.dtype in FLOATS}
        spans = self._spans(packed)
        plain = sum(stop - start for name, start, stop in spans if name is None)
        flags = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
        # Anonymous and private: the file's pages would be dropped and read again under pressure, and a shared mapping
        # gets no huge pages.
        memory = mmap.mmap(-1, max(plain, 1), **flags)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without them
                memory.madvise(mmap.MADV_HUGEPAGE)
        image = np.frombuffer(memory, np.uint8)[:plain]
        self._parts: list[tuple[str | None, NDArray[np.uint8]]] = []  # of the file, in order: packed, or plain bytes
        self._views: dict[str, NDArray[Any]] = {}
        entries = read_header(bundle.weights_path)
        at = 0
        for name, start, stop in spans:
            if name is None:
                for inside, entry in entries.items():
                    if inside in self._specs and start <= entry.start and entry.stop <= stop:
                        view = image[at + entry.start - start : at + entry.stop - start]
                        self._views[inside] = view.view(self._specs[inside].dtype).reshape(entry.shape)
                self._parts.append((None, image[at : at + stop - start]))
                at += stop - start
            else:
                self._parts.append((name, image[:0]))

    def _spans(self, packed: Collection[str]) -> list[tuple[str | None, int, int]]:
        """Cut the file into weights that are only kept packed, by name, and what lies between them."""
        spans: list[tuple[str | None, int, int]] = []
        at = 0
        for name, entry in sorted(read_header(self._bundle.weights_path).items(), key=lambda item: item[1].start):
            if name in packed:
                spans += [(None, at, entry.start), (name, entry.start, entry.stop)]
                at = entry.stop
        spans.append((None, at, self._bundle.weights_path.stat().st_size))
        return [span for span in spans if span[1] < span[2]]

    def attach(self, locations: Mapping[str, Location]) -> None:
        """Bring the memory of the packed weights, also of those that are kept in both ways."""
        self._locations = dict(locations)

    # ---- whoever looks --------------------------------------------------------------------------------------------

    def defer(self, finish: Callable[[], None]) -> None:
        """Have ``finish`` apply what is pending as soon as the weights are read or written.

        It is called at every access, until another one takes its place, and does nothing when nothing is pending.
        """
        self.flush()
        self._finish = finish

    def flush(self) -> None:
        """Apply what is pending; whatever reads or writes the weights does so first."""
        self._finish()

    def __getitem__(self, name: str) -> NDArray[Any]:
        self.flush()
        if name in self._views:
            array = self._views[name].copy()
        else:
            location = self._locations[name]
            array = np.empty(self._specs[name].shape, np.float32)
            location.packing.unpack(location.memory, array, 0)
        array.flags.writeable = False
        return array

    def __setitem__(self, name: str, value: ArrayLike) -> None:
        self.flush()
        shape = self._specs[name].shape
        if np.ndim(value) and np.shape(value) != shape:
            raise ValueError(f"{name} has shape {list(shape)}, got {list(np.shape(value))}")
        array = np.empty(shape, self._specs[name].dtype)
        np.copyto(array, value, casting="same_kind")
        if name in self._views:
            self._views[name][...] = array
        if name in self._locations:
            self._locations[name].packing.pack(self._locations[name].memory, array, 0)

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)

    # ---- what the kernels and the session work on -----------------------------------------------------------------

    def segments(self, name: str) -> list[tuple[NDArray[Any], int, Packing | None]]:
        """Return all memory in which a weight is kept, as :class:`_core.Segments` takes it."""
        number = self._specs[name].id
        segments: list[tuple[NDArray[Any], int, Packing | None]] = []
        if name in self._views:
            segments.append((self._views[name], number, None))
        if name in self._locations:
            segments.append((self._locations[name].memory, number, self._locations[name].packing))
        return segments

    @property
    def plain(self) -> Mapping[str, NDArray[Any]]:
        """The memory of the weights that are not packed, and of those that are kept in both ways."""
        return self._views

    def fill_with_noise(self, tensor: TensorSpec, draw: int) -> None:
        """Write noise of a size that keeps activations moderate, so that every weight matters: a head may be zeros."""
        shape = tensor.shape
        terms = np.zeros(1, TERM_DTYPE)
        terms["draw"] = draw
        terms["count"] = 1
        factors = shape[:1] if len(shape) == 2 else shape[1:]
        terms["scale"][0, 0] = 0.5 if len(shape) < 2 else 1 / np.sqrt(np.prod(factors))
        self.fill(tensor.name, 0)
        Segments(self.segments(tensor.name)).apply(terms)

    def fill(self, name: str, value: float) -> None:
        """Write one value to all of a weight, and to the padding of a packed one."""
        self.flush()
        for memory, _, _ in self.segments(name):
            memory[...] = value

    # ---- files ----------------------------------------------------------------------------------------------------

    def read(self, path: Path | None = None) -> None:
        """Read all bytes again, from the bundle or from a file of the same layout."""
        self.flush()
        path = self._bundle.weights_path if path is None else path
        try:
            expected = self._bundle.weights_path.stat().st_size
            with path.open("rb", buffering=0) as file:
                if path.stat().st_size != expected:
                    raise BundleError(f"{path}: expected {expected} bytes, the size of the bundle's weights")
                for name, part in self._parts:
                    if name is None:
                        _read_into(file, part)
                    else:
                        self._read_packed(file, self._locations[name])
        except OSError as error:
            raise BundleError(f"{path}: cannot be read: {error.strerror}") from None
        for name, location in self._locations.items():
            if name in self._views:
                location.packing.pack(location.memory, self._views[name], 0)

    @staticmethod
    def _read_packed(file: Any, location: Location) -> None:
        size = location.packing.rows * location.packing.columns
        buffer = np.empty(min(size, _PIECE), np.float32)
        for at in range(0, size, _PIECE):
            piece = buffer[: size - at]
            _read_into(file, piece.view(np.uint8))
            location.packing.pack(location.memory, piece, at)

    def _bytes(self) -> Iterator[memoryview]:
        """Yield the file that the weights make, piece by piece; each is overwritten by the next."""
        self.flush()
        for name, part in self._parts:
            if name is None:
                for at in range(0, part.size, 4 * _PIECE):
                    yield part[at : at + 4 * _PIECE].data
                continue
            location = self._locations[name]
            size = location.packing.rows * location.packing.columns
            buffer = np.empty(min(size, _PIECE), np.float32)
            for at in range(0, size, _PIECE):
                piece = buffer[: size - at]
                location.packing.unpack(location.memory, piece, at)
                yield piece.view(np.uint8).data

    def sha256(self) -> str:
        """Return the SHA-256 of the file that :meth:`save` would write now."""
        digest = hashlib.sha256()
        for piece in self._bytes():
            digest.update(piece)
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """Write the weights to a file, beside it first and then renamed."""
        with atomic_file(path) as file:
            for piece in self._bytes():
                file.write(piece)

    @property
    def nbytes(self) -> int:
        """Memory that the weights take, in bytes."""
        return sum(part.size for _, part in self._parts) + sum(
            location.memory.nbytes for location in self._locations.values()
        )


def _read_into(file: Any, memory: NDArray[np.uint8]) -> None:
    at = 0
    while at < memory.size:
        got = file.readinto(memory.data[at : at + (1 << 28)])
        if not got:
            raise BundleError(f"{file.name}: shorter than it was a moment ago")
        at += got
