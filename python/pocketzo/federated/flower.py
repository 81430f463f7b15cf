"""Flower carries the messages: a ServerApp runs the rounds, a ClientApp hands each offer to its machine's client.

Flower starts a ClientApp as a process of its own for every message. The model stays loaded in the process of ``pocketzo
federate client``, which the ClientApp reaches by a folder (:mod:`pocketzo.federated.mailbox`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from logging import INFO, WARNING
from pathlib import Path
from typing import Any, Final

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.logger import log
from flwr.serverapp import Grid, ServerApp

from pocketzo.errors import Error
from pocketzo.federated.mailbox import exchange
from pocketzo.federated.rounds import run_rounds
from pocketzo.federated.server import RoundInfo, Server

_RECORD: Final = "pocketzo"
_KEY: Final = "message"
_TYPE: Final = "query"  # a type that Flower defines; it changes nothing on the client

client_app = ClientApp()
server_app = ServerApp()


@client_app.query()  # type: ignore[untyped-decorator, unused-ignore]
def answer(message: Message, context: Context) -> Message:
    """Hand an offer to the client that watches the folder ``mailbox`` of the SuperNode's ``--node-config``."""
    folder = context.node_config.get("mailbox")
    if not isinstance(folder, str):
        raise Error("the SuperNode needs --node-config 'mailbox=\"/path/of/CLIENT/mailbox\"'")
    reply = exchange(Path(folder), _bytes_of(message), float(message.metadata.ttl))
    if reply is None:
        raise Error(f"{folder}: no client has answered; is 'pocketzo federate client' running?")
    return Message(_content(reply), reply_to=message)


@server_app.main()  # type: ignore[untyped-decorator, unused-ignore]
def main(grid: Grid, context: Context) -> None:
    """Run the rounds of the run that the app's configuration names."""
    settings = context.run_config
    seconds = float(settings["round-seconds"])
    with Server.resume(os.fspath(settings["run"])) as server:
        run_rounds(
            server,
            _Grid(grid, seconds),
            least_clients=int(settings["least-clients"]),
            clients=int(settings["clients"]) or None,
            round_seconds=seconds,
            on_round=_log,
            on_problem=lambda line: log(WARNING, line),
        )
        log(INFO, "%s: step %d of %d, trained state %s", server.path, server.step, server.plan.steps, server.state)


def _log(info: RoundInfo) -> None:
    taken = "no step" if info.entry is None else f"step {info.step + 1}"
    log(
        INFO,
        "%s: %d clients, loss %.4f, %d bytes down, %d bytes up",
        *(taken, len(info.clients), info.loss, sum(info.down.values()), sum(info.up.values())),
    )


class _Grid:
    """A transport over Flower's grid; a client is a node, by its id."""

    poll_seconds = 0.2

    def __init__(self, grid: Grid, seconds: float) -> None:
        self._grid = grid
        self._seconds = seconds
        self._sent: set[str] = set()

    def clients(self) -> list[str]:
        return [str(node) for node in self._grid.get_node_ids()]

    def send(self, messages: Mapping[str, bytes]) -> None:
        # With a short time to live, Flower itself drops what comes too late.
        made = [Message(_content(data), int(node), _TYPE, ttl=self._seconds) for node, data in messages.items()]
        self._sent.update(number for number in self._grid.push_messages(made) if number)

    def receive(self) -> Iterable[tuple[str, bytes]]:
        for reply in self._grid.pull_messages(self._sent) if self._sent else ():
            self._sent.discard(reply.metadata.reply_to_message_id)
            node = str(reply.metadata.src_node_id)
            if reply.has_error():
                log(WARNING, "%s: %s", node, reply.error.reason)
            yield node, b"" if reply.has_error() else _bytes_of(reply)  # the server rejects b"", and waits no longer


def _content(data: bytes) -> RecordDict:
    return RecordDict({_RECORD: ConfigRecord({_KEY: data})})


def _bytes_of(message: Message) -> bytes:
    record: Any = message.content.get(_RECORD)
    data = record.get(_KEY) if isinstance(record, ConfigRecord) else None
    return data if isinstance(data, bytes) else b""
