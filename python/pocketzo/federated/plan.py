"""The plan: all that the devices of a federation agree on before the first step."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final, Self

from pocketzo.arguments import check_integer, check_number
from pocketzo.errors import FederationError, JournalError
from pocketzo.formats import strict_json
from pocketzo.formats.bundle import Bundle
from pocketzo.formats.safetensors import file_sha256
from pocketzo.kernels import SPEC_VERSION
from pocketzo.tasks.metrics import metric_named
from pocketzo.train.recipe import BaseModel, DataUsed, Loop, Recipe, Session, Source, parse_dataclass

VERSION: Final = 1
_OWN: Final = ("task", "max_length", "tokenizer_sha256", "clip", "noise", "most_examples", "shared_draws")
"""What a journal's header has in ``federation``; it has the rest elsewhere."""
ALONE: Final = ("share", "pace", "candidates")
"""Settings of an optimizer that a federation does not have."""


@dataclass(frozen=True)
class Base:
    """The files that a run starts from, by their SHA-256, and how texts become inputs."""

    graph_sha256: str
    weights_sha256: str
    adapter_sha256: str | None
    task: dict[str, Any] | None
    max_length: int | None
    tokenizer_sha256: str | None

    @classmethod
    def of(cls, bundle: Bundle) -> Self:
        """Describe a bundle as it is on disk."""
        task = bundle.task
        return cls(
            graph_sha256=bundle.graph_sha256,
            weights_sha256=file_sha256(bundle.weights_path),
            adapter_sha256=None if bundle.adapter is None else file_sha256(bundle.trained_path),
            task=None if task is None else {"name": task.name, "settings": json.loads(json.dumps(dict(task.settings)))},
            max_length=bundle.max_length,
            tokenizer_sha256=None if bundle.tokenizer_path is None else file_sha256(bundle.tokenizer_path),
        )


@dataclass(frozen=True)
class Plan:
    """All that the devices of a federation agree on.

    Attributes
    ----------
    version, spec : int
        Of the protocol, and of the noise specification.
    base : Base
    method : dict
        The optimizer's settings; ``queries`` is the number of directions of a client in a round.
    steps : int
        Length of the run.
    batch_size : int
        Examples on which a client evaluates a round's directions.
    objective, metric : str
        Names of metrics: what is minimised, and by what evaluations are compared.
    eval_every : int or None
        Steps between evaluations.
    clip : float
        The largest absolute value of a scalar: clients and server clip to it.
    noise : float
        Standard deviation of the Gaussian noise that a client adds to its scalars, over the largest change that
        another client's data in its place could make to them; 0 for none.
    most_examples : int
        The most examples that a client counts with.
    shared_draws : bool
        Whether all clients of a round evaluate the same directions.
    """

    version: int
    spec: int
    base: Base
    method: dict[str, Any]
    steps: int
    batch_size: int
    objective: str
    metric: str
    eval_every: int | None
    clip: float
    noise: float
    most_examples: int
    shared_draws: bool

    def __post_init__(self) -> None:
        for name, got, known in (("version", self.version, VERSION), ("spec", self.spec, SPEC_VERSION)):
            if got != known:
                what = "protocol" if name == "version" else "noise specification"
                raise ValueError(f"the {what} has version {got} there and {known} here")
        check_number("clip", self.clip, positive=True)
        check_number("noise", self.noise)
        check_integer("most_examples", self.most_examples, 1, 2**32 - 1)
        if self.method.get("exact") is not True:
            raise ValueError("a federation needs a method with exact=True, or its clients' weights would differ")
        for name in ALONE:
            if self.method.get(name) is not None:
                raise ValueError(f"{name} is for one device: a client of a federation takes the draws that it is given")
        check_integer("queries", self.method.get("queries"), 1, 2**20)
        self.loop()

    def loop(self) -> Loop:
        """Return the settings of the training loop."""
        return Loop(
            steps=self.steps,
            batch_size=self.batch_size,
            eval_every=self.eval_every,
            metric=metric_named(self.metric).name,
            patience=None,
            snapshot_every=None,
            group_by_length=False,
            max_skipped=1,
            objective=metric_named(self.objective).name,
        )

    @property
    def queries(self) -> int:
        """Directions of a client in a round."""
        return int(self.method["queries"])

    @property
    def text(self) -> bytes:
        """The plan as a JSON object; equal plans have equal bytes."""
        return json.dumps(asdict(self), allow_nan=False, sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def parse(cls, text: bytes) -> Self:
        """Parse the bytes of a plan.

        Raises
        ------
        FederationError
            They are no plan, or one that this version of PocketZO cannot follow; says why.
        """
        try:
            plan: Self = parse_dataclass(cls, strict_json.parse(text), Path("the plan"), "plan")
        except (ValueError, TypeError, JournalError) as error:
            raise FederationError(f"the server's plan cannot be followed: {error}") from None
        if plan.text != text:
            raise FederationError("the server's plan is not written as PocketZO writes it")
        return plan

    # ---- as the header of a journal ----------------------------------------------------------------------------------

    def recipe(self, bundle: Path, session: Session, train: str, source: Source) -> Recipe:
        """Return the header of a journal of this plan on one device."""
        base = self.base
        described = asdict(self) | asdict(base)
        return Recipe(
            model=BaseModel(str(bundle.resolve()), base.graph_sha256, base.weights_sha256, base.adapter_sha256),
            method=self.method,
            loop=self.loop(),
            session=session,
            data=DataUsed(train=train, eval=None, source=source),
            federation={name: described[name] for name in _OWN} | {"version": self.version},
        )

    @classmethod
    def of(cls, recipe: Recipe, where: Path) -> Self:
        """Return the plan of a journal of a federation.

        Raises
        ------
        JournalError
            It is that of a run of one device.
        """
        if recipe.federation is None:
            raise JournalError(f"{where}: a run of one device, and not of a federation")
        known: Mapping[str, Any] = {
            **recipe.federation,
            **asdict(recipe.model),
            **asdict(recipe.loop),
            "spec": SPEC_VERSION,
            "method": recipe.method,
        }
        base = {own.name: known[own.name] for own in fields(Base)}
        own = {one.name: known[one.name] for one in fields(cls) if one.name != "base"}
        plan: Self = parse_dataclass(cls, own | {"base": base}, where, "plan")
        return plan


def start_of_chain(plan: bytes) -> Any:
    """Return a running SHA-256 over a plan, which goes on with the bytes of each entry (:func:`pack_entry`)."""
    return hashlib.sha256(plan)
