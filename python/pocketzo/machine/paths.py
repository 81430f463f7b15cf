"""Paths outside of this process: for libraries that take UTF-8, and in files that are read in another locale."""

from __future__ import annotations

import os

from pocketzo.errors import Error


def utf8_path(path: str | os.PathLike[str]) -> str:
    """Return a path as a string whose UTF-8 bytes are the name of the file.

    Python decodes names by the locale and keeps undecodable bytes as surrogates, as in the C locale. onnxruntime
    encodes strings as UTF-8 and refuses surrogates.

    Raises
    ------
    Error
        The name of the file is not UTF-8.
    """
    try:
        return os.fsencode(path).decode()
    except UnicodeDecodeError:
        raise Error(f"{os.fspath(path)!a}: not UTF-8, which onnxruntime needs in paths: rename the folder") from None


def portable_path(path: str) -> str:
    """Return a path as text that is the same in every locale: its bytes decoded as UTF-8, as far as they are."""
    return os.fsencode(path).decode("utf-8", "surrogateescape")


def local_path(path: str) -> str:
    """Return a path from :func:`portable_path` as Python names the file here; any other text as it is."""
    try:
        return os.fsdecode(path.encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError:
        return path
