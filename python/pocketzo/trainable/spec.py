"""The words of ``--train``: which weights are trained, and which tensors are added."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from pocketzo.arguments import compile_pattern
from pocketzo.errors import BundleError

OPTION: Final = "train"
SETS: Final = (
    "all, head, bias, norm, last:K, lora, prefix:N, adapter:R, ia3, alone parallel-adapter:R, or a regular expression "
    "of names"
)
_MOST: Final = 1 << 20


@dataclass(frozen=True)
class Layers:
    """Numbers of layers, from 0: ranges of which both ends belong to them; the end None is that of the last layer."""

    ranges: tuple[tuple[int, int | None], ...] = ((0, None),)
    text: str = "0-"

    def of(self, count: int) -> set[int]:
        """Return the numbers in a model of so many layers.

        Raises
        ------
        BundleError
            One of the ranges has none of the model's layers.
        """
        found: set[int] = set()
        for first, last in self.ranges:
            if first >= count or (last is not None and last >= count):
                raise BundleError(f"layers={self.text}: the model has {count} layers, 0 to {count - 1}")
            found.update(range(first, count if last is None else last + 1))
        return found


@dataclass(frozen=True)
class Choice:
    """Existing weights: ``kind`` is all, head, bias, norm, last or regex.

    Attributes
    ----------
    text : str
        As it was given; the name of the set.
    """

    text: str
    kind: str
    layers: int = 0
    pattern: re.Pattern[str] | None = None


@dataclass(frozen=True)
class Lora:
    """Low-rank matrices beside some projections; see :mod:`pocketzo.trainable.lora`."""

    text: str
    rank: int = 8
    alpha: float = 16.0
    targets: re.Pattern[str] | None = None
    layers: Layers = Layers()
    both: bool = True


@dataclass(frozen=True)
class Prefix:
    """Keys and values in front of those of the tokens."""

    text: str
    tokens: int


@dataclass(frozen=True)
class Adapter:
    """A bottleneck of so many units after the feed-forward part of each layer."""

    text: str
    units: int


@dataclass(frozen=True)
class ParallelAdapter:
    """A network of blocks of so many units beside the layers, alone; see :mod:`pocketzo.trainable.parallel`."""

    text: str
    units: int


@dataclass(frozen=True)
class Ia3:
    """A factor for each key, value and inner activation."""

    text: str


Part: TypeAlias = Choice | Lora | Prefix | Adapter | ParallelAdapter | Ia3

_COUNTED: Final[Mapping[str, Callable[[str, int], Part]]] = {
    "last": lambda text, count: Choice(text, "last", layers=count),
    "prefix": Prefix,
    "adapter": Adapter,
    "parallel-adapter": ParallelAdapter,
}
"""Words that a number follows."""


def parse(spec: object) -> tuple[Part, ...]:
    """Return the parts of a specification, such as ``"lora:r=8,layers=20-+norm"``.

    Raises
    ------
    TypeError
        It is no string.
    ValueError
        A part is not understood: names it, and what is expected.
    """
    if not isinstance(spec, str):
        raise TypeError(f"{OPTION} must be a str, got {spec!r}")
    texts = _split(spec)
    if "" in texts:
        raise ValueError(f"{OPTION}={spec!r} has an empty part: expected {SETS}, joined by +")
    if len(set(texts)) < len(texts):
        raise ValueError(f"{OPTION}={spec!r} names a part twice")
    parts = tuple(map(_part, texts))
    alone = next((part for part in parts if isinstance(part, ParallelAdapter)), None)
    if alone is not None and len(parts) > 1:
        raise ValueError(
            f"{OPTION}={spec!r}: {alone.text!r} is trained alone, beside a frozen model: leave the others out"
        )
    return parts


def _split(spec: str) -> list[str]:
    """Split at each ``+`` that is not escaped, nor in brackets: those belong to regular expressions."""
    texts, depth, start, escaped = [], 0, 0, False
    for index, letter in enumerate(spec):
        if not escaped and letter in "([{":
            depth += 1
        elif not escaped and letter in ")]}":
            depth -= 1
        elif not escaped and letter == "+" and depth <= 0:
            texts.append(spec[start:index])
            start = index + 1
        escaped = letter == "\\" and not escaped
    return [*texts, spec[start:]]


def _part(text: str) -> Part:
    word, colon, rest = text.partition(":")
    if text in ("all", "head", "bias", "norm"):
        return Choice(text, text)
    if word in _COUNTED:
        return _COUNTED[word](text, _integer(text, rest))
    if word == "lora":
        return Lora(text, **(_lora_options(rest) if colon else {}))
    if text == "ia3":
        return Ia3(text)
    return Choice(text, "regex", pattern=compile_pattern(OPTION, text))


def _lora_options(text: str) -> dict[str, Any]:
    readers: dict[str, tuple[str, Callable[[str, str], Any]]] = {
        "r": ("rank", _integer),
        "alpha": ("alpha", _positive),
        "targets": ("targets", lambda item, value: compile_pattern(item.partition("=")[0], value)),
        "layers": ("layers", _layers),
        "train": ("both", _trained),
    }
    found: dict[str, Any] = {}
    for item in re.split(r",(?=\w+=)", text):
        name, equals, value = item.partition("=")
        if not equals or name not in readers:
            raise ValueError(f"{item!r} of lora: expected {', '.join(f'{key}=' for key in readers)}")
        field, read = readers[name]
        if field in found:
            raise ValueError(f"{item!r} of lora: {name} is given twice")
        found[field] = read(item, value)
    return found


def _integer(item: str, value: str) -> int:
    if not re.fullmatch(r"[0-9]{1,7}", value) or not 1 <= int(value) <= _MOST:
        raise ValueError(f"{item!r}: expected an integer from 1 to {_MOST}, got {value!r}")
    return int(value)


def _positive(item: str, value: str) -> float:
    if not re.fullmatch(r"[0-9]+(\.[0-9]*)?(e-?[0-9]{1,2})?", value) or not 0 < float(value) < 1e9:
        raise ValueError(f"{item!r}: expected a number greater than 0, got {value!r}")
    return float(value)


def _trained(item: str, value: str) -> bool:
    if value not in ("B", "AB"):
        raise ValueError(f"{item!r}: expected B or AB, got {value!r}")
    return value == "AB"


def _layers(item: str, value: str) -> Layers:
    ranges: list[tuple[int, int | None]] = []
    for text in value.split(","):
        match = re.fullmatch(r"([0-9]{1,6})(-([0-9]{1,6})?)?", text)
        if match is None:
            raise ValueError(f"{item!r}: expected numbers and ranges from 0, such as 3,5-7 or 20-, got {text!r}")
        first = int(match[1])
        last = first if match[2] is None else None if match[3] is None else int(match[3])
        if last is not None and last < first:
            raise ValueError(f"{item!r}: the range {text!r} ends before it begins")
        ranges.append((first, last))
    return Layers(tuple(ranges), value)
