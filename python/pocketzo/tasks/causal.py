"""Language modelling, and the choice between continuations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pocketzo.tasks.tokens import TokenClassification

if TYPE_CHECKING:
    from pocketzo.formats.bundle import Bundle


class CausalLM(TokenClassification):
    """The next tokens of texts."""

    name: ClassVar[str] = "causal-lm"


class Choice(TokenClassification):
    """The likeliest of several continuations."""

    name: ClassVar[str] = "choice"
    settings: ClassVar[tuple[str, ...]] = ("loss", "per")

    def __init__(self, bundle: Bundle, *, per: Any = "sum", **settings: Any) -> None:
        super().__init__(bundle, **settings)
