"""Flower's SuperLink and SuperNodes as processes on loopback, with TLS and authentication of nodes."""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from network import Network, wait_for
from sizes import full_or_small

import pocketzo as pz
from pocketzo.data.order import Order
from pocketzo.demo import minilm
from pocketzo.demo.run import LABELS, messages
from pocketzo.export.bert import build_onnx
from pocketzo.federated.draws import merge
from pocketzo.federated.plan import Plan
from pocketzo.federated.protocol import Answer
from pocketzo.formats.safetensors import file_sha256
from pocketzo.optim.methods import from_settings
from pocketzo.optim.program import float32
from pocketzo.tasks.objective import Objective, OnBatch, metric_objective
from pocketzo.tasks.registry import task_of

NAMES = ("ann", "bob", "cid")
STEPS = full_or_small(20, 6)
QUERIES = 4
DOCUMENT = (Path(__file__).parents[2] / "docs" / "federated.md").read_text()

SENDS_NAN = """
import dataclasses, math, sys
from pocketzo.federated import client
from pocketzo.federated.protocol import Answer, decode_reply
honest = client.Client.reply
def reply(self, message):
    answer = decode_reply(honest(self, message))
    if isinstance(answer, Answer) and self.answers % 3 == 0 and answer.scalars:
        answer = dataclasses.replace(answer, scalars=[math.nan, *answer.scalars[1:]])
    return answer.encode()
client.Client.reply = reply
from pocketzo.__main__ import main
sys.argv[0] = "pocketzo"
main()
"""


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Network]:
    made = Network(tmp_path / "network")
    yield made
    made.close()


def commands(mark: str) -> str:
    found = re.search(rf"^<!-- {mark} -->\n```sh\n(.*?)^```", DOCUMENT, re.DOTALL | re.MULTILINE)
    assert found is not None
    return found[1]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """MiniLM with a head of zeros; beside it, the demo's messages: each client has those of other labels."""
    files = minilm.find_checkpoint()
    build_onnx(files, tmp_path / "minilm.onnx", len(LABELS))
    pz.prepare(tmp_path / "minilm.onnx", tmp_path / "base", tokenizer=files.tokenizer, labels=LABELS, max_length=64)
    lines = messages("train").read_text().splitlines(keepends=True)
    for place, name in enumerate(NAMES):
        own = [line for line in lines if line.rstrip("\n").rsplit("\t", 1)[1] in LABELS[place :: len(NAMES)]]
        (tmp_path / f"{name}.tsv").write_text("".join(own))
    return tmp_path / "base"


@pytest.mark.timeout(3600)  # Flower starts a process for each message, which takes long on a busy machine
def test_three_nodes_train_together(network: Network, tmp_path: Path, bundle: Path) -> None:
    network.shell(commands("certificates"))
    network.superlink()
    for name in NAMES:
        network.register(name)
    network.run(
        *(sys.executable, "-m", "pocketzo", "federate", "begin", bundle, "-o", tmp_path / "server"),
        *("--method", "fzoo", "--lr", 1e-4, "--eps", 5e-4, "--group", "classifier:lr=300,eps=100", "--batch-size", 8),
        *("--steps", STEPS, "--queries", QUERIES, "--round-seconds", 90),
    )

    def start(name: str) -> None:
        arguments = (bundle, "--data", tmp_path / f"{name}.tsv", "-o", tmp_path / name, "--threads", "1")
        if name == "cid":
            network.start(f"client-{name}", sys.executable, "-c", SENDS_NAN, "federate", "client", *arguments)
        else:
            network.client(name, *arguments)

    def steps(name: str) -> int:
        return pz.Run(tmp_path / name).steps if (tmp_path / name / "journal.pzj").exists() else 0

    counters = {}
    for name in "ann", "bob":
        start(name)
        counters[name] = network.supernode(name, tmp_path / name / "mailbox")
    network.run("flwr", "run", tmp_path / "server" / "app", "here")
    wait_for(lambda: steps("bob") >= 1, 300, "the second round")
    network.kill("client-bob")
    start("bob")
    start("cid")
    counters["cid"] = network.supernode("cid", tmp_path / "cid" / "mailbox")
    wait_for(lambda: all(steps(name) == STEPS for name in NAMES), 300 + 90 * STEPS, f"{STEPS} rounds")

    entries = {name: pz.Run(tmp_path / name).entries for name in ("server", *NAMES)}
    assert all(found == entries["server"] for found in entries.values())
    tuned = set()
    for name in ("server", *NAMES):
        pz.Run(tmp_path / name).replay(tmp_path / f"tuned-{name}", bundle=bundle)
        tuned.add(file_sha256(tmp_path / f"tuned-{name}" / "weights.safetensors"))
    assert len(tuned) == 1
    check_alone(bundle, tmp_path)
    directions = [len(entry.coefficients) for entry in entries["server"]]
    assert directions[0] == 2 * QUERIES
    assert 3 * QUERIES in directions  # cid came, and its answers counted
    assert 2 * QUERIES in directions[4:] or STEPS < 10  # but not those that held NaN
    lines = [line for line in pz.Run(tmp_path / "server").metrics() if "clients" in line]
    payload = sum(line["up"] for line in lines) / sum(line["clients"] for line in lines)
    assert payload / QUERIES < 40
    for name, counter in counters.items():
        rounds = len([line for line in pz.Run(tmp_path / name).metrics() if "scalars" in line])
        print(
            f"{name}: {rounds} rounds, {counter.up / rounds:.0f} bytes up and {counter.down / rounds:.0f} down a round"
        )
    test = pz.load_dataset(messages("test"), pz.Bundle.read(bundle))
    before, after = (pz.evaluate(pz.load(path, threads=1), test) for path in (bundle, tmp_path / "tuned-server"))
    print(f"accuracy {before['accuracy']:.1%}, after {STEPS} steps {after['accuracy']:.1%}")
    assert after["loss"] < before["loss"]


def check_alone(bundle: Path, folder: Path) -> None:
    """Evaluate the same directions on one device that holds all data: each step has to be the same, bit for bit.

    Who had which draws follows from the numbers of Flower's nodes, so that all orders are tried.
    """
    run = pz.Run(folder / "server")
    plan = Plan.of(run.recipe, run.path)
    model = pz.load(bundle, threads=1)
    optimizer = from_settings(model, plan.method)
    objective = Objective(metric_objective(plan.objective, model.bundle), task_of(model.bundle))
    data = {name: pz.load_dataset(folder / f"{name}.tsv", model.bundle) for name in NAMES}
    for step, entry in enumerate(run.entries):
        taken = list(entry.coefficients)
        ranges = [range(taken[at], taken[at] + QUERIES) for at in range(0, len(taken), QUERIES)]
        found: dict[tuple[str, int], Answer] = {}
        for name, examples in data.items():
            order = Order(seed=optimizer.seed, size=len(examples), batch_size=min(plan.batch_size, len(examples)))
            batch = OnBatch(objective, examples.batch(order(step)), 1)
            for draws in ranges:
                estimate, _ = optimizer.estimate(draws, batch)
                found[name, draws.start] = Answer(1, [float32(estimate[draw]) for draw in draws], len(examples))
        steps = [
            merge(
                {name: found[name, draws.start] for name, draws in zip(names, ranges, strict=True)},
                dict(zip(names, ranges, strict=True)),
                lr=optimizer.lr_of(step),
                clip=plan.clip,
            )
            for names in itertools.permutations(NAMES, len(ranges))
        ]
        assert entry in steps
        optimizer.replay([entry])
    assert model.weights.sha256() == file_sha256(folder / "tuned-server" / "weights.safetensors")


def test_a_node_without_a_key_is_refused(network: Network, tmp_path: Path) -> None:
    network.shell(commands("certificates"))
    network.superlink()
    network.register("ann")
    network.supernode("bob", tmp_path)  # whose key nobody registered
    wait_for(lambda: network.processes["node-bob"].poll() is not None, 60, "refusing a node")
    assert "bob" not in network.run("flwr", "supernode", "list", "here")
