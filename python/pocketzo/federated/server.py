"""The server of a federation: it keeps the journal, and turns the answers of a round into one entry.

It holds no data and runs no model. Its copy of the trained weights, onto which it replays each entry, gives the
checksum that clients compare theirs with.
"""

from __future__ import annotations

import math
import os
import secrets
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

from pocketzo.arguments import check_integer, plain
from pocketzo.errors import FederationError, JournalError
from pocketzo.federated.draws import draws_of_round, merge
from pocketzo.federated.plan import VERSION, Base, Plan, start_of_chain
from pocketzo.federated.protocol import Answer, Offer, Position, Refusal, Reply, decode_reply
from pocketzo.federated.state import state_sha256
from pocketzo.formats import strict_json
from pocketzo.formats.bundle import Bundle
from pocketzo.formats.journal import Entry, pack_entry
from pocketzo.kernels import SPEC_VERSION
from pocketzo.optim.methods import METHODS
from pocketzo.optim.program import float32
from pocketzo.tasks.metrics import metric_named
from pocketzo.tasks.registry import task_of
from pocketzo.train.evaluator import finite
from pocketzo.train.recipe import Session, Source
from pocketzo.train.run import EVAL, Run, Unloaded
from pocketzo.train.soundness import check_start
from pocketzo.train.writer import RunWriter

ABSURD: Final = 1000.0
"""A scalar of more than so many times ``clip`` is no estimate: the whole answer is rejected."""
_CLIENTS: Final = "of the clients of a federation"


@dataclass(frozen=True)
class RoundInfo:
    """What became of a round.

    Attributes
    ----------
    step : int
        The steps before it.
    entry : Entry or None
        The step that was taken; None if no answer came in time.
    clients : tuple of str
        Those whose answers were merged.
    rejected : mapping of str to str
        By client, why its last message was rejected.
    loss : float
        Mean of the clients' losses at the weights before the step; NaN if none was given.
    evaluation : float
        Mean of the plan's metric over the clients' evaluated examples; NaN if none was given.
    down, up : mapping of str to int
        By client, the bytes of the messages to it and from it.
    """

    step: int
    entry: Entry | None
    clients: tuple[str, ...]
    rejected: Mapping[str, str]
    loss: float
    evaluation: float
    down: Mapping[str, int]
    up: Mapping[str, int]


@dataclass
class _Round:
    """An open round: the offers that were made, by their ids, and the answers that came."""

    step: int
    draws: Mapping[str, range]
    wants_evaluation: bool
    started: float
    offers: dict[int, str] = field(default_factory=dict)
    caught_up: set[str] = field(default_factory=set)
    answers: dict[str, Answer] = field(default_factory=dict)
    rejected: dict[str, str] = field(default_factory=dict)
    down: Counter[str] = field(default_factory=Counter)
    up: Counter[str] = field(default_factory=Counter)


class Server:
    """The server of a federation over a run folder; create with :meth:`begin` or :meth:`resume`.

    A round is :meth:`open`, :meth:`receive` for each message that comes, and :meth:`close_round`. After the last step,
    a round asks all clients to catch up and evaluate, and takes no step.

    Attributes
    ----------
    plan : Plan
    path : Path
        The run's folder. It is one as of :class:`pocketzo.Trainer`, so that ``pocketzo replay`` rebuilds the model.
    """

    def __init__(self, run: Run, base: Bundle, snapshot_every: int | None = None) -> None:
        if snapshot_every is not None:
            check_integer("snapshot_every", snapshot_every, 1)
        self._snapshot_every = snapshot_every
        self.path = run.path
        self.plan = Plan.of(run.recipe, run.path)
        self._plan_text = self.plan.text
        found = Base.of(base)
        if found != self.plan.base:
            raise JournalError(f"{base.path}: not the bundle that the run {run.path} started from")
        self._optimizer = run.replay_onto(Unloaded(base))
        self._writer = RunWriter.resume(run, run.steps)
        self._entries: list[Entry] = []
        self._running = start_of_chain(self._plan_text)
        self._chains = [self._running.digest()]
        for entry in run.entries:
            self._keep(entry)
        self._state = state_sha256(self._optimizer)
        self._steps_of: dict[str, int] = {}  # how far each client is, as far as is known
        self._round: _Round | None = None
        self.evaluations = {step: values for step, values in run.evaluations().items() if step <= run.steps}

    @classmethod
    def begin(
        cls,
        path: str | os.PathLike[str],
        bundle: str | os.PathLike[str] | Bundle,
        *,
        steps: int,
        batch_size: int,
        method: str = "mezo",
        objective: str = "loss",
        metric: str | None = None,
        eval_every: int | None = None,
        clip: float = 100.0,
        noise: float = 0.0,
        most_examples: int = 10_000,
        shared_draws: bool = False,
        **settings: Any,
    ) -> Self:
        """Write the journal of a new run, and return its server.

        Parameters
        ----------
        path : path
            The run's folder, which holds no run yet.
        bundle : path or Bundle
            What all clients have a copy of.
        steps : int
            Length of the run.
        batch_size, objective, metric, eval_every, clip, noise, most_examples, shared_draws
            See :class:`pocketzo.federated.plan.Plan`; by default the metric is the task's.
        method : str
            A name in :data:`pocketzo.optim.methods.METHODS`.
        **settings
            The optimizer's, as lr, eps, seed and queries: the directions of a client in a round.
        """
        base = bundle if isinstance(bundle, Bundle) else Bundle.read(Path(bundle))
        if settings.get("exact") is False:
            raise ValueError("a federation needs exact=True, or its clients' weights would differ")
        task = task_of(base)
        task.metric(objective)
        if objective == "loss" and base.loss is None:
            raise ValueError(f"{base.path}: the graph has no loss output; give an objective")
        optimizer = METHODS[method](Unloaded(base), **{**settings, "exact": True})
        check_start(optimizer, steps)
        plan = Plan(
            version=VERSION,
            spec=SPEC_VERSION,
            base=Base.of(base),
            method=optimizer.settings(),
            steps=steps,
            batch_size=batch_size,
            objective=objective,
            metric=task.metric().name if metric is None else task.metric(metric).name,
            eval_every=eval_every,
            clip=float(clip),
            noise=float(noise),
            most_examples=most_examples,
            shared_draws=shared_draws,
        )
        if math.isnan(optimizer.lr):
            raise ValueError(
                "lr must be a number in a federation, got 'auto': no device has all the data to find it on"
            )
        largest = max(optimizer.group_of(name).lr for name in optimizer.names)
        if not math.isfinite(float32(largest * plan.clip * optimizer.lr)):
            raise ValueError(f"clip {clip:g} and lr {optimizer.lr:g} give steps beyond float32")
        text = strict_json.parse(strict_json.dump(plain({"method": plan.method})))
        plan = Plan(**{**vars(plan), "method": text["method"]})  # as it is after a journey through JSON
        recipe = plan.recipe(base.path, Session(1, None, False), _CLIENTS, Source())
        with closing(RunWriter.begin(Path(path), recipe)):
            pass
        return cls.resume(path, base)

    @classmethod
    def resume(
        cls,
        path: str | os.PathLike[str],
        bundle: str | os.PathLike[str] | Bundle | None = None,
        *,
        snapshot_every: int | None = None,
    ) -> Self:
        """Return the server of a run that was begun, after its last step.

        Parameters
        ----------
        path : path
            The run's folder.
        bundle : path or Bundle, optional
            Where the bundle is, if it was moved.
        snapshot_every : int, optional
            Number of steps between snapshots of the weights, which make the next resume fast.
        """
        run = Run(path)
        Plan.of(run.recipe, run.path)
        where = bundle.path if isinstance(bundle, Bundle) else bundle
        return cls(run, run.base(where), snapshot_every)

    @property
    def step(self) -> int:
        """Steps taken so far."""
        return len(self._entries)

    @property
    def is_done(self) -> bool:
        """Whether the last step was taken."""
        return self.step >= self.plan.steps

    @property
    def state(self) -> str:
        """SHA-256 of the trained state, in hexadecimal."""
        return self._state.hex()

    @property
    def waits_for(self) -> frozenset[str]:
        """The clients of the open round that may still answer: whose answer neither came nor was rejected."""
        current = self._round
        if current is None:
            return frozenset()
        return frozenset(current.draws.keys() - current.answers.keys() - current.rejected.keys())

    def open(self, clients: Iterable[str]) -> dict[str, bytes]:
        """Begin a round; return the message to each of these clients."""
        if self._round is not None:
            raise ValueError("a round is open")
        names = sorted(set(clients))
        if not names:
            raise ValueError("a round needs a client")
        draws: Mapping[str, range] = dict.fromkeys(names, range(0))
        if not self.is_done:
            draws = draws_of_round(self.plan, self._optimizer.next_draw, names)
        wanted = self.plan.loop().evaluates_after(self.step) and self.step not in self.evaluations
        self._round = _Round(self.step, draws, wanted, time.perf_counter())
        return {client: self._offer(client, self._steps_of.get(client, self.step)) for client in names}

    def receive(self, client: str, message: bytes) -> bytes | None:
        """Take a message of a client.

        Returns
        -------
        bytes or None
            A further message to the client, if it misses entries; None if its part of the round is done.

        Raises
        ------
        FederationError
            The message is malformed, late, of another round or client, or holds what no client may send. Nothing is
            changed by it but the counts of bytes and of rejected messages.
        """
        current = self._round
        if current is None:
            raise FederationError(f"a message of {client} came after its round")
        if client in current.draws:
            current.up[client] += len(message)
        try:
            reply = decode_reply(message)
            is_open = current.offers.get(reply.id) == client
            if is_open or (isinstance(reply, Refusal) and not reply.id):
                return self._take(current, client, reply)
        except FederationError as error:
            if client in current.draws and client not in current.answers:
                current.rejected[client] = str(error)
            raise
        raise FederationError(f"a message of {client} belongs to no open offer: it is late, or of another client")

    def _take(self, current: _Round, client: str, reply: Reply) -> bytes | None:
        if isinstance(reply, Refusal):
            raise FederationError(f"{client} refused: {reply.reason.name.lower()}")
        if isinstance(reply, Position):
            return self._catch_up(current, client, reply)
        self._check(current, client, reply)
        current.answers[client] = reply
        current.rejected.pop(client, None)
        del current.offers[reply.id]
        self._steps_of[client] = current.step
        return None

    def _catch_up(self, current: _Round, client: str, position: Position) -> bytes:
        step = position.step if position.knows_plan else 0
        if step > self.step:
            raise FederationError(f"{client} is after step {step}, and the server after step {self.step}")
        if position.knows_plan and position.chain != self._chains[step]:
            raise FederationError(f"{client} has another journal, of {step} steps")
        if client in current.caught_up:
            raise FederationError(f"{client} asks again for entries that it was sent")
        current.caught_up.add(client)
        del current.offers[position.id]
        return self._offer(client, step, with_plan=not position.knows_plan)

    def _check(self, current: _Round, client: str, answer: Answer) -> None:
        plan, asked = self.plan, len(current.draws[client])
        if len(answer.scalars) != asked:
            raise FederationError(f"{client} sent {len(answer.scalars)} scalars for {asked} directions")
        if not 1 <= answer.examples <= plan.most_examples:
            raise FederationError(
                f"{client} counts with {answer.examples} examples, expected 1 to {plan.most_examples}"
            )
        for scalar in answer.scalars:
            if not abs(scalar) <= ABSURD * plan.clip:  # NaN too
                raise FederationError(f"{client} sent the scalar {scalar}, expected at most {ABSURD * plan.clip:g}")
        if math.isinf(answer.loss) or not math.isfinite(answer.value):
            raise FederationError(f"{client} sent the loss {answer.loss} and the evaluation {answer.value}")
        if answer.evaluated and not current.wants_evaluation:
            raise FederationError(f"{client} sent an evaluation that was not asked for")

    def close_round(self) -> RoundInfo:
        """End the round: merge what came, append the step to the journal and take it. Later answers are rejected."""
        current = self._round
        if current is None:
            raise ValueError("no round is open")
        self._round = None
        answers, entry = current.answers, None
        if answers and not self.is_done:
            entry = merge(answers, current.draws, lr=self._optimizer.lr_of(current.step), clip=self.plan.clip)
            self._writer.append(entry)
            self._writer.sync()  # before anyone gets it: a client would be ahead of a journal that lost it
            self._optimizer.replay([entry])
            self._keep(entry)
            self._state = state_sha256(self._optimizer)
            if self._snapshot_every is not None and self.step % self._snapshot_every == 0:
                self._writer.snapshot(self._optimizer)
        silent = current.draws.keys() - answers.keys() - current.rejected.keys()
        rejected = current.rejected | dict.fromkeys(silent, "no answer in time")
        info = RoundInfo(
            step=current.step,
            entry=entry,
            clients=tuple(sorted(answers)),
            rejected=rejected,
            loss=_mean((answer.loss, answer.examples) for answer in answers.values()),
            evaluation=_mean((answer.value, answer.evaluated) for answer in answers.values()),
            down=dict(current.down),
            up=dict(current.up),
        )
        self._log(info, time.perf_counter() - current.started)
        return info

    def _log(self, info: RoundInfo, seconds: float) -> None:
        if math.isfinite(info.evaluation):
            values: dict[str, float | None] = {metric_named(self.plan.metric).name: info.evaluation}
            self.evaluations[info.step] = values
            self._writer.log({"step": info.step, EVAL: values, "without": {}})
        if info.entry is not None:
            line: dict[str, Any] = {"step": info.step + 1, "loss": finite(info.loss), "lr": info.entry.lr}
            more = {"clients": len(info.clients), "down": sum(info.down.values()), "up": sum(info.up.values())}
            self._writer.log(line | {"seconds": round(seconds, 6)} | more)

    def close(self) -> None:
        """Write everything to storage and release the run."""
        self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _keep(self, entry: Entry) -> None:
        self._entries.append(entry)
        self._running.update(pack_entry(entry))
        self._chains.append(self._running.digest())

    def _offer(self, client: str, step: int, *, with_plan: bool = False) -> bytes:
        assert self._round is not None
        number = secrets.randbits(64) or 1
        self._round.offers[number] = client
        message = Offer(
            id=number,
            step=step,
            entries=self._entries[step:],
            draws=self._round.draws[client],
            wants_evaluation=self._round.wants_evaluation,
            chain=self._chains[-1],
            state=self._state,
            plan=self._plan_text if with_plan or not self.step else b"",
        ).encode()
        self._round.down[client] += len(message)
        return message


def _mean(pairs: Iterable[tuple[float, int]]) -> float:
    """Return the weighted mean of numbers, of those that are finite and weigh something; NaN if there is none."""
    used = [(value, weight) for value, weight in pairs if weight and math.isfinite(value)]
    total = sum(weight for _, weight in used)
    return sum(value * weight for value, weight in used) / total if total else math.nan
