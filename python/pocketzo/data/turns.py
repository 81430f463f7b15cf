"""Which characters of a rendered chat the assistant says."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from pocketzo.data.chat import MARKS, chat_text
from pocketzo.errors import DataError

if TYPE_CHECKING:
    from pocketzo.formats.bundle import Bundle

Span: TypeAlias = tuple[int, int]

ASSISTANT: Final = "assistant"


def answers(bundle: Bundle, messages: Sequence[Any]) -> tuple[str, list[Span]]:
    """Return a chat as text, and where in it the assistant's messages are, with what ends each.

    A template says it by ``{% generation %}``. Of another one, an answer begins where the text ends that the model is
    given to continue, and ends where the chat up to this answer ends.

    Parameters
    ----------
    bundle : Bundle
        With a chat template.
    messages : sequence of mapping
        ``{"role": "user", "content": "..."}`` each.

    Returns
    -------
    text : str
    spans : list of (int, int)
        The first character of each answer and the one after its last. Spaces at its end are not part of it.

    Raises
    ------
    DataError
        The messages are no chat, none is the assistant's, there is no chat template, it cannot be used for these
        messages, or it changes an answer, so that it cannot be found.
    MissingExtraError
        jinja2 is not installed.
    """
    for number, message in enumerate(messages):
        if not isinstance(message.get("role") if isinstance(message, dict) else None, str):
            raise DataError(f"message {number} is no object with a 'role' and a 'content'")
    own = [number for number, message in enumerate(messages) if message["role"] == ASSISTANT]
    if not own:
        raise DataError(f"no message has the role {ASSISTANT!r}, whose text is learnt")
    marked = chat_text(bundle, messages, add_generation_prompt=False, mark=True)
    text, spans = _unmarked(marked)
    if not spans:
        spans = [_answer(bundle, text, messages, number) for number in own]
    trimmed = [(start, start + len(text[start:end].rstrip())) for start, end in spans]
    return text, [(start, end) for start, end in trimmed if start < end]


def _unmarked(marked: str) -> tuple[str, list[Span]]:
    """Return a text without its marks, and what is between them."""
    pieces = re.split(f"[{''.join(MARKS)}]", marked)
    text, spans = pieces[0], []
    for inside, outside in zip(pieces[1::2], pieces[2::2], strict=True):
        spans.append((len(text), len(text) + len(inside)))
        text += inside + outside
    return text, spans


def _answer(bundle: Bundle, text: str, messages: Sequence[Mapping[str, Any]], number: int) -> Span:
    """Return where in the text of a chat one of its messages is."""
    content = messages[number].get("content")
    content = content.strip() if isinstance(content, str) else ""
    earlier, message = list(messages[:number]), messages[number]
    before = chat_text(bundle, earlier, add_generation_prompt=True) if earlier else ""
    through = chat_text(bundle, [*earlier, message], add_generation_prompt=False)
    blank = chat_text(bundle, [*earlier, {**message, "content": MARKS[0]}], add_generation_prompt=False)
    head, _, ending = blank.partition(MARKS[0])
    # The prompt may begin to reason, which the chat leaves out; or the chat may, which the prompt leaves to the model.
    starts = [len(one) for one in (before, head) if one and text.startswith(one)]
    start = min(starts, default=0)
    if text.startswith(through):
        return start, len(through)
    at = text.find(content, start) if content and (starts or not head) else -1
    if at < 0:
        raise DataError(
            f"the chat template changes message {number}, the assistant's, so that it is not found in the text: use a "
            "template that marks it by {% generation %}"
        )
    end = at + len(content)
    return start, end + _shared(ending, text[end:])


def _shared(a: str, b: str) -> int:
    """Return how many characters two texts have in common at their beginning."""
    return next((at for at, (one, other) in enumerate(zip(a, b, strict=False)) if one != other), min(len(a), len(b)))
