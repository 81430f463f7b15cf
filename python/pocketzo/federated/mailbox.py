"""A transport of files: ``offer.bin`` and ``answer.bin`` in a folder, which any program may carry elsewhere.

A client watches one folder. A server without Flower has a folder that holds one for each client, by its name. Flower's
ClientApp hands each message to the client of its machine in the same way.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from pocketzo.errors import FederationError
from pocketzo.federated.protocol import Offer, decode_reply
from pocketzo.formats.files import make_folder
from pocketzo.formats.staging import staged_file

OFFER: Final = "offer.bin"
ANSWER: Final = "answer.bin"
_POLL_SECONDS: Final = 0.02


class Mailboxes:
    """The transport of a server over a folder that holds a folder for each client.

    Parameters
    ----------
    path : path
        A folder in it is a client, whose name it has.
    """

    poll_seconds = _POLL_SECONDS

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        make_folder(self._path)
        for client in self.clients():
            take(self._path / client / ANSWER)  # of another server

    def clients(self) -> list[str]:
        """Return the names of the folders."""
        return sorted(path.name for path in self._path.iterdir() if path.is_dir() and path.name[0] != ".")

    def send(self, messages: Mapping[str, bytes]) -> None:
        """Write the offers; one that was not taken is replaced."""
        for client, message in messages.items():
            with suppress(FileNotFoundError):  # the folder was removed, and with it the client
                put(self._path / client / OFFER, message)

    def receive(self) -> Iterable[tuple[str, bytes]]:
        """Take the answers that are there."""
        for client in self.clients():
            if (message := take(self._path / client / ANSWER)) is not None:
                yield client, message


def put(path: Path, message: bytes) -> None:
    """Write a message, whole or not at all."""
    with staged_file(path) as file:
        file.write(message)


def take(path: Path) -> bytes | None:
    """Read a message and remove it; None if there is none."""
    try:
        message = path.read_bytes()
        path.unlink()
    except FileNotFoundError:
        return None
    return message


def exchange(folder: Path, offer: bytes, seconds: float) -> bytes | None:
    """Hand an offer to the client that watches a folder, and return its answer; None if none came in time."""
    number = Offer.decode(offer).id
    take(folder / ANSWER)
    put(folder / OFFER, offer)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        answer = take(folder / ANSWER)
        if answer is not None:
            with suppress(FederationError):
                if decode_reply(answer).id in (number, 0):
                    return answer
        time.sleep(_POLL_SECONDS)
    take(folder / OFFER)
    return None


def watch(
    folder: Path, reply: Callable[[bytes], bytes], *, once: bool = False, stop: Callable[[], bool] = lambda: False
) -> None:
    """Answer each offer that comes into a folder.

    Parameters
    ----------
    folder : Path
        Created if it is missing.
    reply : callable
        Returns the answer to an offer.
    once : bool
        Whether to return after the first answer.
    stop : callable
        Asked between two offers whether to return.
    """
    make_folder(folder)
    while not stop():
        offer = take(folder / OFFER)
        if offer is None:
            time.sleep(_POLL_SECONDS)
            continue
        put(folder / ANSWER, reply(offer))
        if once:
            return
