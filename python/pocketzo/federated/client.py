"""A client of a federation: it turns an offer of the server into an answer, on its own data.

It gets no weights. It replays the entries that it misses onto its copy of the base, checks that its trained state has
the server's checksum, and evaluates the directions that it is asked for. Its folder is a run, so that ``pocketzo
replay`` rebuilds the model from it, too.
"""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from pocketzo.arguments import check_integer
from pocketzo.data.order import Data, Order
from pocketzo.errors import FederationError
from pocketzo.federated.plan import Base, Plan, start_of_chain
from pocketzo.federated.protocol import SHA256, Answer, Offer, Position, Reason, Refusal
from pocketzo.federated.state import state_sha256
from pocketzo.formats.journal import Entry, pack_entry
from pocketzo.optim.methods import from_settings
from pocketzo.optim.optimizer import Optimizer
from pocketzo.optim.program import float32
from pocketzo.runtime.model import Model
from pocketzo.tasks.objective import Objective, OnBatch, metric_objective
from pocketzo.tasks.registry import task_of
from pocketzo.train.evaluator import Evaluator, finite
from pocketzo.train.recipe import Session, Source
from pocketzo.train.run import JOURNAL, Run
from pocketzo.train.writer import RunWriter


class Client:
    """A client over a run folder, in which its journal is kept from round to round.

    Parameters
    ----------
    path : path
        The folder. If it holds the journal of a federation, the client goes on with that one.
    model : Model
        The bundle of the federation, loaded.
    train : Data
        On which directions are evaluated.
    eval : Data, optional
        On which the model is evaluated where the server asks for it. Only the metric and the number of examples leave
        the client.
    most_directions : int
        An offer that asks for more directions is refused, as they could keep the client busy for ever.
    source : Source, optional
        Location of the data, saved in the header.
    plan : bytes, optional
        If given, any other plan than this one (:attr:`Plan.text`) is refused.
    snapshot_every : int, optional
        Number of steps between snapshots of the weights, which make a start with a long journal fast.

    Attributes
    ----------
    plan : Plan or None
        None before the first offer.
    answers : int
        Rounds in which scalars left the client, on which the epsilon of ``noise`` depends.
    problem : str
        Why :meth:`reply` refused the last message; empty if it did not.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        model: Model,
        train: Data,
        *,
        eval: Data | None = None,  # noqa: A002
        most_directions: int = 1024,
        source: Source | None = None,
        plan: bytes | None = None,
        snapshot_every: int | None = None,
    ) -> None:
        check_integer("most_directions", most_directions, 1)
        if snapshot_every is not None:
            check_integer("snapshot_every", snapshot_every, 1)
        if not len(train):
            raise ValueError("train has no examples")
        self.path = Path(path)
        self.model = model
        self.plan: Plan | None = None
        self.answers = 0
        self.problem = ""
        self._train = train
        self._eval = eval
        self._most_directions = most_directions
        self._source = source or Source()
        self._base = Base.of(model.bundle)
        self._only = plan
        self._snapshot_every = snapshot_every
        self._optimizer: Optimizer | None = None
        self._writer: RunWriter | None = None
        self._evaluator: Evaluator | None = None
        self._text = b""
        self._running: Any = None  # SHA-256 of plan and entries
        if (self.path / JOURNAL).exists():
            self._resume(Run(self.path))

    def _resume(self, run: Run) -> None:
        plan = Plan.of(run.recipe, run.path)
        run.base(self.model.bundle.path)
        got, expected = self._train.fingerprint, run.recipe.data.train
        if got != expected:
            raise FederationError(f"{run.path}: began with other data: expected {expected}, got {got}")
        self._check_plan(plan)
        self._follow(plan, run.replay_onto(self.model))
        self._writer = RunWriter.resume(run, run.steps)
        for entry in run.entries:
            self._running.update(pack_entry(entry))
        self.answers = sum("scalars" in line for line in run.metrics())

    @property
    def step(self) -> int:
        """Steps of the journal that the weights have taken."""
        return 0 if self._optimizer is None else self._optimizer.step_number

    @property
    def state(self) -> str:
        """SHA-256 of the trained state, in hexadecimal; empty before the first offer."""
        return "" if self._optimizer is None else state_sha256(self._optimizer).hex()

    def reply(self, message: bytes) -> bytes:
        """Return the answer to a message of the server, or a refusal, whose reason :attr:`problem` gives in words."""
        self.problem = ""
        number = 0
        try:
            offer = Offer.decode(message)
            number = offer.id
            return self._answer(offer)
        except FederationError as error:
            self.problem = str(error)
            return Refusal(number, Reason.CONTRADICTION if number else Reason.MALFORMED).encode()
        except Exception as error:
            self.problem = str(error)
            if not number:
                raise
            return Refusal(number, Reason.FAILURE).encode()

    def handle(self, message: bytes) -> bytes:
        """Return the answer to a message of the server.

        Raises
        ------
        FederationError
            The message is malformed; or it contradicts the plan, the journal or the weights that this client has, or
            asks for what it does not grant. Journal and weights are as they were before.
        """
        return self._answer(Offer.decode(message))

    def _answer(self, offer: Offer) -> bytes:
        if not self._text and not offer.plan:
            return Position(offer.id, False, 0, bytes(SHA256)).encode()
        if self._text and offer.plan and offer.plan != self._text:
            raise FederationError("the server has another plan than the one that this client's run began with")
        if self.step < offer.step:
            return Position(offer.id, bool(self._text), self.step, self._chain(())).encode()
        self._take(offer)
        assert self.plan is not None
        if not offer.draws and not offer.wants_evaluation:
            return Answer(offer.id, (), self._examples(self.plan)).encode()
        return self._evaluate(self.plan, offer).encode()

    # ---- entries -----------------------------------------------------------------------------------------------------

    def _take(self, offer: Offer) -> None:
        """Check an offer, and replay the entries that are new; afterwards the state is that of the server."""
        step = self.step
        if step > offer.end:
            raise FederationError(
                f"the server is after step {offer.end}, and this client after step {step}: the server has lost steps"
            )
        plan = self.plan
        if plan is None:
            if self._only is not None and offer.plan != self._only:
                raise FederationError("the server has another plan than the one that this client expects")
            plan = Plan.parse(offer.plan)
            self._check_plan(plan)
        fresh = offer.entries[step - offer.step :]
        if self._chain(fresh, offer.plan) != offer.chain:
            raise FederationError(
                f"the hash chain of the journal breaks: after step {offer.end} plan and entries have another SHA-256 "
                f"than the server says"
            )
        if offer.draws and len(offer.draws) != plan.queries:
            raise FederationError(f"the server asks for {len(offer.draws)} directions, the plan has {plan.queries}")
        optimizer = self._optimizer or self._new_optimizer(plan)
        _check_entries(optimizer, fresh, plan)
        if offer.draws and offer.draws.start < _next_draw(optimizer, fresh):
            raise FederationError(f"the server asks for draw {offer.draws.start}, which a step before has used")
        optimizer.replay(fresh)
        if (got := state_sha256(optimizer)) != offer.state:
            self._undo()
            raise FederationError(
                f"after step {offer.end} the trained state has SHA-256 {got.hex()} here and {offer.state.hex()} on the "
                f"server"
            )
        if self._writer is None:
            self._writer = RunWriter.begin(self.path, self._recipe(plan))
            self._follow(plan, optimizer)
        for entry in fresh:
            self._writer.append(entry)
            self._running.update(pack_entry(entry))
        every = self._snapshot_every
        if every is not None and optimizer.step_number // every > step // every:
            self._writer.snapshot(optimizer)

    def _follow(self, plan: Plan, optimizer: Optimizer) -> None:
        self.plan, self._text, self._optimizer = plan, plan.text, optimizer
        self._running = start_of_chain(self._text)
        task = task_of(self.model.bundle)
        self._objective = Objective(metric_objective(plan.objective, self.model.bundle), task)
        self._order = Order(
            seed=optimizer.seed, size=len(self._train), batch_size=min(plan.batch_size, len(self._train))
        )
        if self._eval is not None:
            self._evaluator = Evaluator(self.model, self._eval, plan.batch_size, (plan.metric,))

    def _check_plan(self, plan: Plan) -> None:
        for name, expected in vars(plan.base).items():
            if (got := getattr(self._base, name)) != expected:
                raise FederationError(
                    f"{self.model.bundle.path}: not the base of the federation: {name} is {got} here and {expected} "
                    f"there"
                )
        if plan.queries > self._most_directions:
            raise FederationError(
                f"the plan has {plan.queries} directions a round, and this client evaluates at most "
                f"{self._most_directions}"
            )

    def _new_optimizer(self, plan: Plan) -> Optimizer:
        try:
            return from_settings(self.model, plan.method)
        except ValueError as error:
            raise FederationError(f"the plan's method cannot be followed: {error}") from None

    def _recipe(self, plan: Plan) -> Any:
        model = self.model
        seconds = {str(count): taken for count, taken in model.forward_seconds.items()} or None
        session = Session(threads=model.threads, forward_seconds=seconds, prepacked=model.prepacked)
        return plan.recipe(model.bundle.path, session, self._train.fingerprint, self._source)

    def _chain(self, fresh: Sequence[Entry], plan: bytes = b"") -> bytes:
        """Return the SHA-256 of plan and entries, with these after those that the journal has."""
        running = start_of_chain(plan) if self._running is None else self._running.copy()
        for entry in fresh:
            running.update(pack_entry(entry))
        digest: bytes = running.digest()
        return digest

    def _undo(self) -> None:
        """Set weights and optimizer to what the journal says."""
        if self._writer is None:
            self.model.weights.read()
        else:
            self._writer.sync()
            self._optimizer = Run(self.path).replay_onto(self.model)

    # ---- evaluations -------------------------------------------------------------------------------------------------

    def _examples(self, plan: Plan) -> int:
        return min(len(self._train), plan.most_examples)

    def _evaluate(self, plan: Plan, offer: Offer) -> Answer:
        started = time.perf_counter()
        optimizer = self._optimizer
        assert optimizer is not None
        assert self._writer is not None
        evaluated, value = 0, 0.0
        if offer.wants_evaluation and self._evaluator is not None and self._eval is not None and not plan.noise:
            found = self._evaluator().values.get(plan.metric)
            if found is not None and math.isfinite(found):
                evaluated, value = len(self._eval), found
        scalars: list[float] = []
        loss = math.nan
        if offer.draws:
            batch = self._train.batch(self._order(self.step))
            estimate, losses = optimizer.estimate(offer.draws, OnBatch(self._objective, batch, 1))
            loss = optimizer.loss(losses)
            scalars = [estimate[draw] for draw in offer.draws]
            if not all(map(math.isfinite, scalars)):
                raise FloatingPointError("a loss on this client's data is not finite")
            scalars = [float32(value) for value in _with_noise(scalars, plan)]
            line = {"step": self.step, "loss": finite(loss), "scalars": len(scalars)}
            self._writer.log(line | {"seconds": round(time.perf_counter() - started, 6)})  # before anything leaves
            self.answers += 1
        return Answer(
            id=offer.id,
            scalars=scalars,
            examples=self._examples(plan),
            evaluated=evaluated,
            value=float32(value),
            loss=math.nan if plan.noise else float32(loss),
        )

    def close(self) -> None:
        """Write everything to storage and release the folder."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _next_draw(optimizer: Optimizer, fresh: Sequence[Entry]) -> int:
    return max(fresh[-1].coefficients) + 1 if fresh else optimizer.next_draw


def _check_entries(optimizer: Optimizer, fresh: Sequence[Entry], plan: Plan) -> None:
    """Check that entries are those of the next steps, with the plan's learning rates and draws not used before."""
    first = optimizer.step_number
    if first + len(fresh) > plan.steps:
        raise FederationError(f"the server sent steps up to {first + len(fresh)}, the plan has {plan.steps}")
    draw = optimizer.next_draw
    for step, entry in enumerate(fresh, first):
        if entry.lr not in (optimizer.lr_of(step), 0.0):
            raise FederationError(f"step {step} has lr {entry.lr}, the plan has {optimizer.lr_of(step)}")
        if min(entry.coefficients) < draw:
            raise FederationError(f"step {step} has draw {min(entry.coefficients)}, which a step before has used")
        draw = max(entry.coefficients) + 1


def _with_noise(scalars: Sequence[float], plan: Plan) -> list[float]:
    """Return clipped scalars with the plan's noise.

    Whatever the data is, the vector of n clipped scalars changes by at most 2 clip sqrt(n).
    """
    clipped = [min(max(value, -plan.clip), plan.clip) for value in scalars]
    if not plan.noise:
        return clipped
    deviation = plan.noise * 2 * plan.clip * math.sqrt(len(clipped))
    source = random.SystemRandom()
    return [value + source.gauss(0.0, deviation) for value in clipped]
