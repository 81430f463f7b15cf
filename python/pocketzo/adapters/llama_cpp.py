"""llama.cpp's adapters: LoRA in a GGUF file, by the names that a model's tensors have there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pocketzo.adapters.checkpoint import Checkpoint
from pocketzo.adapters.low_rank import by_module, check_alone
from pocketzo.adapters.tuned import Tuned
from pocketzo.errors import BundleError, first_line
from pocketzo.formats.added import AddedSpec
from pocketzo.packages import require

ADAPTER: Final = "adapter.gguf"
_FAMILIES: Final[Mapping[str, str]] = {
    "bert": "bert",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "gpt2": "gpt2",
    "llama": "llama",
    "mistral": "llama",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "roberta": "bert",
}
"""The architecture of llama.cpp for each ``model_type`` of transformers."""
_INTERLEAVED: Final = {"llama": ("attn_q", "attn_k")}
"""Projections of which llama.cpp keeps the two halves of each head alternating."""


def write_gguf(tuned: Tuned, added: Sequence[AddedSpec], folder: Path, source: Path) -> None:
    """Write an adapter of LoRA.

    Parameters
    ----------
    tuned : Tuned
    added : sequence of AddedSpec
    folder : Path
    source : Path
        The checkpoint's folder, or the model as a GGUF file.

    Raises
    ------
    BundleError
        A set does not fit, the family is not known, or a module or tensor is not found.
    MissingExtraError, BrokenPackageError
        The package gguf is not installed, or cannot be imported.
    """
    check_alone(tuned, added, ("lora",), "llama.cpp's adapters")
    require("gguf")
    import gguf

    architecture, checkpoint, tensors = _of_file(source) if source.is_file() else _of_folder(source)
    number = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    names = gguf.get_tensor_name_map(number, checkpoint.layers)
    found = by_module(tuned, added, checkpoint)
    scale = next(iter(found.values())).scale
    writer = gguf.GGUFWriter(folder / ADAPTER, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    ranks = {one.rank for one in found.values()}
    for module, one in found.items():
        name = names.get_name(module) or names.get_name(module.partition(".")[2])
        if name is None:
            raise BundleError(f"{source}: llama.cpp's {architecture} has no tensor for {module!r}")
        shape = (one.b.shape[0], one.a.shape[1])
        if tensors and tensors.get(f"{name}.weight") != shape:
            raise BundleError(
                f"{source}: {name}.weight is {tensors.get(f'{name}.weight')}, expected {shape}, the shape of "
                f"{module!r}: give the file of the model that was exported"
            )
        b = one.scaled(scale).b
        role = name.rpartition(".")[2]
        if role in _INTERLEAVED.get(architecture, ()):
            b = _interleave(b, checkpoint.heads if role == "attn_q" else checkpoint.kv_heads)
        # The reader divides alpha by the rank of each pair.
        b = b * np.float32(one.rank / min(ranks))
        writer.add_tensor(f"{name}.weight.lora_a", np.ascontiguousarray(one.a))
        writer.add_tensor(f"{name}.weight.lora_b", np.ascontiguousarray(b))
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(scale * min(ranks)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _interleave(rows: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Return rows in the order of llama.cpp: of each head 0, half, 1, half + 1 and so on."""
    return rows.reshape(heads, 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def _of_folder(path: Path) -> tuple[str, Checkpoint, dict[str, tuple[int, ...]]]:
    checkpoint = Checkpoint.read(path)
    family = checkpoint.model_type or ""
    if family not in _FAMILIES:
        raise BundleError(f"{path}: model_type is {family!r}, expected one of {', '.join(_FAMILIES)}")
    return _FAMILIES[family], checkpoint, {}


def _of_file(path: Path) -> tuple[str, Checkpoint, dict[str, tuple[int, ...]]]:
    import gguf

    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, LookupError, OverflowError, MemoryError) as error:
        raise BundleError(f"{path}: damaged or not a GGUF file: {first_line(error)}") from None
    field = reader.fields.get("general.architecture")
    architecture = "" if field is None else str(field.contents())

    def number(key: str) -> int:
        found = reader.fields.get(f"{architecture}.{key}")
        return 0 if found is None else int(found.contents())

    if architecture not in _FAMILIES.values():
        raise BundleError(
            f"{path}: architecture is {architecture!r}, expected one of {', '.join(sorted(set(_FAMILIES.values())))}"
        )
    heads = number("attention.head_count")
    family = next(name for name, value in _FAMILIES.items() if value == architecture)
    checkpoint = Checkpoint(path, family, heads, number("attention.head_count_kv") or heads, number("block_count"))
    return architecture, checkpoint, {tensor.name: tuple(map(int, tensor.shape[::-1])) for tensor in reader.tensors}
