"""The template of a prompt: the text around an example's text, and where the label word goes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final, NamedTuple

_PLACES: Final = ("text", "pair", "mask")


class Filled(NamedTuple):
    """A template with an example in it.

    Attributes
    ----------
    text : str
    spans : mapping of str to (int, int)
        The first character of what is at each place of the template, and the one after its last.
    """

    text: str
    spans: Mapping[str, tuple[int, int]]


class Template:
    """A template such as ``"{text} All in all, it was"`` or ``"{text} It was {mask}."``.

    Its places are ``{text}``, for a pair ``{pair}``, and for masked models ``{mask}``; other braces are text.

    Parameters
    ----------
    template : str

    Attributes
    ----------
    places : tuple of str
        The places that it has, in their order.

    Raises
    ------
    ValueError
        There is no ``{text}``, or a place is there twice.
    """

    def __init__(self, template: str) -> None:
        self._pieces = re.split(f"{{({'|'.join(_PLACES)})}}", template)  # texts and the names between them
        self.places = tuple(self._pieces[1::2])
        if "text" not in self.places:
            raise ValueError(f"the template {template!r} has no place for the text: write {{text}} there")
        repeated = next((place for place in self.places if self.places.count(place) > 1), None)
        if repeated is not None:
            raise ValueError(f"the template {template!r} has {{{repeated}}} more than once")

    @property
    def before_word(self) -> str:
        """The text before the label word, from the place before it."""
        last = 2 * self.places.index("mask") if "mask" in self.places else -1
        return self._pieces[last]

    @property
    def starts_with_word(self) -> bool:
        """Whether nothing precedes the label word."""
        return self.places[0] == "mask" and not self._pieces[0]

    def fill(self, text: str, pair: str | None, mask: str | None) -> Filled:
        """Put an example into the template.

        Parameters
        ----------
        text : str
        pair : str or None
            The second text.
        mask : str or None
            The mask token.
        """
        values = {"text": text, "pair": pair, "mask": mask}
        filled = self._pieces[0]
        spans = {}
        for place, following in zip(self.places, self._pieces[2::2], strict=True):
            value = values[place]
            assert value is not None
            spans[place] = len(filled), len(filled) + len(value)
            filled += value + following
        return Filled(filled, spans)
