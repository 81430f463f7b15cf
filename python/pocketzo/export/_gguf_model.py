"""A GGUF file as a model of transformers, with float32 weights.

transformers dequantises the tensors and undoes what llama.cpp changed in them. It passes over facts and tensors that it
does not know, so what it builds is completed here, and refused where that is not possible.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
import torch
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from pocketzo.errors import Error, first_line
from pocketzo.export._gguf_file import GgufFile

ARCHITECTURES: Final = ("gemma2", "gemma3", "gpt2", "llama", "phi3", "qwen2", "qwen3")
"""Values of ``general.architecture``; Mistral and SmolLM are ``llama``."""
_ROPE: Final = "rope_freqs.weight"  # Llama 3's factors
_GPT2_SPLIT: Final = (None, "default", "gpt-2", "gpt2", "phi-2", "jina-en", "jina-v2-code", "roberta-bpe")
_DIGITS: Final = ("smollm", "starcoder", "refact", "command-r", "codeshell")  # each digit is split off first


def load_model(file: GgufFile) -> Any:
    """Return the model in evaluation mode.

    Raises
    ------
    Error
        If the architecture is not one of `ARCHITECTURES`, or the file has facts or tensors that the model lacks, or
        lacks a tensor of the model.
    """
    if file.architecture not in ARCHITECTURES:
        raise Error(
            f"{file.path}: architecture {file.architecture!r} is not supported; expected one of "
            f"{', '.join(ARCHITECTURES)}"
        )
    scaling = file.model_fact("rope.scaling.type", "none")
    long = [name for name in file.tensors if name.startswith("rope_factors")]
    if scaling != "none" or long:
        raise Error(
            f"{file.path}: its rotary positions are scaled ({long[0] if long else scaling!r}), which is not supported; "
            "export the checkpoint's folder instead"
        )
    source = {"pretrained_model_name_or_path": str(file.path.parent), "gguf_file": file.path.name}
    try:
        config = AutoConfig.from_pretrained(**source)
        _complete(config, file)
        model, report = AutoModelForCausalLM.from_pretrained(
            **source, config=config, dtype=torch.float32, output_loading_info=True
        )
    except (ValueError, RuntimeError, KeyError, NotImplementedError) as error:
        raise Error(f"{file.path}: transformers cannot load it: {first_line(error)}") from error
    _check_complete(model, report, file)
    model.hf_quantizer = None  # the weights are plain floats now; save_pretrained refuses otherwise
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model.eval()


def load_tokenizer(file: GgufFile) -> Any:
    """Return the tokenizer.

    Raises
    ------
    Error
        If the file has none, or splits text in a way that is not known.
    """
    if file.fact("tokenizer.ggml.model") is None:
        raise Error(f"{file.path}: has no tokenizer; expected the key 'tokenizer.ggml.model'")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(file.path.parent), gguf_file=file.path.name)
    except (ValueError, KeyError, RuntimeError) as error:
        raise Error(f"{file.path}: transformers cannot build its tokenizer: {first_line(error)}") from error
    split = file.fact("tokenizer.ggml.pre")
    if file.fact("tokenizer.ggml.model") == "gpt2" and split not in GGUF_PRE_TOKENIZER_SPLITS:
        if split in _DIGITS:
            tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            )
        elif split not in _GPT2_SPLIT:
            raise Error(
                f"{file.path}: the tokenizer splits text as {split!r}, which is not supported; "
                "export the checkpoint's folder instead"
            )
    return tokenizer


def _complete(config: Any, file: GgufFile) -> None:
    """Set what transformers leaves at the default of the configuration's class, one checkpoint's value."""
    facts: Mapping[str, tuple[str, Callable[[Any], Any]]] = {
        "head_dim": ("attention.key_length", int),
        "sliding_window": ("attention.sliding_window", int),
        "attn_logit_softcapping": ("attn_logit_softcapping", float),
        "final_logit_softcapping": ("final_logit_softcapping", float),
        "n_positions": ("context_length", int),
    }
    for name, (key, convert) in facts.items():
        if hasattr(config, name) and (value := file.model_fact(key)) is not None:
            setattr(config, name, convert(value))
    if hasattr(config, "query_pre_attn_scalar"):  # Gemma's largest models scale by the width of the model
        wide = config.num_hidden_layers == {"gemma2": 46, "gemma3": 62}.get(file.architecture)
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads if wide else config.head_dim
    if _ROPE in file.tensors:
        config.rope_parameters = {
            "rope_type": "llama3",
            "rope_theta": config.rope_parameters["rope_theta"],
            "factor": float(file.array(_ROPE).max()),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }


def _check_complete(model: Any, report: Mapping[str, Any], file: GgufFile) -> None:
    missing = sorted(report["missing_keys"])
    if missing:
        raise Error(f"{file.path}: has no tensor for the parameter {missing[0]!r} of {type(model).__name__}")
    used = len({parameter.data_ptr() for parameter in model.parameters()})
    given = len(file.tensors.keys() - {_ROPE})
    if used != given:
        raise Error(
            f"{file.path}: {given} tensors, but {type(model).__name__} has {used} parameters: a variant that is not "
            "supported; export the checkpoint's folder instead"
        )
    if _ROPE in file.tensors:
        config = model.config
        size = config.head_dim
        plain = config.rope_parameters["rope_theta"] ** -(np.arange(0, size, 2) / size)
        found = model.model.rotary_emb.inv_freq.numpy()
        if not np.allclose(plain / file.array(_ROPE), found, rtol=1e-5):
            raise Error(f"{file.path}: {_ROPE!r} are not Llama 3's factors; export the checkpoint's folder instead")
