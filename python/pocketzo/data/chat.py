"""Chats as text, by the template that a model was trained with.

A template is Jinja that came with the model, and so may come from anywhere. It is rendered in Jinja's sandbox, with the
names that transformers gives to it: ``messages``, ``add_generation_prompt``, the special tokens, ``raise_exception``,
``strftime_now``, and the filter ``tojson``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from pocketzo.errors import DataError, first_line
from pocketzo.formats.generation import CHAT_TEMPLATE
from pocketzo.packages import require

if TYPE_CHECKING:
    from jinja2 import Template, parser

    from pocketzo.formats.bundle import Bundle


MARKS: Final = "\ufdd0", "\ufdd1"
"""What may be put around what a template says to be the assistant's: no characters, which no text has."""


def chat_text(
    bundle: Bundle, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, mark: bool = False
) -> str:
    """Return a chat as the text that a bundle's model reads, by the model's own template.

    The text holds all special tokens that the model needs: tokenise it without adding others.

    Parameters
    ----------
    bundle : Bundle
    messages : sequence of mapping
        ``{"role": "user", "content": "..."}`` each, the oldest first.
    add_generation_prompt : bool
        Whether to add the beginning of the assistant's next message.
    mark : bool
        Whether to put :data:`MARKS` around what is between ``{% generation %}`` and ``{% endgeneration %}``.

    Raises
    ------
    DataError
        The bundle has no chat template, or it cannot be used for these messages; says why.
    MissingExtraError
        jinja2 is not installed.
    """
    generation = bundle.generation
    if generation is None or generation.chat_template is None:
        raise DataError(
            f"{bundle.path}: the bundle has no chat template: prepare the model with {CHAT_TEMPLATE} or "
            "tokenizer_config.json beside it, or give a text that is no chat"
        )
    template = (bundle.path / generation.chat_template).read_text(encoding="utf-8")
    return render(template, generation.special_tokens, messages, add_generation_prompt=add_generation_prompt, mark=mark)


def render(
    template: str,
    special_tokens: Mapping[str, str],
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool,
    mark: bool = False,
) -> str:
    """Render a chat template; as :func:`chat_text`.

    Parameters
    ----------
    template : str
        In Jinja.
    special_tokens : mapping of str to str
        The tokens that the template may name, such as ``{"bos_token": "<s>"}``.
    messages, add_generation_prompt, mark
        See :func:`chat_text`.

    Raises
    ------
    DataError
        The template is no Jinja, refuses the messages, or cannot be rendered with them; says why.
    MissingExtraError
        jinja2 is not installed.
    """
    compiled = _compiled(template, mark)
    given = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
    try:
        return compiled.render(**given, **{name: token for name, token in special_tokens.items() if name not in given})
    except Exception as error:  # a template is a program: it may divide by zero, or add a number to a text
        roles = ", ".join(str(message.get("role")) for message in messages[:6]) + ", ..." * (len(messages) > 6)
        raise DataError(
            f"the chat template cannot be used for these messages (of {roles or 'nobody'}): {first_line(error)}"
        ) from error


@lru_cache(maxsize=4)
def _compiled(template: str, mark: bool) -> Template:
    require("jinja2")
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}`` marks what the assistant says; unless marked, it renders as if it were not there."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: parser.Parser) -> list[nodes.Node]:
            next(parser.stream)
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            start, end = (nodes.Output([nodes.TemplateData(text)]) for text in MARKS)
            return [start, *body, end] if mark else body

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda format: datetime.now().strftime(format),  # noqa: A006
    }
    environment.filters["tojson"] = _json  # Jinja's own escapes what HTML would not take
    try:
        return environment.from_string(template)
    except TemplateError as error:
        line = getattr(error, "lineno", None)
        where = "" if line is None else f" (line {line})"
        raise DataError(f"the chat template is not Jinja: {first_line(error)}{where}") from error


def _json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
