"""Flower's SuperLink and SuperNodes as processes on loopback, with TLS and authentication of nodes."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from network import Network, wait_for
from sizes import full_or_small

import pocketzo as pz
from pocketzo.formats.safetensors import file_sha256

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


def test_three_nodes_train_together(network: Network, tmp_path: Path, tiny_bundle: Path, tiny_data: Path) -> None:
    with np.load(tiny_data) as file:
        ids, labels = file["input_ids"], file["labels"]
    for label, name in enumerate(NAMES):
        np.savez(tmp_path / f"{name}.npz", input_ids=ids[labels == label], labels=labels[labels == label])
    network.shell(commands("certificates"))
    network.superlink()
    for name in NAMES:
        network.register(name)
    network.run(
        *(sys.executable, "-m", "pocketzo", "federate", "begin", tiny_bundle, "-o", tmp_path / "server"),
        *("--lr", 0.02, "--steps", STEPS, "--queries", QUERIES, "--round-seconds", 90),
    )

    def start(name: str) -> None:
        arguments = (tiny_bundle, "--data", tmp_path / f"{name}.npz", "-o", tmp_path / name, "--threads", "1")
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
    wait_for(lambda: steps("bob") >= 1, 120, "the second round")
    network.kill("client-bob")
    start("bob")
    start("cid")
    counters["cid"] = network.supernode("cid", tmp_path / "cid" / "mailbox")
    wait_for(lambda: all(steps(name) == STEPS for name in NAMES), 60 + 30 * STEPS, f"{STEPS} rounds")

    entries = {name: pz.Run(tmp_path / name).entries for name in ("server", *NAMES)}
    assert all(found == entries["server"] for found in entries.values())
    tuned = set()
    for name in ("server", *NAMES):
        pz.Run(tmp_path / name).replay(tmp_path / f"tuned-{name}", bundle=tiny_bundle)
        tuned.add(file_sha256(tmp_path / f"tuned-{name}" / "weights.safetensors"))
    assert len(tuned) == 1
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
    before, after = (
        pz.evaluate(pz.load(path, threads=1), pz.load_dataset(tiny_data, pz.Bundle.read(path)))["loss"]
        for path in (tiny_bundle, tmp_path / "tuned-server")
    )
    assert after < before


def test_a_node_without_a_key_is_refused(network: Network, tmp_path: Path) -> None:
    network.shell(commands("certificates"))
    network.superlink()
    network.register("ann")
    network.supernode("bob", tmp_path)  # whose key nobody registered
    wait_for(lambda: network.processes["node-bob"].poll() is not None, 60, "refusing a node")
    assert "bob" not in network.run("flwr", "supernode", "list", "here")
