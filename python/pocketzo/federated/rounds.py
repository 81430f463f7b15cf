"""The rounds of a server over a transport, which carries bytes to clients and back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from pocketzo.arguments import check_integer, check_number
from pocketzo.errors import FederationError
from pocketzo.federated.cohort import Cohort
from pocketzo.federated.server import RoundInfo, Server
from pocketzo.train.run import Run


class Transport(Protocol):
    """Carries messages between a server and its clients."""

    poll_seconds: float

    def clients(self) -> Iterable[str]:
        """Return the names of the clients that can be reached now."""

    def send(self, messages: Mapping[str, bytes]) -> None:
        """Send a message to each of these clients."""

    def receive(self) -> Iterable[tuple[str, bytes]]:
        """Return the messages that came since the last call, each with the client that it is of."""


def run_rounds(
    server: Server,
    transport: Transport,
    *,
    least_clients: int = 1,
    clients: int | None = None,
    round_seconds: float = 60.0,
    on_round: Callable[[RoundInfo], None] | None = None,
    on_problem: Callable[[str], None] | None = None,
) -> None:
    """Run rounds until the last step was taken, and a last one in which the clients get it.

    Parameters
    ----------
    server : Server
    transport : Transport
    least_clients : int
        A round begins as soon as so many can be reached.
    clients : int, optional
        How many of them a round asks at first, see :class:`pocketzo.federated.cohort.Cohort`; all by default. The last
        round asks all.
    round_seconds : float
        A round ends when all have answered, or after so many seconds; what comes later is dropped.
    on_round : callable, optional
        Called after every round.
    on_problem : callable, optional
        Called with a line about each message that was rejected.
    """
    check_integer("least_clients", least_clients, 1)
    check_number("round_seconds", round_seconds, positive=True)
    before = (line for line in Run(server.path).metrics() if line["step"] <= server.step)
    cohort = Cohort(clients, server.plan.method["seed"], before)
    while True:
        while len(names := list(transport.clients())) < least_clients:
            time.sleep(transport.poll_seconds)
        is_last = server.is_done
        deadline = time.monotonic() + round_seconds
        transport.send(server.open(names if is_last else cohort.of(names, server.step)))
        while server.waits_for and time.monotonic() < deadline:
            further = {}
            for client, message in transport.receive():
                try:
                    reply = server.receive(client, message)
                except FederationError as error:
                    if on_problem is not None:
                        on_problem(str(error))
                else:
                    if reply is not None:
                        further[client] = reply
            if further:
                transport.send(further)
            elif server.waits_for:
                time.sleep(transport.poll_seconds)
        info = server.close_round()
        if info.entry is not None:
            cohort.add(info.step + 1, info.loss)
        if on_round is not None:
            on_round(info)
        if is_last:
            return
