"""The weights of a bundle in memory: one buffer that is the image of ``weights.safetensors``."""

from __future__ import annotations

import contextlib
import hashlib
import mmap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pocketzo.bundle import Bundle
from pocketzo.errors import BundleError
from pocketzo.files import atomic_file
from pocketzo.safetensors import read_header


class Weights(Mapping[str, NDArray[np.float32]]):
    """Writable views of every weight, by name, onto one buffer.

    The buffer has the layout of the file that it was read from, so that saving is writing it out.

    Parameters
    ----------
    bundle : Bundle
        Where the names, shapes and bytes come from.
    path : Path, optional
        Another file of the same layout, such as a snapshot, in place of the bundle's own.
    """

    def __init__(self, bundle: Bundle, path: Path | None = None) -> None:
        self._bundle = bundle
        path = bundle.weights_path if path is None else path
        size = path.stat().st_size
        flags = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
        # Anonymous and private: the file's pages would be dropped and read again under pressure, and a shared mapping
        # gets no huge pages.
        memory = mmap.mmap(-1, size, **flags)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without them
                memory.madvise(mmap.MADV_HUGEPAGE)
        self._image = np.frombuffer(memory, np.uint8)
        self._views = {}
        self._finish: Callable[[], None] = lambda: None
        for name, entry in read_header(bundle.weights_path).items():
            if entry.dtype == "F32":
                self._views[name] = self._image[entry.start : entry.stop].view(np.float32).reshape(entry.shape)
        self.read(path)

    def defer(self, finish: Callable[[], None]) -> None:
        """Have ``finish`` do what is owed to the weights as soon as anyone looks at them.

        It is called at every look, until another one takes its place, and does nothing when nothing is owed.
        """
        self.settle()
        self._finish = finish

    def settle(self) -> None:
        """Do what is owed; whatever reads or writes the weights does so first."""
        self._finish()

    def read(self, path: Path | None = None) -> None:
        """Read all bytes again, from the bundle or from a file of the same layout."""
        self.settle()
        path = self._bundle.weights_path if path is None else path
        try:
            with path.open("rb", buffering=0) as file:
                at = 0
                while at < self._image.size:
                    got = file.readinto(self._image.data[at : at + (1 << 28)])
                    if not got:
                        break
                    at += got
                if at != self._image.size or file.read(1):
                    raise BundleError(f"{path}: expected {self._image.size} bytes, the size of the bundle's weights")
        except OSError as error:
            raise BundleError(f"{path}: cannot be read: {error.strerror}") from None

    def sha256(self) -> str:
        """Return the SHA-256 of the file that :meth:`save` would write now."""
        self.settle()
        return hashlib.sha256(self._image.data).hexdigest()

    def save(self, path: Path) -> None:
        """Write the weights to a file, beside it first and then renamed."""
        self.settle()
        with atomic_file(path) as file:
            for at in range(0, self._image.size, 1 << 28):
                file.write(self._image.data[at : at + (1 << 28)])

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        self.settle()
        return self._views[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._views)

    def __len__(self) -> int:
        return len(self._views)

    @property
    def nbytes(self) -> int:
        """Size of the buffer in bytes."""
        return int(self._image.size)
