"""Writing files: errors that name the file, names that survive a power cut, appends that are whole or not there.

A file's data is on storage after ``fsync`` of the file; that it exists, under its name, after ``fsync`` of its folder.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Final

_CHUNK: Final = 1 << 22


@contextmanager
def named(path: str | os.PathLike[str]) -> Iterator[None]:
    """Name a file in an ``OSError`` of the block that names none, as those of ``write`` and ``fsync``."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = os.fspath(path)
        raise


def write_file(path: Path, data: bytes) -> None:
    """Write a file."""
    with named(path), path.open("wb", buffering=0) as file:
        left = memoryview(data)
        while left:
            left = left[file.write(left) :]


def copy_file(source: Path, path: Path) -> None:
    """Copy a file's bytes. An ``OSError`` names the file that cannot be read or written, unlike that of shutil."""
    with named(source), source.open("rb", buffering=0) as reader, named(path), path.open("wb", buffering=0) as writer:
        while chunk := reader.read(_CHUNK):
            with named(path):
                while chunk:
                    chunk = chunk[writer.write(chunk) :]


def link_file(source: Path, path: Path) -> str | None:
    """Give a file a second name, or where the system does not allow that, copy it.

    Returns
    -------
    str or None
        Why it was copied.
    """
    try:
        os.link(source, path)
    except OSError as error:  # of another file system, one without links, or a system that forbids them
        copy_file(source, path)
        return error.strerror or str(error)
    return None


def sync_file(path: Path) -> None:
    """Flush a file's data to storage."""
    file = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        with named(path):
            os.fsync(file)
    finally:
        os.close(file)


def sync_folder(path: Path) -> None:
    """Flush a folder's entries to storage, so that files that were created or renamed there keep their names."""
    if os.name == "nt":  # where a folder cannot be opened
        return
    try:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:  # a folder may allow writing and no reading
        return
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems on which a folder cannot be flushed
            error.filename = os.fspath(path)
            raise
    finally:
        os.close(folder)


def make_folder(path: Path) -> None:
    """Create a folder and all that are missing above it, on storage too."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in reversed(missing):
        sync_folder(folder.parent)


def append(file: FileIO, data: bytes, end: int, path: Path) -> None:
    """Append bytes to an unbuffered file of ``end`` bytes: all of them in one write, or none if that fails."""
    left = memoryview(data)
    try:
        with named(path):
            while left:
                left = left[file.write(left) :]
    except BaseException:  # a full disk may have accepted a part
        cut(file, end, path)
        raise


def cut(file: FileIO, end: int, path: Path) -> None:
    """Shorten an unbuffered file to ``end`` bytes, and go on writing there."""
    with named(path):
        file.truncate(end)
        file.seek(end)
