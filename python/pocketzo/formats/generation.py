"""What a bundle of a language model holds for generating text: a second graph over the same weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Self

from pocketzo.formats.fields import Fields

GENERATE: Final = "generate.onnx"
CHAT_TEMPLATE: Final = "chat_template.jinja"


@dataclass(frozen=True)
class Generation:
    """The field ``generation`` of ``bundle.json``.

    Attributes
    ----------
    graph_sha256 : str
        SHA-256 of ``generate.onnx``: the graph as it was exported, with its cache. It reads the bundle's weights.
    eos : tuple of int
        The tokens that end a text; may be empty.
    chat_template : str or None
        The name of the file of the chat template in the folder, in Jinja; None if the model has none.
    special_tokens : mapping of str to str
        The special tokens that the chat template may name, such as ``{"bos_token": "<s>"}``.
    """

    graph_sha256: str
    eos: tuple[int, ...] = ()
    chat_template: str | None = None
    special_tokens: Mapping[str, str] = field(default_factory=dict)

    def described(self) -> dict[str, Any]:
        """Return the field as JSON."""
        return {
            "graph_sha256": self.graph_sha256,
            "eos": list(self.eos),
            "chat_template": self.chat_template,
            "special_tokens": dict(self.special_tokens),
        }

    @classmethod
    def parse(cls, fields: Fields) -> Self:
        """Check the field; raises :class:`FieldError`."""
        eos = fields.plain().get("eos")
        if not isinstance(eos, list) or not all(type(token) is int and 0 <= token < 2**31 for token in eos):
            raise fields.error("eos", "a list of token ids")
        if fields.optional_text("chat_template") not in (None, CHAT_TEMPLATE):
            raise fields.error("chat_template", f"{CHAT_TEMPLATE!r} or null")
        tokens = fields.object("special_tokens")
        return cls(
            fields.sha256("graph_sha256"),
            tuple(eos),
            fields.optional_text("chat_template"),
            {name: tokens.text(name) for name in tokens.plain()},
        )
