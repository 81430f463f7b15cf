"""Federations on one machine: MiniLM on the demo's messages, which clients have unequal labels of.

    python bench/federated.py [--clients 10 100] [--alpha 0.1 1.0] [--rounds 200] [--train head+lora:r=4] [--json FILE]

The labels of a client's messages are shares of each label that are drawn from a Dirichlet distribution: with 0.1 most
clients have one or two of the eight labels. The messages between server and clients are those of a real federation,
and their bytes are counted, without a transport. All clients have the same bits, so that one model serves them all.

For each pair of numbers, in as many rounds, with --per-round clients a round:

- *own*: each client evaluates directions of its own;
- *shared*: all clients of a round evaluate the same directions;
- *paced*: as own, with fewer clients at first and more as training goes on (`begin --clients`);
- *alone*: one device with all messages, which evaluates as many directions in a step as all clients of a round;
- *FedAvg*: LoRA of rank 4 beside queries and values, and the head, by backpropagation in torch, averaged each round by
  examples (McMahan et al., 2017), where torch is installed. Its bytes are those of the averaged float32 tensors.

Settings are the arguments; choose them on training messages (--held-out), never on the test messages that are reported.
A row is in the file as soon as it is measured: stopped, the same command goes on with the next one.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from machine import Rows, Run, peer
from models import SHAPES
from numpy.typing import NDArray
from torch_peers import Model as TorchModel

import pocketzo as pz
from pocketzo.data.order import Order
from pocketzo.demo import minilm
from pocketzo.demo.run import LABELS, messages
from pocketzo.export.bert import build_onnx
from pocketzo.federated.cohort import Cohort
from pocketzo.federated.protocol import Answer, Offer, Position
from pocketzo.federated.server import Server
from pocketzo.federated.state import state_sha256
from pocketzo.optim.methods import from_settings
from pocketzo.optim.program import float32
from pocketzo.tasks.objective import Objective, OnBatch, metric_objective
from pocketzo.tasks.registry import task_of
from pocketzo.train.evaluator import Sample

LEAST = 2  # messages of a client
RANK = 4  # of FedAvg's LoRA


def shares(labels: NDArray[np.int64], clients: int, alpha: float, seed: int) -> list[NDArray[np.int64]]:
    """Return the numbers of each client's messages; those who got too few take some of the largest shares."""
    rng = np.random.default_rng([seed, clients])
    parts: list[list[int]] = [[] for _ in range(clients)]
    for label in np.unique(labels):
        found = rng.permutation(np.flatnonzero(labels == label))
        cuts = (np.cumsum(rng.dirichlet(np.full(clients, alpha)))[:-1] * len(found)).astype(int)
        for part, more in zip(parts, np.split(found, cuts), strict=True):
            part.extend(more.tolist())
    for part in parts:
        while len(part) < LEAST:
            part.append(max(parts, key=len).pop())
    return [np.array(sorted(part)) for part in parts]


def chosen(rounds: int, clients: int, count: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Yield the clients of each round."""
    rng = np.random.default_rng([seed, clients, count])
    for _ in range(rounds):
        yield np.sort(rng.permutation(clients)[:count])


class Clients:
    """All clients of a simulated federation, over one model."""

    def __init__(self, model: pz.Model, data: Sequence[Sample], server: Server) -> None:
        model.weights.read()
        plan = server.plan
        self.forwards = 0
        self._model = model
        self._data = data
        self.optimizer = from_settings(model, plan.method)
        self._joined: set[int] = set()
        self._objective = Objective(metric_objective(plan.objective, model.bundle), task_of(model.bundle))
        sizes = [min(plan.batch_size, len(part)) for part in data]
        seed = self.optimizer.seed
        self._orders = [Order(seed=seed, size=len(d), batch_size=s) for d, s in zip(data, sizes, strict=True)]

    def answer(self, client: int, message: bytes) -> bytes:
        offer, optimizer, data = Offer.decode(message), self.optimizer, self._data[client]
        if client not in self._joined and not offer.plan:
            return Position(offer.id, False, 0, bytes(32)).encode()
        self._joined.add(client)
        fresh = offer.entries[optimizer.step_number - offer.step :]
        if fresh:
            optimizer.replay(fresh)
            assert state_sha256(optimizer) == offer.state
        batch = data.batch(self._orders[client](optimizer.step_number))
        estimate, losses = optimizer.estimate(offer.draws, OnBatch(self._objective, batch, 1))
        self.forwards += len(losses)
        scalars = [float32(estimate[draw]) for draw in offer.draws]
        return Answer(offer.id, scalars, len(data), loss=float32(optimizer.loss(losses))).encode()


def federate(
    model: pz.Model,
    data: Sequence[Sample],
    test: pz.Dataset | Sample,
    rounds: list[NDArray[np.int64]],
    *,
    first: int | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Run a federation, and return its figures; if a first number of clients is given, rounds ask for more in time."""
    began, points = time.process_time(), []
    every = max(1, len(rounds) // 10)
    down = up = answers = rejected = 0
    with (
        tempfile.TemporaryDirectory() as folder,
        Server.begin(Path(folder, "run"), model.bundle, steps=len(rounds), most_examples=2**31, **settings) as server,
    ):
        clients = Clients(model, data, server)
        cohort = Cohort(first, clients.optimizer.seed)
        for number, asked in enumerate(rounds, 1):
            everyone = range(len(data)) if first is not None else asked
            names = cohort.of(map(str, everyone), number)
            offers = server.open(names)
            for name, offer in offers.items():
                message: bytes | None = offer
                while message is not None:  # a client that joins gets the plan and all entries
                    message = server.receive(name, clients.answer(int(name), message))
            info = server.close_round()
            cohort.add(number, info.loss)
            rejected += len(info.rejected)  # of a run that diverges
            down, up, answers = down + sum(info.down.values()), up + sum(info.up.values()), answers + len(names)
            if number % every == 0 or number == len(rounds):
                clients.optimizer.replay([entry] if (entry := info.entry) is not None else [])
                points.append([number, pz.evaluate(model, test)["accuracy"], down + up, clients.forwards])
                print(f"  round {number}: {points[-1][1]:.1%}", file=sys.stderr, flush=True)
    return {
        "accuracy": points[-1][1],
        "points": points,
        "answers": answers,
        "down": down / answers,
        "up": up / answers,
        "rejected": rejected,
        "forwards": clients.forwards,
        "cpu_seconds": time.process_time() - began,
    }


class LoraModel(TorchModel):
    """MiniLM in torch with LoRA beside the projections of queries and values, and its head."""

    def __init__(self, torch: Any, bundle: Path, rank: int, seed: int) -> None:
        super().__init__(torch, bundle, SHAPES["minilm"])
        generator = torch.Generator().manual_seed(seed)
        self.trained: dict[str, Any] = {}
        for name, weight in self.weights.items():
            if name.startswith("classifier."):
                self.trained[name] = weight.clone()
            elif name.endswith((".query.weight", ".value.weight")):
                outer, inner = weight.shape
                layer = name.removesuffix(".weight")
                self.trained[f"{layer}.A"] = torch.randn(rank, inner, generator=generator) / math.sqrt(inner)
                self.trained[f"{layer}.B"] = torch.zeros(outer, rank)
        for value in self.trained.values():
            value.requires_grad_()

    def _dense(self, x: Any, name: str) -> Any:
        linear = self.torch.nn.functional.linear
        if name == "classifier":
            return linear(x, self.trained["classifier.weight"], self.trained["classifier.bias"])
        y = super()._dense(x, name)
        if f"{name}.A" in self.trained:
            y = y + 2.0 * linear(linear(x, self.trained[f"{name}.A"]), self.trained[f"{name}.B"])
        return y


def fedavg(
    torch: Any,
    bundle: Path,
    data: Sequence[Sample],
    test: pz.Dataset | Sample,
    rounds: list[NDArray[np.int64]],
    *,
    rank: int,
    lr: float,
    local_steps: int,
    batch_size: int,
    seed: int,
) -> dict[str, Any]:
    """Average what clients trained by AdamW, each round; return the figures."""
    began, points, forwards = time.process_time(), [], 0
    model = LoraModel(torch, bundle, rank, seed)
    every = max(1, len(rounds) // 10)
    orders = [Order(seed=seed, size=len(part), batch_size=min(batch_size, len(part))) for part in data]
    taken = [0] * len(data)
    whole = {name: value.detach().clone() for name, value in model.trained.items()}
    size = 4 * sum(value.numel() for value in whole.values())
    for number, asked in enumerate(rounds, 1):
        total = sum(len(data[client]) for client in asked)
        mean = {name: torch.zeros_like(value) for name, value in whole.items()}
        for client in map(int, asked):
            with torch.no_grad():
                for name, value in model.trained.items():
                    value.copy_(whole[name])
            optimizer = torch.optim.AdamW(model.trained.values(), lr=lr, weight_decay=0.0)
            for _ in range(local_steps):
                optimizer.zero_grad()
                model._loss(data[client].batch(orders[client](taken[client]))).backward()
                optimizer.step()
                taken[client] += 1
                forwards += 1
            for name, value in model.trained.items():
                mean[name] += value.detach() * (len(data[client]) / total)
        whole = mean
        if number % every == 0 or number == len(rounds):
            with torch.no_grad():
                for name, value in model.trained.items():
                    value.copy_(whole[name])
            points.append([number, torch_accuracy(model, test), 2 * size * number * len(asked), forwards])
            print(f"  round {number}: {points[-1][1]:.1%}", file=sys.stderr, flush=True)
    return {
        "accuracy": points[-1][1],
        "points": points,
        "down": size,
        "up": size,
        "forwards_and_backwards": forwards,
        "cpu_seconds": time.process_time() - began,
    }


def torch_accuracy(model: LoraModel, data: pz.Dataset | Sample) -> float:
    right = 0
    for at in range(0, len(data), 32):
        batch: Mapping[str, Any] = data.batch(np.arange(at, min(at + 32, len(data))))
        right += int((model.logits(batch).argmax(1).numpy() == batch["labels"]).sum())
    return right / len(data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", nargs="+", type=int, default=[10, 100])
    parser.add_argument("--per-round", type=int, default=10, help="clients of a round, drawn anew for each")
    parser.add_argument("--alpha", nargs="+", type=float, default=[0.1, 1.0])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--train", default="head+lora:r=4", help="the trained set, as of pocketzo prepare")
    parser.add_argument("--method", default="mezo")
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--eps", type=float, default=1e-2)
    parser.add_argument("--queries", type=int, default=4, help="directions of a client in a round")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--clip", type=float, default=100.0)
    parser.add_argument("--head", type=float, default=1.0, help="factor of lr for the classifier")
    parser.add_argument("--fedavg-lr", type=float, default=1e-3)
    parser.add_argument("--local-steps", type=int, default=4, help="of FedAvg's clients in a round")
    parser.add_argument("--systems", nargs="+", default=["own", "shared", "paced", "alone", "FedAvg"])
    parser.add_argument("--held-out", action="store_true", help="report on 200 training messages, kept back")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file of the rows, which is extended")
    arguments = parser.parse_args()

    shown = ("clients", "alpha", "systems", "threads", "json")  # what differs between rows, or changes no figure
    rows = Rows(Run(), arguments.json, {name: value for name, value in vars(arguments).items() if name not in shown})
    torch = peer("torch") if "FedAvg" in arguments.systems else None
    with tempfile.TemporaryDirectory() as folder:
        files = minilm.find_checkpoint()
        graph = Path(folder, "minilm.onnx")
        build_onnx(files, graph, len(LABELS))
        options: dict[str, Any] = {"tokenizer": files.tokenizer, "labels": LABELS, "max_length": 64}
        bundle = pz.prepare(graph, Path(folder, "base"), train=arguments.train, **options)
        plain = bundle if bundle.adapter is None else pz.prepare(graph, Path(folder, "plain"), **options)
        train = pz.load_dataset(messages("train"), bundle)
        assert train.label_ids is not None
        test: pz.Dataset | Sample = pz.load_dataset(messages("test"), bundle)
        pool = np.arange(len(train))
        if arguments.held_out:
            kept = np.random.default_rng(1).permutation(len(train))
            test, pool = Sample(train, kept[:200]), np.sort(kept[200:])
        labels = np.asarray(train.label_ids)[pool]
        model = pz.load(bundle, threads=arguments.threads)
        settings = {
            "method": arguments.method,
            "lr": arguments.lr,
            "eps": arguments.eps,
            "seed": arguments.seed,
            "clip": arguments.clip,
            "groups": [pz.ParamGroup(r"^classifier", lr=arguments.head)],
            "schedule": pz.Schedule("linear", arguments.rounds),
        }
        for clients in arguments.clients:
            count = min(arguments.per_round, clients)
            rounds = list(chosen(arguments.rounds, clients, count, arguments.seed))
            for alpha in arguments.alpha:
                parts = [Sample(train, pool[part]) for part in shares(labels, clients, alpha, arguments.seed)]
                for system in arguments.systems:
                    if rows.has(clients=clients, alpha=alpha, system=system):
                        continue
                    print(f"{clients} clients, alpha {alpha}, {system}", file=sys.stderr, flush=True)
                    if system == "FedAvg":
                        if torch is None:
                            continue
                        torch.set_num_threads(arguments.threads)
                        found = fedavg(
                            torch,
                            plain.path,
                            parts,
                            test,
                            rounds,
                            rank=RANK,
                            lr=arguments.fedavg_lr,
                            local_steps=arguments.local_steps,
                            batch_size=arguments.batch_size,
                            seed=arguments.seed,
                        )
                    elif system == "alone":
                        queries, batch = arguments.queries * count, arguments.batch_size
                        alone = [np.zeros(1, np.int64)] * len(rounds)
                        own = {**settings, "queries": queries, "batch_size": batch}
                        found = federate(model, [Sample(train, pool)], test, alone, **own)
                    else:
                        own = {**settings, "queries": arguments.queries, "batch_size": arguments.batch_size}
                        own["first"] = max(1, count // 5) if system == "paced" else None
                        found = federate(model, parts, test, rounds, shared_draws=system == "shared", **own)
                    rows.add({"clients": clients, "alpha": alpha, "system": system, **found})
    print(
        "| clients | alpha | | accuracy | bytes down / client, round | up | forwards |\n|---|---|---|---|---|---|---|"
    )
    for row in rows.rows:
        forwards = row.get("forwards") or f"{row['forwards_and_backwards']} and as many backwards"
        print(
            f"| {row['clients']} | {row['alpha']} | {row['system']} | {row['accuracy']:.1%} | {row['down']:,.0f} | "
            f"{row['up']:,.0f} | {forwards} |"
        )


if __name__ == "__main__":
    main()
