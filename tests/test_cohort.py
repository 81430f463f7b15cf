"""Which clients a round asks (federated/cohort.py), and rounds with a transport that loses nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from test_federated import shares

import pocketzo as pz
from pocketzo.federated.client import Client
from pocketzo.federated.cohort import WINDOW, Cohort
from pocketzo.federated.rounds import run_rounds
from pocketzo.federated.server import RoundInfo, Server

NAMES = [f"c{number}" for number in range(8)]


def sizes(losses: Iterable[float], first: int = 2) -> list[int | None]:
    """Return the number of clients after each window."""
    cohort, found = Cohort(first, 0), []
    for step, loss in enumerate(losses, 1):
        cohort.add(step, loss)
        if step % WINDOW == 0:
            found.append(cohort.size)
    return found


def test_it_doubles_where_the_loss_stands_still() -> None:
    falls, stands = np.linspace(3.0, 1.0, 4 * WINDOW), np.full(3 * WINDOW, 1.0)
    assert sizes([*falls, *stands]) == [2, 2, 2, 2, 2, 4, 8]  # the first window of 1.0 is below the one before
    assert sizes(np.linspace(1.0, 3.0, 3 * WINDOW)) == [2, 4, 8]


def test_a_fall_within_the_noise_is_none() -> None:
    noise = np.tile([0.5, -0.5], WINDOW)  # of 20 steps: its standard error is 0.17, that of a difference 0.24
    assert sizes(1.0 + noise - np.repeat([0.0, 0.2], WINDOW)) == [2, 4]
    assert sizes(1.0 + noise - np.repeat([0.0, 0.3], WINDOW)) == [2, 2]


def test_losses_that_are_not_finite_count_for_nothing() -> None:
    assert sizes([np.nan] * WINDOW * 3) == [2, 2, 2]
    assert sizes([1.0, np.inf] * WINDOW) == [2, 4]


def test_clients_are_drawn_by_lot() -> None:
    cohort = Cohort(3, 7)
    drawn = [tuple(cohort.of(NAMES, step)) for step in range(200)]
    assert drawn == [tuple(Cohort(3, 7).of(reversed(NAMES), step)) for step in range(200)]
    assert all(len(set(names)) == 3 for names in drawn)
    counts = [sum(name in names for names in drawn) for name in NAMES]  # mean 75, standard deviation 6.8
    assert min(counts) > 48
    assert max(counts) < 102
    assert drawn != [tuple(Cohort(3, 8).of(NAMES, step)) for step in range(200)]
    assert list(Cohort(None, 7).of(NAMES, 0)) == NAMES
    assert list(Cohort(9, 7).of(NAMES, 0)) == NAMES
    with pytest.raises(ValueError, match="clients"):
        Cohort(0, 7)


class Local:
    """Carries messages to clients in this process."""

    poll_seconds = 0.0

    def __init__(self, clients: Mapping[str, Client]) -> None:
        self._clients = clients
        self._answers: list[tuple[str, bytes]] = []

    def clients(self) -> Iterable[str]:
        return list(self._clients)

    def send(self, messages: Mapping[str, bytes]) -> None:
        self._answers += [(name, self._clients[name].handle(message)) for name, message in messages.items()]

    def receive(self) -> Iterable[tuple[str, bytes]]:
        answers, self._answers = self._answers, []
        return answers


def test_rounds_ask_more_clients_and_a_server_goes_on_with_as_many(
    tmp_path: Path, tiny_bundle: Path, data: pz.Dataset
) -> None:
    """Clients that were not asked catch up; all have the same bits in the end."""
    steps, counts = 3 * WINDOW, list[int]()

    def told(info: RoundInfo) -> None:
        counts.append(len(info.clients))
        if info.step == 2 * WINDOW + 4:
            raise KeyboardInterrupt

    with ExitStack() as stack:
        clients = {
            f"c{number}": stack.enter_context(Client(tmp_path / f"c{number}", pz.load(tiny_bundle, threads=1), part))
            for number, part in enumerate(shares(data, 4))
        }
        path = tmp_path / "server"
        # a rate of nearly 0: the loss stands still
        with Server.begin(path, tiny_bundle, steps=steps, batch_size=4, queries=1, lr=1e-12) as server:
            with pytest.raises(KeyboardInterrupt):
                run_rounds(server, Local(clients), clients=1, on_round=told)
            assert counts == [1] * 2 * WINDOW + [2] * 5
        with Server.resume(path) as server:
            run_rounds(server, Local(clients), clients=1, on_round=told)
            assert counts[2 * WINDOW :] == [2] * WINDOW + [4]  # the last round takes no step and asks all
            states = {client.state for client in clients.values()} | {server.state}
        assert len(states) == 1
        assert {client.step for client in clients.values()} == {steps}
