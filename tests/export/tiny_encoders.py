"""Tiny random checkpoints of encoders, and a tokenizer, as transformers saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

SPECIAL: Final = {"pad": "[PAD]", "cls": "[CLS]", "sep": "[SEP]", "unk": "[UNK]", "mask": "[MASK]"}
WORDS: Final = ("a", "bad", "film", "good", "is", "it", "of", "terrible", "the", "was", ".")
VOCABULARY: Final = 61
POSITIONS: Final = 30
LABELS: Final = 3
FAMILIES: Final = {
    "albert": "Albert",
    "bert": "Bert",
    "distilbert": "DistilBert",
    "electra": "Electra",
    "mpnet": "MPNet",
    "roberta": "Roberta",
}
HEADS: Final = ("ForMaskedLM", "ForSequenceClassification", "Model")
_COMMON: Final[dict[str, Any]] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.3,
}
_DISTILBERT: Final[dict[str, Any]] = {
    "vocab_size": VOCABULARY,
    "dim": 32,
    "hidden_dim": 48,
    "n_heads": 4,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.3,
}
_MORE: Final[dict[str, dict[str, Any]]] = {
    "albert": {"embedding_size": 16},
    "electra": {"embedding_size": 16},
    "mpnet": {"pad_token_id": 1},
    "roberta": {"pad_token_id": 1, "type_vocab_size": 1},
}


def model_of(family: str, head: str, seed: int = 0) -> Any:
    """Return a model whose biases and scales are as random as its matrices."""
    torch.manual_seed(seed)
    name = FAMILIES[family]
    layers = 2 if head == HEADS[0] else 1
    settings = _DISTILBERT | {"n_layers": layers} if family == "distilbert" else _COMMON | {"num_hidden_layers": layers}
    config = getattr(transformers, f"{name}Config")(**settings, **_MORE.get(family, {}), num_labels=LABELS)
    model = getattr(transformers, f"{name}{head}")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def tokenizer(padding: int = 0) -> PreTrainedTokenizerFast:
    special = list(SPECIAL.values())
    if padding == 1:
        special[:2] = special[1::-1]
    vocabulary = {word: number for number, word in enumerate([*special, *WORDS])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(word, vocabulary[word]) for word in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, **{f"{name}_token": token for name, token in SPECIAL.items()}
    )


def save(folder: Path, model: Any) -> None:
    model.save_pretrained(folder)
    tokenizer(model.config.pad_token_id).save_pretrained(folder)
