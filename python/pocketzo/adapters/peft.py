"""PEFT's adapters, ``adapter_config.json`` and ``adapter_model.safetensors``: written, and read to begin a run from."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pocketzo.adapters.checkpoint import Checkpoint, read_object
from pocketzo.adapters.low_rank import LowRank, by_module, check_alone
from pocketzo.adapters.modules import find_target, is_conv1d, is_same, target_of
from pocketzo.adapters.tuned import Tuned
from pocketzo.errors import BundleError
from pocketzo.formats.added import AddedSpec
from pocketzo.formats.files import write_file
from pocketzo.formats.safetensors import read_floats, write

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


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_peft(tuned: Tuned, folder: Path) -> dict[str, NDArray[np.float32]]:
    """Return the values with which a bundle's matrices of LoRA begin from an adapter.

    Parameters
    ----------
    tuned : Tuned
        The base bundle.
    folder : Path

    Returns
    -------
    dict of str to ndarray
        By the bundle's names.

    Raises
    ------
    BundleError
        A file is missing or damaged, or the adapter does not fit to the bundle's sets; names what does not match.
    """
    config = read_object(folder / CONFIG)
    modules = _matrices(folder, config)
    items = [item for item in tuned.added if item.kind == "lora"]
    if not items:
        raise BundleError(f"{tuned.bundle.path}: has no set 'lora' that {folder} could be the beginning of")
    shapes = {module: (len(one.b), one.a.shape[1]) for module, one in modules.items()}
    there = Checkpoint(folder, shapes=shapes)
    parts: dict[str, list[tuple[AddedSpec, slice]]] = {}
    for item in items:
        target = find_target(item, there)
        if target is None:
            place = item.place
            assert place is not None, "LoRA has one"
            has = _some(f"{name} of {size[1]} x {size[0]}" for name, size in shapes.items())
            raise BundleError(
                f"{folder}: has no matrices for {item.tensors[0]!r} of a projection of {place.rows} x {place.columns}, "
                f"but for {has}: prepare the model with the targets and layers of the adapter"
            )
        module = next(name for name in shapes if is_same(name, target.module))
        parts.setdefault(module, []).append((item, slice(target.start, target.start + target.count)))
    found: dict[str, NDArray[np.float32]] = {}
    for module, one in modules.items():
        if module not in parts:
            raise BundleError(
                f"{folder}: changes {module!r}, which no set of {tuned.bundle.path} does: prepare the model with the "
                "targets and layers of the adapter"
            )
        others = np.ones(len(one.b), bool)
        for index, (item, columns) in enumerate(parts[module]):
            others[columns] = False
            used = np.arange(one.rank)
            block = used.reshape(len(parts[module]), -1)[index] if one.rank % len(parts[module]) == 0 else used
            if len(block) == tuned.tensors[item.tensors[1]].shape[0] and not np.delete(one.b[columns], block, 1).any():
                used = block  # of a pair of several parts' matrices
            found |= _begin(tuned, item, one, columns, used, f"{folder}: {module}")
        if one.b[others].any():
            raise BundleError(
                f"{folder}: changes columns of {module!r} that no set of {tuned.bundle.path} does: prepare the model "
                f"with targets={module.rpartition('.')[2]}"
            )
    return found


def _begin(
    tuned: Tuned, item: AddedSpec, one: LowRank, columns: slice, used: NDArray[np.intp], where: str
) -> dict[str, NDArray[np.float32]]:
    """Return A and B of some columns."""
    names = item.tensors
    down, up = (np.array(tuned.float32(name)) for name in names)
    rank = len(up)
    assert item.alpha is not None, "LoRA has one"
    scale, part = item.alpha / rank, one.b[columns]
    wanted = f"prepare the model with --train lora:r={one.rank},alpha={one.alpha:g}"
    if len(used) != rank:
        raise BundleError(f"{where}: is of rank {one.rank}, and {item.part!r} of rank {rank}: {wanted}")
    if abs(one.scale - scale) > 1e-6 * scale:
        raise BundleError(
            f"{where}: alpha / r is {one.alpha:g} / {one.rank}, and {item.alpha:g} / {rank} of {item.part!r}: {wanted}"
        )
    down[...], up[...] = one.a[used].T, part[:, used].T
    if not any(tensor.name == names[0] and tensor.trainable for tensor in tuned.bundle.tensors):
        if not np.array_equal(down, tuned.float32(names[0])):
            raise BundleError(
                f"{where}: has another A than {names[0]!r}, which {item.part!r} freezes: {wanted},train=AB"
            )
        return {names[1]: up}
    return {names[0]: down, names[1]: up}


def _matrices(folder: Path, config: dict[str, Any]) -> dict[str, LowRank]:
    if config.get("peft_type") != "LORA" or config.get("use_dora"):
        kind = "DoRA" if config.get("use_dora") else repr(config.get("peft_type"))
        raise BundleError(
            f"{folder / CONFIG}: is an adapter of {kind}, expected LoRA: 'peft_type' \"LORA\" without 'use_dora'"
        )
    path = folder / WEIGHTS
    if not path.is_file():
        raise BundleError(f"{path}: no such file; save the adapter with safe_serialization=True")
    pairs: dict[str, dict[str, NDArray[np.float32]]] = {}
    for name, array in read_floats(path).items():
        match = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight", name)
        if match is None or array.ndim != 2:
            raise BundleError(f"{path}: {name!r} is no matrix A or B of LoRA: a run begins from these alone")
        pairs.setdefault(match[1], {})[match[2]] = array
    modules = {}
    for module, pair in pairs.items():
        if len(pair) != 2 or len(pair["A"]) != pair["B"].shape[1]:
            raise BundleError(f"{path}: A and B of {module!r} are not both there, or of different ranks")
        rank = _of_pattern(config, "rank_pattern", module, "r")
        if rank != len(pair["A"]):
            raise BundleError(f"{folder / CONFIG}: {module!r} is of rank {rank}, and its A of {len(pair['A'])}")
        alpha = _of_pattern(config, "alpha_pattern", module, "lora_alpha")
        modules[module] = LowRank(pair["A"], pair["B"], alpha / (rank**0.5 if config.get("use_rslora") else rank))
    return modules


def _of_pattern(config: dict[str, Any], patterns: str, module: str, default: str) -> float:
    """Return the rank or the alpha of a module."""
    found = config.get(default)
    for pattern, value in (config.get(patterns) or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            found = value
            break
    if not isinstance(found, (int, float)) or not found > 0:
        raise BundleError(f"{CONFIG}: {default!r} of {module!r} is {found!r}, expected a number greater than 0")
    return found


def _some(texts: Iterable[str]) -> str:
    texts = list(texts)
    return ", ".join(texts[:2]) + (f" and {len(texts) - 2} more" if len(texts) > 2 else "") or "none"
