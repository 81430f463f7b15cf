"""Tiny GGUF files of random models, written as llama.cpp's converter writes them.

The model that comes with a file has the numbers of the file as its weights, without transformers' GGUF loader: it is
what the file means.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.convert_slow_tokenizer import bytes_to_unicode

Array = npt.NDArray[Any]
Change = Callable[[Array], Array]
Type = gguf.GGMLQuantizationType

SIZE, LAYERS, HEADS, KV_HEADS, CONTEXT = 256, 2, 4, 2, 64
TOKENS = [*bytes_to_unicode().values(), "he", "ll", "hell", "Ġw", "ĠĠ", "<|end|>"]
MERGES = ["h e", "l l", "he ll", "Ġ w", "Ġ Ġ"]
_SCALES: Mapping[str, tuple[int, ...]] = {"Q4_K": (0, 2), "Q6_K": (208,), "Q2_K": (80, 82), "IQ4_NL": (0,)}


def random_blocks(rng: np.random.Generator, kind: str, shape: tuple[int, int]) -> Array:
    """Return random bytes with small float16 scales: any bytes are blocks."""
    count, size = gguf.GGML_QUANT_SIZES[Type[kind]]
    blocks = rng.integers(0, 256, (shape[0], shape[1] // count, size), dtype=np.uint8)
    for start in _SCALES[kind]:
        scales = rng.uniform(1e-4, 3e-4, blocks.shape[:2]).astype(np.float16)
        blocks[..., start : start + 2] = scales[..., None].view(np.uint8)
    return blocks.reshape(shape[0], -1)


def encode(rng: np.random.Generator, kind: str, matrix: Array) -> Array:
    """Return the bytes of a matrix, in types that gguf cannot write random ones."""
    if kind in _SCALES:
        return random_blocks(rng, kind, (matrix.shape[0], matrix.shape[1]))
    return np.asarray(gguf.quants.quantize(matrix, Type[kind]))


def model_of(config: PreTrainedConfig, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # biases and scales are zeros and ones at first
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "embed" not in name:
                parameter.mul_(3)
    return model


def _interleave(heads: int) -> Change:
    def rows(matrix: Array) -> Array:
        return matrix.reshape(heads, 2, -1, *matrix.shape[1:]).swapaxes(1, 2).reshape(matrix.shape)

    return rows


def _separate(heads: int) -> Change:
    def rows(matrix: Array) -> Array:
        return matrix.reshape(heads, -1, 2, *matrix.shape[1:]).swapaxes(1, 2).reshape(matrix.shape)

    return rows


def _changes(
    arch: str, name: str, config: PreTrainedConfig
) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
    """Return what llama.cpp does to a tensor, and its inverse."""
    if arch == "llama" and (found := re.search(r"attn_([qk])\.", name)):
        heads = config.num_attention_heads if found[1] == "q" else config.num_key_value_heads
        return _interleave(heads), _separate(heads)
    if arch.startswith("gemma") and name.endswith("norm.weight"):
        return (lambda array: array + 1), (lambda array: array - 1)
    if arch == "gpt2" and re.search(r"(attn_qkv|attn_output|ffn_up|ffn_down)\.weight", name):
        return np.transpose, np.transpose
    return np.asarray, np.asarray


def write(
    path: Path,
    arch: str,
    model: Any,
    facts: Mapping[str, int | float | str],
    kind: str | Callable[[str], str] = "F32",
    *,
    pre: str | None = "gpt-2",
    extra: Mapping[str, tuple[Array, str]] | None = None,
    without: str = "",
) -> None:
    """Write a model, its matrices in a type, and give it the numbers of the file as its weights.

    Parameters
    ----------
    facts : dict
        Without the architecture's name, as ``block_count``.
    kind : str or callable
        The type of the matrices, or a function of a tensor's name.
    pre : str, optional
        How the tokenizer splits text; without it the file has no tokenizer.
    extra : dict of str to tuple
        More tensors, data and type.
    without : str
        A tensor to leave out.
    """
    rng = np.random.default_rng(1)
    writer = gguf.GGUFWriter(path, arch)
    for key, value in facts.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(key if key.startswith("split") else f"{arch}.{key}", value)
    if pre is not None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(TOKENS)
        writer.add_token_types([1] * (len(TOKENS) - 1) + [3])
        writer.add_token_merges(MERGES)
        for add_id in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_pad_token_id):
            add_id(len(TOKENS) - 1)
        writer.add_chat_template("{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}")
    number = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == arch)
    names = gguf.get_tensor_name_map(number, model.config.num_hidden_layers)
    written: dict[str, str] = {}
    for hf_name, parameter in model.named_parameters():
        base, _, suffix = hf_name.rpartition(".")
        name = f"{names.get_name(base)}.{suffix}"
        change, undo = _changes(arch, name, model.config)
        array = np.ascontiguousarray(change(parameter.detach().numpy()))
        chosen = "F32" if array.ndim == 1 else kind if isinstance(kind, str) else kind(name)
        data = encode(rng, chosen, array)
        if name != without:
            writer.add_tensor(name, data, raw_dtype=Type[chosen])
        written[name] = chosen
        if chosen in ("Q2_K", "IQ4_NL"):
            continue
        kept = undo(gguf.quants.dequantize(data, Type[chosen]))
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(np.array(kept, np.float32)))
    for name, (data, chosen) in (extra or {}).items():
        writer.add_tensor(name, data, raw_dtype=Type[chosen])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
