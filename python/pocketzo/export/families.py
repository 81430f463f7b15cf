"""The families of checkpoints that can be exported: the one table of types, classes and kinds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal, TypeAlias

Kind: TypeAlias = Literal["decoder", "masked", "classifier", "encoder"]
"""What a model computes: the next token, masked tokens, classes, or hidden states alone."""


def _encoder(name: str) -> dict[str, Kind]:
    return {
        f"{name}ForMaskedLM": "masked",
        f"{name}ForSequenceClassification": "classifier",
        f"{name}Model": "encoder",
    }


FAMILIES: Final[Mapping[str, Mapping[str, Kind]]] = {
    "albert": _encoder("Albert"),
    "bert": _encoder("Bert"),
    "distilbert": _encoder("DistilBert"),
    "electra": _encoder("Electra"),
    "mpnet": _encoder("MPNet"),
    "roberta": _encoder("Roberta"),
    "gemma": {"GemmaForCausalLM": "decoder"},
    "gemma2": {"Gemma2ForCausalLM": "decoder"},
    "gemma3_text": {"Gemma3ForCausalLM": "decoder"},
    "gpt2": {"GPT2LMHeadModel": "decoder"},
    "llama": {"LlamaForCausalLM": "decoder"},
    "mistral": {"MistralForCausalLM": "decoder"},
    "opt": {"OPTForCausalLM": "decoder"},
    "phi3": {"Phi3ForCausalLM": "decoder"},
    "qwen2": {"Qwen2ForCausalLM": "decoder"},
    "qwen3": {"Qwen3ForCausalLM": "decoder"},
}
"""The kind of each class of transformers, by ``model_type`` of ``config.json``.

Encoders are traced here; ``_float_graph.py`` makes the graphs of decoders.
"""
