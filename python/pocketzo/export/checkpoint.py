"""A checkpoint's folder, as transformers, sentence-transformers or the Hugging Face Hub lay it out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
import transformers

from pocketzo.errors import Error, first_line
from pocketzo.export._sentence import SentenceFolder, read_json
from pocketzo.export._source import DecoderSource, EncoderSource, Source
from pocketzo.export.families import FAMILIES, Kind

_VOCABULARIES: Final = (
    *("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("vocab.txt", "vocab.json"),
)


def open_checkpoint(path: Path, say: Callable[[str], None]) -> Source:
    """Load a model and its tokenizer.

    Parameters
    ----------
    path : Path
        The folder.
    say : callable
        Called with a line of text if there is no tokenizer, or weights that are not used.

    Raises
    ------
    Error
        If the folder is damaged or incomplete, or of a family or class that is not supported.
    """
    sentence = SentenceFolder.of(path)
    folder = path if sentence is None else sentence.transformer
    name, kind = _class_of(folder, is_sentence=sentence is not None)
    model = _load(folder, name, kind, say)
    tokenizer = _load_tokenizer(folder, say)
    if kind == "decoder":
        return DecoderSource(path, model, tokenizer)
    return EncoderSource(path, kind, model, tokenizer, None if sentence is None else sentence.build())


def _class_of(folder: Path, *, is_sentence: bool) -> tuple[str, Kind]:
    """Return the class of a checkpoint and its kind; without a head for sentence-transformers, which reads none."""
    path = folder / "config.json"
    if not path.is_file():
        raise Error(f"{folder}: has no config.json; expected a checkpoint's folder, as save_pretrained writes it")
    config = read_json(path)
    if not isinstance(config, dict):
        raise Error(f"{path}: damaged: expected an object with 'model_type' and 'architectures'")
    classes = FAMILIES.get(str(config.get("model_type")))
    if classes is None:
        raise Error(
            f"{path}: model_type {config.get('model_type')!r} is not supported; expected one of {', '.join(FAMILIES)}"
        )
    if config.get("quantization_config") is not None:
        raise Error(
            f"{path}: a quantised checkpoint is not supported; export the one that it was made of, or a GGUF file"
        )
    if is_sentence:
        bare = next((name for name, kind in classes.items() if kind == "encoder"), None)
        if bare is None:
            raise Error(f"{path}: sentence embeddings of a decoder ({config['model_type']}) are not supported")
        return bare, "encoder"
    name = str(next(iter(config.get("architectures") or ()), None))
    if name not in classes:
        raise Error(
            f"{path}: the class {name!r} in 'architectures' is not supported; of {config['model_type']}, these are: "
            f"{', '.join(classes)}"
        )
    return name, classes[name]


def _load(folder: Path, name: str, kind: Kind, say: Callable[[str], None]) -> Any:
    # traced, the fused attention of encoders has twice the nodes
    attention = {} if kind == "decoder" else {"attn_implementation": "eager"}
    try:
        model, report = getattr(transformers, name).from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, output_loading_info=True, **attention
        )
    except Exception as error:  # those of safetensors, torch, huggingface_hub and transformers share no base
        raise Error(f"{folder}: transformers cannot load it ({type(error).__name__}: {first_line(error)})") from error
    _check_complete(folder, name, kind, report)
    if others := sorted(report["unexpected_keys"]):
        say(f"{name} does not use {len(others)} of the checkpoint's tensors, such as {others[0]!r}")
    return model.eval()


def _check_complete(folder: Path, name: str, kind: Kind, report: Mapping[str, Any]) -> None:
    """Refuse a model of which transformers initialised weights at random; hidden states need no pooler."""
    missing = sorted(key for key in report["missing_keys"] if kind != "encoder" or not key.startswith("pooler."))
    if missing:
        raise Error(
            f"{folder}: the checkpoint has no tensor for {len(missing)} parameters of {name}, such as {missing[0]!r}: "
            "train that model first, or name the class that was saved in 'architectures' of config.json"
        )


def _load_tokenizer(folder: Path, say: Callable[[str], None]) -> Any:
    if not any((folder / name).is_file() for name in _VOCABULARIES):
        say(f"{folder} has no tokenizer, so no tokenizer.json is written")
        return None
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # those of tokenizers, sentencepiece and transformers share no base
        raise Error(
            f"{folder}: transformers cannot load its tokenizer ({type(error).__name__}: {first_line(error)})"
        ) from error
    if not tokenizer.is_fast:
        raise Error(
            f"{folder}: its tokenizer, {type(tokenizer).__name__}, cannot be converted to tokenizer.json; save it as a "
            "fast one, or remove its files to export without"
        )
    return tokenizer
