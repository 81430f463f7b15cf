"""Tiny random decoders of each family, as transformers makes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

VOCABULARY: Final = 61
WINDOW: Final = 8
CONTEXT: Final = 64
COMMON: Final[dict[str, Any]] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
TWO_LAYERS: Final = COMMON | {"num_hidden_layers": 2}
MIXED: Final = TWO_LAYERS | {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
OPT: Final = {
    name: value for name, value in TWO_LAYERS.items() if name not in ("intermediate_size", "num_key_value_heads")
}


def rope(theta: float, kind: str = "default", **settings: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": theta, **settings}


def _opt(**settings: Any) -> PreTrainedConfig:
    return OPTConfig(**OPT, ffn_dim=96, dropout=0.1, **settings)


def _gemma3() -> PreTrainedConfig:
    bases = {"full_attention": rope(20000.0), "sliding_attention": rope(1000.0)}
    return Gemma3TextConfig(**MIXED, head_dim=32, query_pre_attn_scalar=32, rope_parameters=bases)


def _phi3_long() -> PreTrainedConfig:
    factors = {"short_factor": [1 + 0.1 * i for i in range(8)], "long_factor": [2 + 0.3 * i for i in range(8)]}
    scaling = rope(10000.0, "longrope", **factors, original_max_position_embeddings=CONTEXT // 4)
    return Phi3Config(**COMMON, rope_parameters=scaling)


FAMILIES: Final[dict[str, Callable[[], PreTrainedConfig]]] = {
    "opt": lambda: _opt(word_embed_proj_dim=64),
    "opt-350m": lambda: _opt(word_embed_proj_dim=32, do_layer_norm_before=False),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=CONTEXT,
        bos_token_id=None,
        eos_token_id=None,
    ),
    "llama": lambda: LlamaConfig(**TWO_LAYERS, tie_word_embeddings=True),
    "mistral": lambda: MistralConfig(**TWO_LAYERS, sliding_window=None),
    "mistral-window": lambda: MistralConfig(**COMMON, sliding_window=WINDOW),
    "qwen2": lambda: Qwen2Config(**TWO_LAYERS),
    "qwen3": lambda: Qwen3Config(**TWO_LAYERS, head_dim=32),
    "gemma": lambda: GemmaConfig(**COMMON, head_dim=32),
    "gemma2": lambda: Gemma2Config(
        **MIXED, head_dim=32, query_pre_attn_scalar=32, attn_logit_softcapping=20.0, final_logit_softcapping=10.0
    ),
    "gemma3": _gemma3,
    "phi3": lambda: Phi3Config(**TWO_LAYERS),
    "phi3-long": _phi3_long,
}
"""Among them: a sliding window, layers with and without one, two rotary bases, and projections around the embedding."""
