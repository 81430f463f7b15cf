"""Prompts: a text in a template, classified by the word that the model expects there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from pocketzo.data.columns import LineError
from pocketzo.data.examples import Encoded, Row, end_of_text
from pocketzo.formats.bundle import TaskSpec
from pocketzo.tasks.classification import Classification
from pocketzo.tasks.template import Template

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from tokenizers import Encoding, Tokenizer

    from pocketzo.data.columns import Columns
    from pocketzo.data.examples import Example
    from pocketzo.formats.bundle import Bundle
    from pocketzo.tasks.template import Filled


class Prompt(Classification):
    """A text, or a pair of texts, in a template, and the label word that is likeliest at its end or mask.

    The spaces around a text are left out. A prompt that is too long is cut in its text, or in the longer one of a pair;
    the template is never cut.

    Parameters
    ----------
    bundle : Bundle
        The model.
    template : str
        See :class:`Template`.
    label_words : sequence of str
        The word of each class.
    label_tokens : sequence of int
        The token of each word, of which the graph has the logits.
    mask_token : int or None
        The token at ``{mask}``; None if the word comes after the template.
    calibration : sequence of float or None
        What the graph subtracts from each logit.
    labels, loss
        See :class:`Classification`.
    """

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
    losses: ClassVar[tuple[str, ...]] = ("cross-entropy",)
    cuts: ClassVar[bool] = True
    untrained: ClassVar[str | None] = "zero-shot"

    def __init__(
        self,
        bundle: Bundle,
        *,
        template: str,
        label_words: Sequence[str],
        label_tokens: Sequence[int],
        mask_token: int | None = None,
        calibration: Sequence[float] | None = None,
        labels: Sequence[str] | None = None,
        loss: str | None = None,
    ) -> None:
        super().__init__(bundle, labels=labels, loss=loss)
        if not isinstance(template, str):
            raise TypeError(f"'template' must be a string, got {template!r}")
        self.template = Template(template)
        if ("mask" in self.template.places) != (mask_token is not None):
            raise ValueError(f"'mask_token' is {mask_token!r}, and the template is {template!r}")
        if len(label_words) != len(label_tokens):
            raise ValueError(f"there are {len(label_words)} 'label_words' and {len(label_tokens)} 'label_tokens'")
        self.label_words = tuple(label_words)
        self.label_tokens = tuple(label_tokens)
        self.mask_token = mask_token
        self.calibration = calibration

    def example(self, record: Mapping[str, Any], columns: Columns) -> Example:
        """Read text, pair and label from a record."""
        example = super().example(record, columns)
        if "pair" in self.template.places and example.pair is None:
            raise LineError(self.missing(record, columns, "text_pair") + ", and the template has {pair}")
        return example

    def encode(self, tokenizer: Tokenizer, examples: Sequence[Example], limit: int | None) -> list[Encoded]:
        """Return the tokens of each example's prompt, cut in its text, and its label."""
        mask = None if self.mask_token is None else tokenizer.id_to_token(self.mask_token)
        filled = [
            self.template.fill(str(one.text).strip(), None if one.pair is None else str(one.pair).strip(), mask)
            for one in examples
        ]
        encodings = tokenizer.encode_batch([one.text for one in filled])
        return [self._encoded(*row, limit) for row in zip(examples, filled, encodings, strict=True)]

    def _encoded(self, example: Example, filled: Filled, encoding: Encoding, limit: int | None) -> Encoded:
        """Return the tokens of a prompt, and which is the one whose logits count."""
        last = len(encoding.ids) if self.mask_token is not None else end_of_text(encoding)
        kept = list(range(last))
        excess = 0 if limit is None else len(kept) - limit
        if excess > 0:
            kept = self._cut(kept, excess, filled, encoding)
        rest = limit is not None and len(kept) > limit
        if rest or not kept:
            reason = f"a maximum length of {limit} tokens leaves no room for the text: the template takes {len(kept)}"
            return Encoded([Row([], [])], example.label, problem=reason if rest else "the prompt has no token")
        at = kept[-1]
        if self.mask_token is not None:
            start, end = filled.spans["mask"]
            places = [
                index
                for index in kept
                if encoding.ids[index] == self.mask_token
                and encoding.offsets[index][0] < end
                and encoding.offsets[index][1] > start
            ]
            if len(places) != 1:
                return Encoded([Row([], [])], example.label, problem="the tokenizer does not keep the template's mask")
            at = places[0]
        row = Row(
            [encoding.ids[index] for index in kept],
            [encoding.type_ids[index] for index in kept],
            [index == at for index in kept],
        )
        return Encoded([row], example.label, excess > 0)

    def counting_tokens(
        self,
        ids: NDArray[Any],
        inside: NDArray[np.bool_],
        marks: NDArray[Any] | None,
        problem: Callable[[int, str], None],
    ) -> NDArray[np.bool_]:
        """Return which tokens count: the last one of each prompt, or its mask."""
        if self.mask_token is None:
            return inside & ~np.pad(inside[:, 1:], ((0, 0), (0, 1)))
        counted: NDArray[np.bool_] = inside & (ids == self.mask_token)
        for row in np.flatnonzero(counted.sum(axis=1) != 1):
            problem(int(row), f"{counted[row].sum()} mask tokens ({self.mask_token}), expected one")
        return counted

    @staticmethod
    def _cut(kept: list[int], excess: int, filled: Filled, encoding: Encoding) -> list[int]:
        """Leave tokens out at the end of the text, or of the longer one of a pair, but at least one of each."""
        texts = [
            [index for index in kept if start <= encoding.offsets[index][0] < encoding.offsets[index][1] <= end]
            for place, (start, end) in filled.spans.items()
            if place != "mask"
        ]
        dropped: set[int] = set()
        while excess > len(dropped) and len(longest := max(texts, key=len)) > 1:
            dropped.add(longest.pop())
        return [index for index in kept if index not in dropped]


def with_template(bundle: Bundle, tokenizer: Tokenizer, template: str) -> Bundle:
    """Return the description of a bundle with another template.

    Parameters
    ----------
    bundle : Bundle
        Of the task ``prompt``.
    tokenizer : Tokenizer
        The bundle's.
    template : str

    Raises
    ------
    ValueError
        The bundle's graph does not fit to the template: it has a mask and the bundle none, or the reverse; or label
        words are other tokens in it.
    """
    if bundle.task is None or bundle.task.name != Prompt.name:
        name = "none" if bundle.task is None else repr(bundle.task.name)
        raise ValueError(f"{bundle.path}: templates belong to the task {Prompt.name!r}, and the bundle's is {name}")
    settings = bundle.task.settings
    wanted = settings["mask_token"] is not None
    if ("mask" in Template(template).places) != wanted:
        raise ValueError(f"the template {template!r} has {'no' if wanted else 'a'} {{mask}}, unlike the bundle's")
    tokens = label_tokens(tokenizer, template, settings["label_words"])
    if list(tokens) != list(settings["label_tokens"]):
        raise ValueError(
            f"the label words are the tokens {list(tokens)} in the template {template!r}, and the bundle has those of "
            f"{settings['label_tokens']}: prepare another bundle for this template"
        )
    return replace(bundle, task=TaskSpec(bundle.task.name, {**settings, "template": template}))


def label_tokens(tokenizer: Tokenizer, template: str, words: Sequence[str]) -> tuple[int, ...]:
    """Return the token of each label word, as it appears in a template.

    A word is taken as written, if the template has white space before it; else with a space before it, or, where a word
    is then not one token, as in a language without spaces, all are taken without.

    Parameters
    ----------
    tokenizer : Tokenizer
    template : str
        See :class:`Template`. The words are at ``{mask}``, or else after the end.
    words : sequence of str

    Returns
    -------
    tuple of int

    Raises
    ------
    ValueError
        The template is wrong, a word is not one token, or two words are the same one; names the tokens.
    """
    parsed = Template(template)
    before = parsed.before_word
    if not before.strip() and not parsed.starts_with_word:
        before = f".{before}"  # for what is at the place before
    masked = "mask" in parsed.places
    joints = ["", " "] if masked else [" ", ""]
    if not before or before[-1].isspace():
        joints = [""]
    start = _ids(tokenizer, before.rstrip() if masked else before)
    found = [[_ids(tokenizer, before + joint * (not word[:1].isspace()) + word) for word in words] for joint in joints]
    fitting = [ids for ids in found if all(row[:-1] == start for row in ids)]
    if not fitting:
        word, row = next((word, row) for word, row in zip(words, found[0], strict=True) if row[:-1] != start)
        if row[: len(start)] == start:
            reason = f"is the tokens {row[len(start) :]} after {before!r}, expected one: choose another word"
        else:
            reason = f"and {before!r} before it have tokens in common, {row}: let the template end in another way"
            if not masked and before[-1:].isspace():
                reason = f"takes the white space into its token with which the template {template!r} ends: leave it out"
        raise ValueError(f"the label word {word!r} {reason}")
    tokens = [row[-1] for row in fitting[0]]
    for index, token in enumerate(tokens):
        if token in tokens[:index]:
            raise ValueError(
                f"the label words {words[tokens.index(token)]!r} and {words[index]!r} are both token {token}"
            )
        if tokenizer.id_to_token(token) == getattr(tokenizer.model, "unk_token", None) is not None:
            raise ValueError(f"the label word {words[index]!r} is unknown to the tokenizer: choose another word")
    return tuple(tokens)


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False).ids)
