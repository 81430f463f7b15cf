"""PEFT's adapters: ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pocketzo.adapters.checkpoint import Checkpoint
from pocketzo.adapters.low_rank import by_module, check_alone
from pocketzo.adapters.modules import is_conv1d, target_of
from pocketzo.adapters.tuned import Tuned
from pocketzo.errors import BundleError
from pocketzo.formats.added import AddedSpec
from pocketzo.formats.files import write_file
from pocketzo.formats.safetensors import write

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapter_model.safetensors"
PREFIX: Final = "base_model.model."
_CAUSAL: Final = ("causal-lm", "choice", "prompt")


def write_peft(tuned: Tuned, added: Sequence[AddedSpec], folder: Path, checkpoint: Checkpoint) -> None:
    """Write an adapter of LoRA or of (IA)3.

    Raises
    ------
    BundleError
        A set does not fit into one adapter, or a module is not found.
    """
    if any(item.kind == "ia3" for item in added):
        check_alone(tuned, added, ("ia3",), "one of PEFT's adapters of (IA)3")
        config, tensors = _ia3(tuned, added, checkpoint)
    else:
        check_alone(tuned, added, ("lora",), "one of PEFT's adapters of LoRA")
        config, tensors = _lora(tuned, added, checkpoint)
    causal = tuned.bundle.task is not None and tuned.bundle.task.name in _CAUSAL and tuned.bundle.generation is not None
    common = {
        "base_model_name_or_path": None if checkpoint.path is None else str(checkpoint.path),
        "fan_in_fan_out": is_conv1d(checkpoint, config["target_modules"]),
        "inference_mode": True,
        "task_type": "CAUSAL_LM" if causal else None,
    }
    write_file(folder / CONFIG, f"{json.dumps(common | config, indent=2)}\n".encode())
    write(folder / WEIGHTS, sorted(tensors.items()), padded=False)


def _lora(
    tuned: Tuned, added: Sequence[AddedSpec], checkpoint: Checkpoint
) -> tuple[dict[str, Any], dict[str, NDArray[np.float32]]]:
    found = by_module(tuned, added, checkpoint)
    first = next(iter(found.values()))
    tensors = {}
    for module, one in found.items():
        tensors[f"{PREFIX}{module}.lora_A.weight"] = one.a
        tensors[f"{PREFIX}{module}.lora_B.weight"] = one.b
    config = {
        "peft_type": "LORA",
        "target_modules": list(found),
        "r": first.rank,
        "lora_alpha": first.alpha,
        "rank_pattern": {re.escape(name): one.rank for name, one in found.items() if one.rank != first.rank},
        "alpha_pattern": {re.escape(name): one.alpha for name, one in found.items() if one.alpha != first.alpha},
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
    }
    return config, tensors


def _ia3(
    tuned: Tuned, added: Sequence[AddedSpec], checkpoint: Checkpoint
) -> tuple[dict[str, Any], dict[str, NDArray[np.float32]]]:
    factors: dict[str, NDArray[np.float32]] = {}
    inner = []
    for item in added:
        assert item.place is not None, "(IA)3 has one"
        target = target_of(item, checkpoint)
        if item.place.input:
            inner.append(target.module)
        whole = factors.setdefault(target.module, np.ones(target.size, np.float32))
        if item.place.input != (target.module in inner) or len(whole) != target.size:
            raise BundleError(f"{item.tensors[0]!r} and another set change {target.module!r}, expected one of them")
        whole[target.start : target.start + target.count] = tuned.float32(item.tensors[0])
    config = {
        "peft_type": "IA3",
        "target_modules": list(factors),
        "feedforward_modules": inner,
        "init_ia3_weights": True,
        "modules_to_save": None,
    }
    tensors = {f"{PREFIX}{name}.ia3_l": one[None] if name in inner else one[:, None] for name, one in factors.items()}
    return config, tensors
