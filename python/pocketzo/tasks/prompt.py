"""Prompts: a text in a template, classified by the word that comes next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pocketzo.data.examples import Encoded
from pocketzo.tasks.classification import Classification

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from pocketzo.data.examples import Example
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
        self.template = settings["template"]
        self.mask_token = settings["mask_token"]

    def encode(self, tokenizer: Tokenizer, examples: Sequence[Example]) -> list[Encoded]:
        """Return the tokens of each example's prompt, and its label."""
        mask = "" if self.mask_token is None else tokenizer.id_to_token(self.mask_token)
        filled = [
            self.template.replace("{mask}", mask).replace("{text}", str(e.text)).replace("{pair}", str(e.pair))
            for e in examples
        ]
        encodings = tokenizer.encode_batch(filled)
        return [Encoded(got.ids, got.type_ids, e.label, False) for e, got in zip(examples, encodings, strict=True)]


def label_tokens(tokenizer: Tokenizer, template: str, words: Sequence[str]) -> tuple[int, ...]:
    """Return the token of each label word, as it appears in the template.

    Raises
    ------
    ValueError
        A word is not one token, or two words are the same.
    """
    before, _, _ = template.rpartition("{mask}") if "{mask}" in template else (f"{template} ", "", "")
    before = before.rpartition("}")[2]
    start = tokenizer.encode(before.rstrip(" "), add_special_tokens=False).ids
    tokens: list[int] = []
    for word in words:
        ids = tokenizer.encode(f"{before}{word}", add_special_tokens=False).ids
        if ids[: len(start)] != start or len(ids) != len(start) + 1:
            raise ValueError(f"the label word {word!r} is the tokens {ids[len(start) :]} there, expected one")
        if ids[-1] in tokens:
            raise ValueError(f"the label words {words[tokens.index(ids[-1])]!r} and {word!r} are both token {ids[-1]}")
        tokens.append(ids[-1])
    return tuple(tokens)
