"""What a run is: all that its journal's header holds, typed, written and read in this file alone."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args, get_type_hints

from pocketzo.data.columns import Columns
from pocketzo.errors import JournalError
from pocketzo.tasks.metrics import metric_named


@dataclass(frozen=True)
class BaseModel:
    """The bundle that the run started from.

    Attributes
    ----------
    bundle : str
        Absolute path at that time.
    graph_sha256, weights_sha256 : str
    """

    bundle: str
    graph_sha256: str
    weights_sha256: str


@dataclass(frozen=True)
class Loop:
    """The settings of the training loop; see :class:`pocketzo.Trainer`.

    ``objective`` is the name of the metric that is minimised, and None if it is a function of the caller's.
    """

    steps: int
    batch_size: int
    eval_every: int | None
    metric: str
    patience: int | None
    snapshot_every: int | None
    group_by_length: bool
    max_skipped: int
    objective: str | None

    @property
    def minimised(self) -> str:
        """What to call the numbers that are minimised: the loss, another metric, 1 - metric, or objective."""
        return "objective" if self.objective is None else metric_named(self.objective).cost_name

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "max_skipped", "eval_every", "patience", "snapshot_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        metric_named(self.metric)
        if self.objective is not None:
            metric_named(self.objective)


@dataclass(frozen=True)
class Session:
    """How the model was run, on which the roundings of losses depend.

    Attributes
    ----------
    threads : int
    forward_seconds : dict or None
        Seconds of a forward pass by number of threads, where the number was chosen by that.
    prepacked : bool
    """

    threads: int
    forward_seconds: dict[str, float] | None
    prepacked: bool

    @property
    def prepack(self) -> Literal["auto", False]:
        """What :func:`pocketzo.load` needs to compute the losses that the run would have had."""
        return "auto" if self.prepacked else False


@dataclass(frozen=True)
class Source:
    """Where the data was, for a command that takes the run up.

    Attributes
    ----------
    train, eval : str or None
        Absolute paths of the files.
    columns : Columns
        As given to :func:`pocketzo.load_dataset`.
    before : dict or None
        The evaluation before the first step.
    """

    train: str | None = None
    eval: str | None = None
    columns: Columns = field(default_factory=Columns)
    before: dict[str, float | None] | None = None


@dataclass(frozen=True)
class DataUsed:
    """The fingerprints of the training and evaluation data, and where they were."""

    train: str
    eval: str | None
    source: Source


@dataclass(frozen=True)
class Recipe:
    """The header of a run's journal.

    Attributes
    ----------
    model : BaseModel
    method : dict
        The optimizer's settings, as :func:`pocketzo.optim.methods.from_settings` takes them.
    loop : Loop
    session : Session
    data : DataUsed
    """

    model: BaseModel
    method: dict[str, Any]
    loop: Loop
    session: Session
    data: DataUsed

    def header(self) -> dict[str, Any]:
        """Return the fields for :meth:`pocketzo.formats.journal.Journal.create`."""
        return asdict(self)

    @classmethod
    def read(cls, header: Mapping[str, Any], path: Path) -> Self:
        """Make the recipe that a journal's header holds.

        Raises
        ------
        JournalError
            A field is missing, unknown or of another type; names it.
        """
        own = {name: value for name, value in header.items() if name not in ("format", "spec")}
        recipe: Self = _parse(cls, own, path, "header")
        return recipe


def _parse(cls: type[Any], given: object, path: Path, where: str) -> Any:
    """Make a dataclass from JSON, and check that the names and types are its own."""
    if not isinstance(given, Mapping):
        raise JournalError(f"{path}: {where} is {given!r}, expected an object")
    names = {field.name for field in fields(cls)}
    if names != set(given):
        wrong = ", ".join(sorted(names ^ set(given)))
        raise JournalError(f"{path}: {where} has not the fields of this version of PocketZO; these differ: {wrong}")
    hints = get_type_hints(cls)
    try:
        return cls(**{name: _value(hints[name], given[name], path, f"{where}.{name}") for name in names})
    except ValueError as error:
        raise JournalError(f"{path}: {where}: {error}") from None


def _value(hint: Any, given: Any, path: Path, where: str) -> Any:
    if is_dataclass(hint):
        return _parse(hint, given, path, where)  # type: ignore[arg-type]
    choices = get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kinds = tuple(getattr(choice, "__origin__", choice) for choice in choices)
    if type(given) not in kinds:
        raise JournalError(f"{path}: {where} is {given!r}, expected {hint}")
    return given
