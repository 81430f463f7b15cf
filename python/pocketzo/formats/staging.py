"""Files and folders that are written beside their place and renamed: a reader sees a complete one or none.

What is being written is named ``.pocketzo-`` and 16 hexadecimal digits. A file of that name becomes the target itself.
A folder of that name belongs to one writer and contains

=========  ===========================================================================================================
``lock``   a file
``new``    what is being written; becomes the target
``swap``   during a replacement: a folder of the target's name, the complete new one or the old one
=========  ===========================================================================================================

The writer holds a ``flock`` on the file, or on ``lock``, until it ends. The kernel releases it however the process
dies, and enforces it for all containers and (on NFS) all machines that share the file system; a process id in a name
says nothing there. So :func:`sweep`, with which every writer begins, removes exactly what no process writes any more.
It does nothing where the system has no ``flock``.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Final

from pocketzo.formats.exchange import exchange
from pocketzo.formats.files import named, sync_file, sync_folder

try:
    import fcntl
except ImportError:  # no such module on Windows
    _CAN_LOCK = False
else:
    _CAN_LOCK = True

__all__ = ["foreign", "is_staged", "remove_folder", "scratch_folder", "staged_file", "staged_folder", "sweep"]

_PREFIX: Final = ".pocketzo-"
_STAGED: Final = re.compile(rf"{re.escape(_PREFIX)}[0-9a-f]{{16}}")
_LOCK, _NEW, _SWAP = "lock", "new", "swap"


def is_staged(name: str) -> bool:
    """Whether a file or folder of this name is one that a writer has not finished."""
    return _STAGED.fullmatch(name) is not None


@contextmanager
def staged_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file that becomes ``path`` at the end of the block, on storage too; it is removed if the block fails."""
    sweep(path.parent)
    with _errors_at(path):
        beside, descriptor = _create_file(path.parent)
        try:
            with named(path), os.fdopen(descriptor, "wb") as file:
                yield file
                file.flush()
                os.fsync(file)
                if not _CAN_LOCK:  # Windows renames no open file
                    file.close()
                beside.replace(path)  # locked until it has its name
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


@contextmanager
def staged_folder(out: Path, own: Collection[str], *, replace: bool) -> Iterator[Path]:
    """Yield an empty folder that becomes ``out`` at the end of the block, on storage too.

    At every moment ``out`` is the old folder or the complete new one. What the block writes is removed if it fails.

    Parameters
    ----------
    out : Path
        Absolute; its parent exists.
    own : collection of str
        The names of the files of which a folder of this kind consists. Of an old folder, only these are removed. A file
        of another name moves on into the new folder.
    replace : bool
        Whether ``out`` may exist.

    Raises
    ------
    FileExistsError
        If ``out`` exists at the end, and ``replace`` is false.
    """
    with _errors_at(out), _container(out.parent, own) as container:
        new = container / _NEW
        new.mkdir()
        yield new
        for path in new.iterdir():
            sync_file(path)
        sync_folder(new)
        if os.path.lexists(out):
            if not replace:
                raise FileExistsError(f"{out}: already exists")
            _replace(out, container)
        else:
            new.rename(out)
        sync_folder(out.parent)


@contextmanager
def scratch_folder(parent: Path | None = None) -> Iterator[Path]:
    """Yield an empty folder that is removed at the end, in ``parent`` or in the system's folder of temporary files."""
    with _container(parent or Path(tempfile.gettempdir())) as container:
        new = container / _NEW
        new.mkdir()
        yield new


def foreign(folder: Path, own: Collection[str]) -> list[str]:
    """Return the names in a folder that are no files of the names ``own``."""
    sweep(folder)
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if not (entry.name in own and entry.is_file()))


def remove_folder(path: Path, own: Collection[str]) -> None:
    """Remove the files ``own`` of a folder, in this order, and the folder unless it holds something else."""
    with suppress(OSError):
        for name in own:
            (path / name).unlink(missing_ok=True)
        path.rmdir()


def sweep(folder: Path, own: Collection[str] = ()) -> None:
    """Remove what writers that were killed have left in a folder; what a running one writes stays.

    A replacement that was interrupted between two renames is undone. See :func:`staged_folder` for ``own``.
    """
    if not _CAN_LOCK:
        return
    with suppress(OSError), os.scandir(folder) as entries:
        for path in [Path(entry.path) for entry in entries if is_staged(entry.name)]:
            with suppress(OSError):  # it is gone, or may not be removed
                _sweep_one(path, own)


# ---- one writer ------------------------------------------------------------------------------------------------------


class _BusyError(Exception):
    """Another process holds the lock."""


def _create_file(folder: Path) -> tuple[Path, int]:
    while True:
        path = folder / f"{_PREFIX}{secrets.token_hex(8)}"
        with suppress(_BusyError):  # another process sweeps it already
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
            return path, _lock(descriptor)


@contextmanager
def _container(parent: Path, own: Collection[str] = ()) -> Iterator[Path]:
    """Create a writer's folder, and remove it at the end."""
    sweep(parent, own)
    while True:
        container = parent / f"{_PREFIX}{secrets.token_hex(8)}"
        container.mkdir(0o700)
        try:
            descriptor = _lock(os.open(container / _LOCK, os.O_RDWR | os.O_CREAT, 0o600))
        except (_BusyError, FileNotFoundError):  # another process sweeps it already
            continue
        except BaseException:
            with suppress(OSError):
                _clear(container, own)
            raise
        break
    try:
        yield container
    finally:
        with suppress(OSError):
            _clear(container, own)
        os.close(descriptor)


def _lock(descriptor: int) -> int:
    """Lock an open file of this writer, and return it; without a lock where the file system has none."""
    try:
        if _CAN_LOCK:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise _BusyError from None
            except OSError:
                return descriptor
            if not os.fstat(descriptor).st_nlink:  # swept before it was locked
                raise _BusyError
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _sweep_one(path: Path, own: Collection[str]) -> None:
    found = path.lstat()
    is_folder = stat.S_ISDIR(found.st_mode)
    if not is_folder and not stat.S_ISREG(found.st_mode):
        return
    if path.parent.stat().st_mode & stat.S_ISVTX and found.st_uid != os.geteuid():  # another user's, in /tmp
        return
    if is_folder and not own and (path / _SWAP).exists():  # of a kind of folder that the caller does not know
        return
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK
    descriptor = os.open(path / _LOCK, flags | os.O_CREAT, 0o600) if is_folder else os.open(path, flags)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # an OSError where a process holds it
        if is_folder:
            _clear(path, own)
        else:
            path.unlink()
    finally:
        os.close(descriptor)


def _clear(container: Path, own: Collection[str]) -> None:
    """Remove a writer's folder, after its ``swap`` has moved to the target's place if that is empty."""
    shutil.rmtree(container / _NEW, ignore_errors=True)
    if (container / _SWAP).is_dir():
        for old in (container / _SWAP).iterdir():
            home = container.parent / old.name
            if not os.path.lexists(home):
                old.rename(home)
                sync_folder(home.parent)
                continue
            for path in old.iterdir():
                if path.name in own:
                    path.unlink()
                elif not os.path.lexists(home / path.name):  # it came while the folder was being replaced
                    path.rename(home / path.name)
            old.rmdir()
        (container / _SWAP).rmdir()
    (container / _LOCK).unlink(missing_ok=True)
    container.rmdir()


def _replace(out: Path, container: Path) -> None:
    new, swap = container / _NEW, container / _SWAP / out.name
    swap.parent.mkdir()
    new.rename(swap)
    if exchange(swap, out):
        return
    swap.rename(new)
    for folder in (swap.parent, container, out.parent):  # the old folder can be found again from here on
        sync_folder(folder)
    out.rename(swap)
    sync_folder(out.parent)
    new.rename(out)


@contextmanager
def _errors_at(path: Path) -> Iterator[None]:
    """In an ``OSError`` of the block, name ``path``, or a file in it, instead of what is staged beside it."""
    try:
        yield
    except OSError as error:
        if isinstance(error.filename, (str, os.PathLike)):
            with suppress(ValueError):
                staged, *rest = Path(error.filename).relative_to(path.parent).parts or ("",)
                if is_staged(staged):
                    error.filename = os.fspath(path.joinpath(*rest[1:] if rest[:1] == [_NEW] else ()))
                    error.filename2 = None
        raise
