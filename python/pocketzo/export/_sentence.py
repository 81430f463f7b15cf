"""What a folder of sentence-transformers computes from hidden states: pooling, dense layers, normalisation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file

from pocketzo.errors import Error, first_line

_FLAG: Final = "pooling_mode_"
_MODES: Final = {"cls_token": "cls", "max_tokens": "max", "mean_tokens": "mean"}
_ACTIVATIONS: Final = {"Identity": torch.nn.Identity, "Tanh": torch.nn.Tanh}


@dataclass(frozen=True)
class SentenceFolder:
    """The modules that ``modules.json`` lists.

    Attributes
    ----------
    transformer : Path
        The folder of the checkpoint.
    modules : tuple of tuple
        The type and the folder of each module after it.
    """

    transformer: Path
    modules: tuple[tuple[str, Path], ...]

    @classmethod
    def of(cls, path: Path) -> SentenceFolder | None:
        """Return what a folder lists; None if it is none of sentence-transformers.

        Raises
        ------
        Error
            If ``modules.json`` is damaged, or begins with another module than a transformer.
        """
        listed = path / "modules.json"
        if not listed.is_file():
            return None
        try:
            modules = [(str(each["type"]).split(".")[-1], path / each["path"]) for each in read_json(listed)]
        except (TypeError, KeyError) as error:
            raise Error(f"{listed}: damaged: expected a list of modules with type and path") from error
        if not modules or modules[0][0] != "Transformer":
            raise Error(f"{listed}: expected a first module 'Transformer', got {modules[0][0] if modules else 'none'}")
        return cls(modules[0][1], tuple(modules[1:]))

    def build(self) -> torch.nn.Module:
        """Return the module of hidden states and mask that computes the embedding.

        Raises
        ------
        Error
            If a module is not supported or damaged.
        """
        if not self.modules or self.modules[0][0] != "Pooling":
            found = self.modules[0][0] if self.modules else "none"
            raise Error(f"{self.transformer}: expected a module 'Pooling' after the transformer, got {found!r}")
        layers: dict[str, torch.nn.Module] = {}
        for kind, folder in self.modules[1:]:
            if kind not in ("Dense", "Normalize"):
                raise Error(
                    f"{folder}: the module {kind!r} of sentence-transformers is not supported; expected Pooling, Dense "
                    "or Normalize"
                )
            layers[folder.name] = _dense(folder) if kind == "Dense" else _Normalize()
        return _Sentence(_modes(self.modules[0][1] / "config.json"), layers)


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises
    ------
    Error
        If it is damaged.
    """
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise Error(f"{path}: damaged, or not JSON: {first_line(error)}") from error


def _modes(path: Path) -> list[str]:
    config: Mapping[str, Any] = read_json(path)
    named = config.get("pooling_mode")
    if named is None:
        flags = [key.removeprefix(_FLAG) for key, value in config.items() if key.startswith(_FLAG) and value]
        modes = [mode for flag, mode in _MODES.items() if flag in flags]
        modes += [flag for flag in flags if flag not in _MODES]
    else:
        modes = [named] if isinstance(named, str) else list(named)
    if not modes or (others := set(modes) - set(_MODES.values())):
        raise Error(
            f"{path}: pooling by {sorted(others) if modes else 'nothing'} is not supported; expected cls, max or mean"
        )
    return modes


def _dense(folder: Path) -> torch.nn.Module:
    config = read_json(folder / "config.json")
    activation = str(config.get("activation_function", "Tanh")).split(".")[-1]
    if activation not in _ACTIVATIONS:
        raise Error(f"{folder}: the activation {activation!r} is not supported; expected {' or '.join(_ACTIVATIONS)}")
    layer = torch.nn.Sequential()
    layer.add_module("linear", torch.nn.Linear(config["in_features"], config["out_features"], config.get("bias", True)))
    try:
        layer.load_state_dict(
            {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
        )
    except Exception as error:  # safetensors' and torch's exceptions share no base
        raise Error(f"{folder}: its weights cannot be loaded: {first_line(error)}") from error
    layer.add_module("activation", _ACTIVATIONS[activation]())
    return layer


class _Normalize(torch.nn.Module):  # type: ignore[misc]  # torch may be missing
    def forward(self, x: Any) -> Any:
        return torch.nn.functional.normalize(x, dim=-1)


class _Sentence(torch.nn.Module):  # type: ignore[misc]
    def __init__(self, modes: Sequence[str], layers: Mapping[str, torch.nn.Module]) -> None:
        super().__init__()
        self.modes = modes
        self.layers = torch.nn.ModuleDict(layers)

    def forward(self, hidden: Any, mask: Any) -> Any:
        """Return the embedding ``[batch, size]`` of hidden states ``[batch, sequence, hidden]``."""
        there = mask.unsqueeze(-1)
        x = torch.cat([self._pool(mode, hidden, there) for mode in self.modes], dim=-1)
        for layer in self.layers.values():
            x = layer(x)
        return x

    @staticmethod
    def _pool(mode: str, hidden: Any, there: Any) -> Any:
        if mode == "cls":
            return hidden[:, 0]
        if mode == "max":
            return hidden.masked_fill(there == 0, -1e9).amax(1)
        share = there.to(hidden.dtype)
        return (hidden * share).sum(1) / share.sum(1).clamp(min=1e-9)
