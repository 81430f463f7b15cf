"""What a bundle says that holds one stage of a pipeline: a part of a model's graph, and the weights that it reads."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Final, Self

from pocketzo.formats.fields import Fields

MOST_STAGES: Final = 64


@dataclass(frozen=True)
class StageSpec:
    """The field ``stage`` of ``bundle.json``.

    Attributes
    ----------
    number : int
        From 0.
    count : int
        How many stages the model has.
    graph_sha256, weights_sha256 : str
        SHA-256 of the whole model's graph, and of the file that tuning changes, as they were when it was split.
    takes : tuple of str
        The values that the stage before gives; they are inputs, except for those that this stage only passes on.
    gives : tuple of str
        The values that the next stage takes; none for the last one.
    """

    number: int
    count: int
    graph_sha256: str
    weights_sha256: str
    takes: tuple[str, ...]
    gives: tuple[str, ...]

    @property
    def passed(self) -> tuple[str, ...]:
        """The values that come from the stage before and go on unchanged."""
        return tuple(name for name in self.gives if name in self.takes)

    @property
    def is_last(self) -> bool:
        """Whether it computes the model's outputs."""
        return self.number == self.count - 1

    def described(self) -> dict[str, Any]:
        """Return the field as JSON."""
        return asdict(self)

    @classmethod
    def parse(cls, fields: Fields) -> Self:
        """Check the field; raises :class:`FieldError`."""
        count = fields.integer("count", 2, MOST_STAGES)
        number = fields.integer("number", 0, count - 1)
        takes, gives = (fields.names(key, empty=True) for key in ("takes", "gives"))
        if bool(takes) != (number > 0):
            raise fields.error("takes", "names of values, of every stage but the first")
        if bool(gives) != (number < count - 1):
            raise fields.error("gives", "names of values, of every stage but the last")
        return cls(number, count, fields.sha256("graph_sha256"), fields.sha256("weights_sha256"), takes, gives)
