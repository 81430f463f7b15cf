"""``pocketzo federate``: several devices train one model."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

import click

from pocketzo.cli.cache import RunCache
from pocketzo.cli.command import Command, Commands
from pocketzo.cli.console import note, quoted, say
from pocketzo.cli.method import interval_option, own_settings, rank_option
from pocketzo.cli.options import (
    PATH,
    batch_size_option,
    column_options,
    groups_option,
    schedule_option,
    threads_option,
    trainable_option,
    warmup_option,
    weight_decay_option,
)
from pocketzo.data.columns import Columns
from pocketzo.data.load import load_dataset
from pocketzo.federated.app import write_app
from pocketzo.federated.client import Client
from pocketzo.federated.mailbox import Mailboxes, watch
from pocketzo.federated.plan import Plan
from pocketzo.federated.privacy import epsilon
from pocketzo.federated.rounds import run_rounds
from pocketzo.federated.server import RoundInfo, Server
from pocketzo.formats.bundle import Bundle
from pocketzo.optim.block import Block
from pocketzo.optim.groups import ParamGroup
from pocketzo.optim.methods import METHODS
from pocketzo.optim.schedule import Schedule
from pocketzo.runtime.load import load
from pocketzo.tasks.metrics import METRICS
from pocketzo.train.recipe import Source
from pocketzo.train.run import Run, check_new

_round_seconds = click.option(
    "--round-seconds",
    type=float,
    default=60.0,
    help="A round ends when all clients have answered, or after so many seconds; later answers are dropped.",
)
_least_clients = click.option(
    "--least-clients", type=int, default=2, metavar="N", help="A round begins as soon as N clients can be reached."
)
_clients = click.option(
    "--clients",
    type=int,
    metavar="N",
    help="Ask N clients a round, drawn by lot, and twice as many after each 10 steps in which the loss did not fall "
    "clearly.  [default: all that can be reached]",
)
_snapshot_every = click.option(
    "--snapshot-every",
    type=int,
    metavar="STEPS",
    help="Steps between snapshots of the weights, which make the next start faster.",
)


@click.group(cls=Commands)
def federate() -> None:
    """Train one model on several devices, which send numbers, and no weights, gradients or data.

    The server runs `begin` and then `serve`, or Flower; each device runs `client`. All have a copy of the same bundle.
    docs/federated.md shows all commands.

    \b
    Example, over a shared folder:
      pocketzo federate begin base -o server --lr 1e-3 --steps 200
      pocketzo federate serve server --mailbox mail
      pocketzo federate client base --data own.tsv -o client --mailbox mail/own
    """


@federate.command(cls=Command)
@click.argument("bundle", type=PATH)
@click.option("-o", "--output", type=PATH, required=True, metavar="RUN", help="Folder of the run, which must be new.")
@click.option("--steps", type=int, default=100, help="Length of the run: rounds in which a client answers.")
@click.option("--method", type=click.Choice(sorted(METHODS)), default="mezo", help="Method.")
@rank_option
@interval_option
@click.option("--lr", type=float, required=True, help="Learning rate.")
@click.option("--eps", type=float, default=1e-3, help="Size of the perturbation.")
@click.option("--queries", type=int, default=4, metavar="N", help="Directions that a client evaluates in a round.")
@batch_size_option("Examples on which a client evaluates them.")
@click.option("--seed", type=int, default=0, help="Seed of the directions.")
@weight_decay_option
@trainable_option
@groups_option
@click.option("--block", type=float, metavar="SHARE", help="Move only a random share of the tensors each step.")
@schedule_option
@warmup_option
@click.option("--objective", type=click.Choice(list(METRICS)), default="loss", help="What is minimised.")
@click.option("--eval-every", type=int, metavar="STEPS", help="Steps between evaluations by clients with --eval.")
@click.option("--clip", type=float, default=100.0, help="Largest absolute value of a client's number for a direction.")
@click.option(
    "--noise",
    type=float,
    default=0.0,
    help="Gaussian noise that each client adds to its numbers, as a multiple of what other data could change in them; "
    "docs/privacy.md says which epsilon that gives.",
)
@click.option("--most-examples", type=int, default=10_000, metavar="N", help="The most that a client counts with.")
@click.option(
    "--shared-draws",
    is_flag=True,
    help="All clients evaluate the same directions: fewer bytes, and clients see each other's numbers only as a sum.",
)
@_round_seconds
@_least_clients
@_clients
def begin(
    bundle: Path,
    output: Path,
    method: str,
    rank: int | None,
    interval: int | None,
    trainable: str | None,
    groups: tuple[ParamGroup, ...],
    block: float | None,
    schedule: str,
    warmup: int,
    steps: int,
    round_seconds: float,
    least_clients: int,
    clients: int | None,
    **settings: Any,
) -> None:
    """Write the plan of a federation: the folder of a run, and in it app/, which `flwr run` takes.

    \b
    Example:
      pocketzo federate begin base -o server --lr 1e-3 --steps 200
    """
    check_new(output)
    with Server.begin(
        output,
        Bundle.read(bundle),
        method=method,
        steps=steps,
        trainable=trainable,
        groups=groups,
        subset=None if block is None else Block(block),
        schedule=Schedule(schedule, steps, warmup),  # type: ignore[arg-type]  # click has checked it
        **own_settings(method, rank=rank, interval=interval),
        **settings,
    ) as server:
        plan = server.plan
    write_app(output, round_seconds=round_seconds, least_clients=least_clients, clients=clients)
    say(
        f"{output}: {plan.method['method']}, {plan.steps} steps, {plan.queries} directions a client and round, "
        f"{len(plan.method['trained'])} trained tensors"
    )
    say(f"with Flower:     flwr run {quoted(output / 'app')} SUPERLINK --stream")
    say(f"without Flower:  pocketzo federate serve {quoted(output)} --mailbox FOLDER")


@federate.command(cls=Command)
@click.argument("run", type=PATH)
@click.option(
    "--mailbox", type=PATH, required=True, metavar="FOLDER", help="Holds a folder for each client, by its name."
)
@click.option("--base", type=PATH, metavar="BUNDLE", help="The run's base bundle, if it was moved.")
@_round_seconds
@_least_clients
@_clients
@_snapshot_every
def serve(
    run: Path,
    mailbox: Path,
    base: Path | None,
    round_seconds: float,
    least_clients: int,
    clients: int | None,
    snapshot_every: int | None,
) -> None:
    """Run the rounds of RUN over folders: offer.bin goes to a client, answer.bin comes back.

    Folders that other programs carry (ssh, rsync, a shared disk) need no Flower, on the server or on a phone. The same
    command goes on with a run that was ended.

    \b
    Example:
      mkdir -p mail/phone mail/tablet
      pocketzo federate serve server --mailbox mail
    """
    with Server.resume(run, base, snapshot_every=snapshot_every) as server:
        run_rounds(
            server,
            Mailboxes(mailbox),
            least_clients=least_clients,
            clients=clients,
            round_seconds=round_seconds,
            on_round=lambda info: note(round_line(info)),
            on_problem=lambda line: note(f"note: {line}"),
        )
        say(f"{run}: {server.step} steps, trained state {server.state}")
    say(f"get the tuned bundle:  pocketzo replay {quoted(run)} -o tuned")


@federate.command(cls=Command)
@click.argument("bundle", type=PATH)
@click.option("--data", type=PATH, required=True, metavar="FILE", help="Examples of this device, as for train.")
@click.option("--eval", "eval_data", type=PATH, metavar="FILE", help="Examples on which the model is evaluated.")
@click.option("-o", "--output", type=PATH, required=True, metavar="CLIENT", help="Folder of this client's journal.")
@click.option(
    "--mailbox", type=PATH, metavar="FOLDER", help="Where offers come and answers go.  [default: CLIENT/mailbox]"
)
@click.option(
    "--cache",
    default="off",
    metavar="off|DIR",
    help="Keep what the model computes of each example before what is trained; see --cache of train.",
)
@click.option("--once", is_flag=True, help="Answer one offer, and end.")
@click.option("--most-directions", type=int, default=1024, metavar="N", help="Refuse a plan with more in a round.")
@click.option("--plan", type=PATH, metavar="FILE", help="Refuse any plan but this one, as `plan` prints it.")
@_snapshot_every
@threads_option("as many as there are fast cores")
@column_options
def client(
    bundle: Path,
    data: Path,
    eval_data: Path | None,
    output: Path,
    mailbox: Path | None,
    cache: str,
    once: bool,
    most_directions: int,
    plan: Path | None,
    snapshot_every: int | None,
    threads: int | None,
    columns: Columns,
) -> None:
    """Answer the offers of a federation, on the data of this device, until Ctrl-C.

    CLIENT keeps the journal. The same command goes on with it.

    \b
    Example:
      pocketzo federate client base --data messages.tsv -o client
    """
    read = Bundle.read(bundle)
    examples = load_dataset(data, read, columns=columns)
    held_out = None if eval_data is None else load_dataset(eval_data, read, columns=columns)
    activations = RunCache(cache, None, None)
    cut = activations.plan(read, None, examples, held_out, steps=len(examples), evaluations=1)
    model = load(read, threads=threads, cut=cut)
    activations.fill(model, examples, None)
    source = Source.of(data, None, columns)
    expected = None if plan is None else plan.read_bytes().strip()
    with Client(
        output,
        model,
        examples,
        eval=held_out,
        most_directions=most_directions,
        source=source,
        plan=expected,
        snapshot_every=snapshot_every,
    ) as one:
        folder = output / "mailbox" if mailbox is None else mailbox
        note(f"{output}: {len(examples)} examples, after step {one.step}; offers come to {folder}")

        def reply(offer: bytes) -> bytes:
            answered = one.reply(offer)
            note(f"note: refused: {one.problem}" if one.problem else f"step {one.step}: {len(answered)} bytes up")
            return answered

        stopped: list[int] = []
        before = signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))
        try:
            watch(folder, reply, once=once, stop=lambda: bool(stopped))
        finally:
            signal.signal(signal.SIGTERM, before)
        say(f"{output}: {one.step} steps, {one.answers} answers, trained state {one.state}")
    if stopped:
        sys.exit(128 + stopped[0])


@federate.command(name="plan", cls=Command)
@click.argument("run", type=PATH)
@click.option("--pretty", is_flag=True, help="For people; --plan of client takes it as it is printed without.")
def plan_of(run: Path, pretty: bool) -> None:
    """Print the plan of RUN, the folder of a server or a client.

    \b
    Example:
      pocketzo federate plan server > plan.json
    """
    past = Run(run)
    text = Plan.of(past.recipe, past.path).text.decode()
    say(json.dumps(json.loads(text), indent=2) if pretty else text)


@federate.command(name="epsilon", cls=Command)
@click.argument("run", metavar="CLIENT", type=PATH)
@click.option("--delta", type=float, default=1e-5, help="The probability that epsilon does not cover.")
def epsilon_of(run: Path, delta: float) -> None:
    """Print the epsilon of differential privacy of all that CLIENT has sent, by the plan's --noise.

    It covers all data of the device. Needs the package dp-accounting.

    \b
    Example:
      pocketzo federate epsilon client
    """
    past = Run(run)
    noise = Plan.of(past.recipe, past.path).noise
    answers = sum("scalars" in line for line in past.metrics())
    found = epsilon(noise, answers, delta) if noise else float("inf")
    say(f"{run}: {answers} answers with noise {noise:g}: epsilon {found:.4g}, delta {delta:g}")


def round_line(info: RoundInfo) -> str:
    """Return a line about a round."""
    taken = f"after step {info.step}" if info.entry is None else f"step {info.step + 1}"
    down, up = sum(info.down.values()), sum(info.up.values())
    return f"{taken}: {len(info.clients)} clients, loss {info.loss:.4f}, {down:,} bytes down, {up:,} bytes up"
