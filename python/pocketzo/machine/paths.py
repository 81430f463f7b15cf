"""Paths for libraries that take them as UTF-8 in any locale."""

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
