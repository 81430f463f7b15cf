"""Prompts: a text in a template, classified by the word that comes next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pocketzo.tasks.classification import Classification

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from pocketzo.formats.bundle import Bundle


class Prompt(Classification):
    """A text in a template, and the label word that is likeliest next."""

    name: ClassVar[str] = "prompt"
    settings: ClassVar[tuple[str, ...]] = (
        "labels",
        "template",
        "label_words",
        "label_tokens",
        "mask_token",
        "calibration",
        "loss",
    )

    def __init__(self, bundle: Bundle, *, labels: Any = None, loss: Any = None, **settings: Any) -> None:
        super().__init__(bundle, labels=labels, loss=loss)
        self.prompt = settings


def label_tokens(tokenizer: Tokenizer, template: str, words: Sequence[str]) -> tuple[int, ...]:
    """Return the token of each label word, as it appears in the template."""
    tail = template.rpartition("}")[2]
    start = tokenizer.encode(tail, add_special_tokens=False).ids
    tokens = []
    for word in words:
        ids = tokenizer.encode(f"{tail} {word}", add_special_tokens=False).ids
        if ids[:-1] != start:
            raise ValueError(f"label word {word!r} is {ids[len(start) :]}, expected one token")
        tokens.append(ids[-1])
    return tuple(tokens)
