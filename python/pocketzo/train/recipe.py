"""The header of a run's journal as typed dataclasses; only this module writes and reads it."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Final, Literal, Self, get_args, get_origin, get_type_hints

from pocketzo.arguments import check_integer, plain
from pocketzo.data.columns import Columns
from pocketzo.errors import JournalError
from pocketzo.machine.paths import local_path, portable_path
from pocketzo.tasks.metrics import metric_named


@dataclass(frozen=True)
class BaseModel:
    """The base bundle of the run.

    Attributes
    ----------
    bundle : str
        Absolute path when the run began.
    graph_sha256, weights_sha256 : str
    adapter_sha256 : str or None
        None if the bundle has no adapter.
    init_sha256 : str or None
        Of the run's file of the values that weights began with, if they were others than the bundle's.
    """

    bundle: str
    graph_sha256: str
    weights_sha256: str
    adapter_sha256: str | None = None
    init_sha256: str | None = None


@dataclass(frozen=True)
class Loop:
    """The settings of the training loop; see :class:`pocketzo.Trainer`.

    ``objective`` is the name of the metric that is minimised, or None if the caller gave a function. The roundings of
    losses depend on ``activation_memory``.
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
    activation_memory: int | None = None

    @property
    def minimised(self) -> str:
        """Label of the minimised values: the loss, another metric, 1 - metric, or objective."""
        return "objective" if self.objective is None else metric_named(self.objective).cost_name

    def __post_init__(self) -> None:
        required = ("steps", "batch_size", "max_skipped")
        for name in (*required, "eval_every", "patience", "snapshot_every", "activation_memory"):
            value = getattr(self, name)
            if value is not None or name in required:
                check_integer(name, value, 1)
        if not isinstance(self.group_by_length, bool):
            raise TypeError(f"group_by_length must be a bool, got {self.group_by_length!r}")
        metric_named(self.metric)
        if self.objective is not None:
            metric_named(self.objective)

    def evaluates_after(self, step: int) -> bool:
        """Return whether there is an evaluation after so many steps."""
        return step in (0, self.steps) or (self.eval_every is not None and step % self.eval_every == 0)

    def out_of_patience(self, evaluations: Mapping[int, Mapping[str, float | None]]) -> bool:
        """Return whether none of the last ``patience`` evaluations, by their steps, was better than all before."""
        if self.patience is None or not evaluations:
            return False
        steps = sorted(evaluations)
        metric = metric_named(self.metric)
        best = max(steps, key=lambda step: metric.score(evaluations[step]))
        return len(steps) - 1 - steps.index(best) >= self.patience


@dataclass(frozen=True)
class Session:
    """Settings of the onnxruntime session; the rounding of losses depends on them.

    Attributes
    ----------
    threads : int
    forward_seconds : dict or None
        Seconds per forward pass by number of threads, if these timings chose the number.
    prepacked : bool
    cache : str or None
        How activations at the cut were kept, fp32, fp16 or int8; None if the whole model was run.
    cache_folder : str or None
        Of the activation cache.
    """

    threads: int
    forward_seconds: dict[str, float] | None
    prepacked: bool
    cache: str | None = None
    cache_folder: str | None = None

    @property
    def prepack(self) -> Literal["auto", False]:
        """Argument of :func:`pocketzo.load` that reproduces the run's losses."""
        return "auto" if self.prepacked else False


@dataclass(frozen=True)
class Source:
    """Location of the data, for a command that resumes the run.

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

    @classmethod
    def of(cls, train: Path, evaluated: Path | None, columns: Columns) -> Self:
        """Return the source of files, which are then found from any folder."""
        return cls(str(train.resolve()), None if evaluated is None else str(evaluated.resolve()), columns)


@dataclass(frozen=True)
class DataUsed:
    """Fingerprints and locations of the training and evaluation data."""

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
        The optimizer's settings, for :func:`pocketzo.optim.methods.from_settings`.
    loop : Loop
    session : Session
    data : DataUsed
    federation : dict or None
        What else the devices of a federation agree on; None for a run of one device.
    sweep : dict or None
        How the learning rate was found (:class:`pocketzo.train.sweep.Sweep`); None if it was given.
    """

    model: BaseModel
    method: dict[str, Any]
    loop: Loop
    session: Session
    data: DataUsed
    federation: dict[str, Any] | None = None
    sweep: dict[str, Any] | None = None

    @property
    def takes_queries(self) -> bool:
        """Whether the model has to be loaded for several directions at once."""
        return self.method.get("share") is not None

    def header(self) -> dict[str, Any]:
        """Return the fields for :meth:`pocketzo.formats.journal.Journal.create`."""
        fields = asdict(self)
        if self.loop.activation_memory is None:  # the header is then that of journals before there was such a figure
            del fields["loop"]["activation_memory"]
        if self.session.cache is None:
            del fields["session"]["cache"], fields["session"]["cache_folder"]
        if self.model.adapter_sha256 is None:
            del fields["model"]["adapter_sha256"]
        if self.model.init_sha256 is None:
            del fields["model"]["init_sha256"]
        if self.federation is None:
            del fields["federation"]
        if self.sweep is None:
            del fields["sweep"]
        return _with_paths(plain(fields), portable_path)

    @classmethod
    def read(cls, header: Mapping[str, Any], path: Path) -> Self:
        """Parse a journal's header.

        Raises
        ------
        JournalError
            A field is missing, unknown or of another type; the message names it.
        """
        own = _with_paths({name: value for name, value in header.items() if name not in ("format", "spec")}, local_path)
        recipe: Self = parse_dataclass(cls, own, path, "header")
        return recipe


_FOLDER: Final = ("session", "cache_folder")


def _with_paths(header: Mapping[str, Any], convert: Callable[[str], str]) -> dict[str, Any]:
    """Return a copy of a header with its paths converted."""
    copied = copy.deepcopy(dict(header))
    for *parents, name in (("model", "bundle"), ("data", "source", "train"), ("data", "source", "eval"), _FOLDER):
        part: Any = copied
        for parent in parents:
            part = part.get(parent) if isinstance(part, dict) else None
        if isinstance(part, dict) and isinstance(part.get(name), str):
            part[name] = convert(part[name])
    return copied


def parse_dataclass(cls: type[Any], given: object, path: Path, where: str) -> Any:
    """Make a dataclass from JSON; check the names and types of its fields.

    A field with a default may be missing: such fields were added after the journal was written.
    """
    if not isinstance(given, Mapping):
        raise JournalError(f"{path}: {where} is {given!r}, expected an object")
    known = fields(cls)
    for unknown in sorted(set(given) - {own.name for own in known}):
        raise JournalError(f"{path}: {where} has {unknown!r}, a setting that this version of PocketZO does not have")
    for own in known:
        if own.name not in given and own.default is MISSING and own.default_factory is MISSING:
            raise JournalError(f"{path}: {where}.{own.name} is missing")
    hints = get_type_hints(cls)
    try:
        return cls(**{name: _value(hints[name], value, path, f"{where}.{name}") for name, value in given.items()})
    except ValueError as error:
        raise JournalError(f"{path}: {where}: {error}") from None


def _value(hint: Any, given: Any, path: Path, where: str) -> Any:
    if is_dataclass(hint):
        return parse_dataclass(hint, given, path, where)  # type: ignore[arg-type]
    if not _fits(hint, given):
        expected = hint.__name__ if isinstance(hint, type) else hint
        raise JournalError(f"{path}: {where} is {given!r}, expected {expected}")
    return given


def _fits(hint: Any, given: object) -> bool:
    """Whether a value from JSON has a type; an integer also fits float."""
    if isinstance(hint, types.UnionType):
        return any(_fits(choice, given) for choice in get_args(hint))
    if get_origin(hint) is dict:
        return isinstance(given, dict) and all(_fits(get_args(hint)[1], value) for value in given.values())
    return hint is Any or type(given) is hint or (hint is float and type(given) is int)
