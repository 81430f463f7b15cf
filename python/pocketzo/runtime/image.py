"""The file of a bundle's weights that training changes, in memory."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from pocketzo.formats.bundle import FLOATS, Bundle
from pocketzo.formats.safetensors import read_header


@dataclass(frozen=True, eq=False)
class Image:
    """Memory for the bytes of :attr:`Bundle.trained_path`, except for weights that are kept elsewhere.

    Attributes
    ----------
    parts : sequence of ndarray of uint8, or str
        The file from its first byte to its last: bytes of the image, and names of weights that are kept elsewhere.
    views : mapping of str to ndarray
        The weights of the image, float32 or float16, each in its shape.
    is_whole : bool
        Whether these are all weights of the bundle.
    """

    parts: Sequence[NDArray[np.uint8] | str]
    views: Mapping[str, NDArray[Any]]
    is_whole: bool

    @classmethod
    def allocate(cls, bundle: Bundle, without: Collection[str] = ()) -> Self:
        """Allocate an image of zeros; pages become resident when they are written.

        Parameters
        ----------
        bundle : Bundle
        without : collection of str
            Weights that are kept elsewhere.
        """
        entries = read_header(bundle.trained_path)
        without = entries.keys() & without
        floats = {spec.name: spec.dtype for spec in bundle.tensors if spec.dtype in FLOATS}
        elsewhere = sum(entries[name].stop - entries[name].start for name in without)
        memory = _allocate(bundle.trained_path.stat().st_size - elsewhere)
        parts: list[NDArray[np.uint8] | str] = []
        views: dict[str, NDArray[Any]] = {}
        begin = skipped = 0  # in the file, where the part begins; and bytes before it that are elsewhere
        for name, entry in entries.items():
            if name in without:
                parts += [memory[begin - skipped : entry.start - skipped], name]
                begin = entry.stop
                skipped += entry.stop - entry.start
            elif name in floats:
                view = memory[entry.start - skipped : entry.stop - skipped]
                views[name] = view.view(floats[name]).reshape(entry.shape)
        parts.append(memory[begin - skipped :])
        return cls(parts, views, not without and bundle.adapter is None)

    @cached_property
    def values(self) -> Mapping[str, ort.OrtValue]:
        """The views as values for sessions, which use their memory: the image must outlive the sessions."""
        return {name: ort.OrtValue.ortvalue_from_numpy(view) for name, view in self.views.items()}


def _allocate(size: int) -> NDArray[np.uint8]:
    # Anonymous and private: the file's own pages would be dropped and read again under pressure, and a shared mapping
    # gets no huge pages.
    flags = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    memory = mmap.mmap(-1, max(size, 1), **flags)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)[:size]
