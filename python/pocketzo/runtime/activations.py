"""A cache of activations on disk: the values at the cut of each example that a run or an earlier one has seen.

A cache is a folder with a folder for each cut and dtype, which holds segments (:mod:`pocketzo.formats.activations`).
Runs only add segments and remove whole ones, so that several may use a cache at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import onnxruntime as ort

from pocketzo.errors import CacheError
from pocketzo.formats.activations import SUFFIX, Dtype, Layout, New, Segment, StoredValue, write_segment
from pocketzo.formats.files import make_folder
from pocketzo.machine.memory import megabytes
from pocketzo.runtime.cut import Cut
from pocketzo.runtime.measure import ALL_TOKENS

if TYPE_CHECKING:
    from numpy.typing import NDArray

try:
    import fcntl
except ImportError:  # no such module on Windows
    _CAN_LOCK = False
else:
    _CAN_LOCK = True

LIMIT: Final = 4_000_000_000
"""Bytes that a cache may take, unless another figure is given."""

_SEGMENT: Final = 32 << 20  # bytes that are gathered in memory before they are written
_LOCK: Final = "lock"


def default_folder() -> Path:
    """Return the folder of the cache that all runs of a user share."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "pocketzo" / "activations"


def layout_of(cut: Cut, dtype: Dtype) -> Layout:
    """Return how the values of a cut are stored. The version of onnxruntime counts, as it decides roundings."""
    front = hashlib.sha256(cut.digest() + ort.__version__.encode()).digest()
    values = []
    for kept in cut.values:
        axes = kept.sizes.axes if kept.sizes.axes[0] == ALL_TOKENS else kept.sizes.axes[1:]
        sizes = tuple(axis if isinstance(axis, int) else None for axis in axes)
        values.append(StoredValue(kept.name, kept.sizes.dtype.name, sizes))
    return Layout(front, dtype, tuple(values))


class ActivationCache:
    """Keeps values at the cut of a graph in a folder, and some not yet written ones in memory.

    Parameters
    ----------
    folder : Path
        Of the cache; it is created, for its owner only, if it does not exist.
    layout : Layout
        See :func:`layout_of`.
    limit : int
        Bytes of the whole cache. Segments of other cuts that were not used for the longest time are removed to stay
        within it.

    Attributes
    ----------
    folder : Path
    layout : Layout
    limit : int
    is_full : bool
        Whether the limit, or the disk, left no room for some values, which are computed anew each time.
    error : OSError or None
        Why the disk took no more.

    Raises
    ------
    OSError
        The folder cannot be created or read.
    """

    def __init__(self, folder: Path, layout: Layout, limit: int = LIMIT) -> None:
        self.folder = folder
        self.layout = layout
        self.limit = limit
        self.is_full = False
        self.error: OSError | None = None
        self._own = folder / f"{layout.front[:16].hex()}-{layout.dtype}"
        self._at: dict[bytes, Segment] = {}
        self._new: dict[bytes, New] = {}
        self._size = 0
        for path in (folder, self._own):
            make_folder(path.parent)
            with contextlib.suppress(FileExistsError):
                path.mkdir(0o700)
        self._seen: set[Path] = set()
        self._scan()

    @property
    def dtype(self) -> Dtype:
        """How elements are stored."""
        return self.layout.dtype

    def __len__(self) -> int:
        return len(self._at) + len(self._new)

    def get(self, key: bytes) -> list[NDArray[Any]] | None:
        """Return the values of an example; None if there are none."""
        if key in self._new:
            tokens, data = self._new[key]
            return self.layout.decode(memoryview(data), tokens)
        segment = self._at.get(key)
        if segment is None:
            return None
        try:
            return segment.read(key)
        except CacheError as error:
            self._drop(segment, error)
            return None

    def put(self, key: bytes, tokens: int, values: Any) -> list[NDArray[Any]]:
        """Keep the values of an example of so many tokens, if there is room; return them as they will be read."""
        data = self.layout.encode(values)
        if not self.is_full:
            self._new[key] = New(tokens, data)
            self._size += len(data)
            if self._size >= _SEGMENT:
                self.flush()
        return self.layout.decode(memoryview(data), tokens)

    def flush(self) -> None:
        """Write what is in memory only. If that fails, a warning says so, and nothing more is kept."""
        if not self._new:
            return
        path = self._own / f"{secrets.token_hex(8)}{SUFFIX}"
        new, size = self._new, self._size + 128 * len(self._new) + 4096
        self._new, self._size = {}, 0
        try:
            with self._locked():
                self._make_room(size)
                if self.is_full:
                    return
                write_segment(path, self.layout, new)
        except OSError as error:
            self.is_full, self.error = True, error
            warnings.warn(f"{error}: no more activations are kept; they are computed anew each time", stacklevel=3)
            return
        self._add(path)

    def _scan(self) -> None:
        for path in sorted(self._own.glob(f"*{SUFFIX}")):
            if path not in self._seen:
                self._add(path)

    def _add(self, path: Path) -> None:
        self._seen.add(path)
        try:
            segment = Segment(path)
        except FileNotFoundError:  # another run has removed it
            return
        except CacheError as error:
            warnings.warn(f"{error}; the segment is removed, and its examples are computed anew", stacklevel=4)
            path.unlink(missing_ok=True)
            return
        if segment.layout != self.layout:
            return
        with contextlib.suppress(OSError):
            os.utime(path)  # the last use
        for key in segment.entries:
            self._at.setdefault(key, segment)

    def _drop(self, segment: Segment, error: CacheError) -> None:
        warnings.warn(f"{error}; the segment is removed, and its examples are computed anew", stacklevel=5)
        self._at = {key: other for key, other in self._at.items() if other is not segment}
        segment.path.unlink(missing_ok=True)

    def _make_room(self, size: int) -> None:
        found = sorted(segments(self.folder), key=lambda item: item[1].st_mtime)
        total = sum(state.st_size for _, state in found)
        for path, state in found:
            if total + size <= self.limit:
                return
            if path.parent != self._own:
                path.unlink(missing_ok=True)
                total -= state.st_size
        if total + size > self.limit:
            self.is_full = True
            warnings.warn(
                f"{self.folder}: the limit of {megabytes(self.limit)} leaves no room for more activations, which are "
                "computed anew each time: raise --cache-limit",
                stacklevel=6,
            )

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock of the cache, by which only one process at a time writes and removes."""
        if not _CAN_LOCK:
            yield
            return
        file = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
            yield
        finally:
            os.close(file)


def segments(folder: Path) -> list[tuple[Path, os.stat_result]]:
    """Return the segments of a cache, with what the system says of each."""
    found = []
    for path in folder.glob(f"*/*{SUFFIX}"):
        with contextlib.suppress(FileNotFoundError):
            found.append((path, path.stat()))
    return found


def clear(folder: Path) -> tuple[int, int]:
    """Remove all segments of a cache, and return how many there were, and their bytes."""
    found = segments(folder)
    for path, _ in found:
        path.unlink(missing_ok=True)
    for path in {path.parent for path, _ in found}:
        with contextlib.suppress(OSError):
            path.rmdir()
    return len(found), sum(state.st_size for _, state in found)
