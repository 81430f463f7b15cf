"""What a checkpoint of the Hugging Face libraries has beside its model: end tokens, special tokens, chat template."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from pocketzo.errors import BundleError
from pocketzo.formats.bundle import TOKENIZER
from pocketzo.formats.generation import CHAT_TEMPLATE

_SPECIAL: Final = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class Companions:
    """The contents of the files beside a model.

    Attributes
    ----------
    tokenizer : Path or None
        ``tokenizer.json``.
    eos : tuple of int
        The tokens that end a text.
    special_tokens : mapping of str to str
        By their names in these files, such as ``"bos_token"``.
    chat_template : str or None
        The template that turns a conversation into text, in Jinja.
    """

    tokenizer: Path | None
    eos: tuple[int, ...]
    special_tokens: Mapping[str, str]
    chat_template: str | None

    @classmethod
    def of(cls, model: Path) -> Self:
        """Read the files in the folder of a model; also in the one above, if its name is ``onnx``, as on the Hub.

        Raises
        ------
        BundleError
            A file cannot be read or is damaged; names it.
        """
        folders = [model.parent]
        if model.absolute().parent.name == "onnx":
            folders.append(model.absolute().parent.parent)
        tokenizer = next((path for folder in folders if (path := folder / TOKENIZER).is_file()), None)
        return cls(tokenizer, _eos(folders), _special_tokens(folders), _chat_template(folders))


def _eos(folders: list[Path]) -> tuple[int, ...]:
    for name in ("generation_config.json", "genai_config.json", "config.json"):
        for path, fields in _objects(folders, name):
            inner = fields.get("model" if name.startswith("genai") else "text_config")
            for source in (fields, inner if isinstance(inner, dict) else {}):
                found = source.get("eos_token_id")
                if found is None:
                    continue
                ids = found if isinstance(found, list) else [found]
                if not ids or not all(type(token) is int and 0 <= token < 2**31 for token in ids):
                    raise BundleError(f"{path}: 'eos_token_id' must be a token id or a list of them, got {found!r}")
                return tuple(ids)
    return ()


def _special_tokens(folders: list[Path]) -> dict[str, str]:
    tokens: dict[str, str] = {}
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        for _, fields in _objects(folders, file):
            for name in _SPECIAL:
                token = fields.get(name)
                content = token.get("content") if isinstance(token, dict) else token
                if isinstance(content, str) and content:
                    tokens.setdefault(name, content)
    return tokens


def _chat_template(folders: list[Path]) -> str | None:
    for folder in folders:
        path = folder / CHAT_TEMPLATE
        if path.is_file():
            return _text(path)
    for file in ("chat_template.json", "tokenizer_config.json"):
        for path, fields in _objects(folders, file):
            template = fields.get("chat_template")
            if isinstance(template, list):  # several by name
                named = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
                template = named.get("default")
            if isinstance(template, str):
                return template
            if template is not None:
                raise BundleError(f"{path}: 'chat_template' must be a string, got {type(template).__name__}")
    return None


def _objects(folders: list[Path], name: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    for folder in folders:
        path = folder / name
        if not path.is_file():
            continue
        try:
            fields = json.loads(_text(path))
        except ValueError as error:
            raise BundleError(f"{path}: not JSON: {error}; mend it or move it away") from None
        if not isinstance(fields, dict):
            raise BundleError(f"{path}: not a JSON object; mend it or move it away")
        yield path, fields


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{path}: cannot be read: {error}") from None
