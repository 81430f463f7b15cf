"""The checkpoint that a model was exported from: its family, its heads, and the shapes of its modules' weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pocketzo.errors import BundleError
from pocketzo.formats.safetensors import tensor_shapes

CONFIG = "config.json"
_INDEX = "model.safetensors.index.json"
_WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """What of a checkpoint names and shapes depend on.

    Attributes
    ----------
    path : Path or None
        Its folder; None if it is not at hand.
    model_type : str or None
        As ``config.json`` has it, such as ``"llama"``.
    heads, kv_heads, layers : int
        0 if they are not known.
    shapes : dict of str to tuple of int
        By module, of its ``weight``; empty if it is not known.
    """

    path: Path | None = None
    model_type: str | None = None
    heads: int = 0
    kv_heads: int = 0
    layers: int = 0
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Checkpoint:
        """Read a folder as ``save_pretrained`` writes it; the weights may be missing.

        Raises
        ------
        BundleError
            There is no ``config.json``, or a file is damaged; names it.
        """
        config = read_object(path / CONFIG)
        inner = config.get("text_config")
        config |= inner if isinstance(inner, dict) else {}
        model_type = config.get("model_type")
        if not isinstance(model_type, str):
            raise BundleError(f"{path / CONFIG}: 'model_type' is {model_type!r}, expected a string")

        def number(*names: str) -> int:
            found = next((config[name] for name in names if type(config.get(name)) is int), 0)
            return int(found)

        heads = number("num_attention_heads", "n_head", "n_heads")
        return cls(
            path,
            model_type,
            heads,
            number("num_key_value_heads") or heads,
            number("num_hidden_layers", "n_layer", "n_layers"),
            _shapes(path),
        )


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises
    ------
    BundleError
        It is missing or damaged; names it.
    """
    if not path.is_file():
        raise BundleError(f"{path}: no such file")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BundleError(f"{path}: not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise BundleError(f"{path}: not a JSON object")
    return fields


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    if (path / _INDEX).is_file():
        index = read_object(path / _INDEX).get("weight_map")
        files = sorted({str(name) for name in index.values()}) if isinstance(index, dict) else []
    else:
        files = [_WEIGHTS] if (path / _WEIGHTS).is_file() else []
    found: dict[str, tuple[int, ...]] = {}
    for name in files:
        for tensor, shape in tensor_shapes(path / name).items():
            module, _, last = tensor.rpartition(".")
            if last == "weight":
                found[module] = shape
    return found
