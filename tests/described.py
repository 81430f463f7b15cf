"""A tokenizer, and bundles that are described but hold no model: enough to read data for."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from pocketzo.formats.bundle import Bundle, TaskSpec, ValueSpec

WORDS = ["a", "b", "good", "bad", "film", "the", "is", "not", "one", "two", "three"]
LETTERS = [chr(code) for code in range(33, 127)]
PAD, CLS, SEP = 5, 2, 3  # a pad id other than 0, so that it cannot be right by chance


def write_tokenizer(path: Path) -> None:
    """Write a WordPiece tokenizer that asks for padding and truncation of its own, which must not come through."""
    pieces = [
        "[X]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[Y]",
        "[PAD]",
        *WORDS,
        *LETTERS,
        *("##" + letter for letter in LETTERS),
    ]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    tokenizer.enable_padding(length=64, pad_id=PAD, pad_token="[PAD]")
    tokenizer.enable_truncation(3)
    tokenizer.save(str(path))


def described_bundle(
    path: Path,
    *,
    inputs: dict[str, tuple[str, tuple[int | str, ...]]] | None = None,
    task: str = "classification",
    labels: tuple[str, ...] | None = ("negative", "positive"),
    classes: int | str = 2,
    max_length: int | None = 64,
    tokenizer: str | None = "tokenizer.json",
) -> Bundle:
    """Return a bundle of a BERT-like model, in a folder in which only its tokenizer may be."""
    by = ("batch",) if task == "classification" else ("batch", "sequence")
    if inputs is None:
        names = ("input_ids", "attention_mask", "token_type_ids")
        inputs = dict.fromkeys(names, ("int64", ("batch", "sequence"))) | {"labels": ("int64", by)}
    return Bundle(
        path=path,
        tensors=(),
        frozen=(),
        inputs=tuple(ValueSpec(name, dtype, shape) for name, (dtype, shape) in inputs.items()),
        outputs=(ValueSpec("loss", "float32", ()), ValueSpec("logits", "float32", (*by, classes))),
        loss="loss",
        logits="logits",
        task=TaskSpec(task, {} if labels is None else {"labels": list(labels)}),
        max_length=max_length,
        tokenizer=tokenizer,
        graph_sha256="",
        base_sha256="",
        header_sha256="",
    )
